"""`elision compare kv`, `elision reproduce` and `elision demo` on a random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elision.bench.kv.subject import LanguageSubject
from elision.cli import app

runner = CliRunner()


def run(*arguments: str, code: int = 0):  # type: ignore[no-untyped-def]
    found = runner.invoke(app, list(arguments))
    assert found.exit_code == code, (found.output, found.stderr, found.exception)
    return found


@pytest.fixture
def smollm2(tiny: LanguageSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo's language model, small and random."""
    import elision.zoo
    from elision.zoo.smollm2 import LanguageModel

    monkeypatch.setattr(elision.zoo, "load", lambda name: LanguageModel(tiny.model, tiny.tokenizer))


def test_compare_writes_results_and_report(smollm2: None, tmp_path: Path) -> None:
    path = tmp_path / "out" / "r.jsonl"
    arguments = ["--methods", "snapkv:budget=64", "--tasks", "passkey", "--prompts", "2", "--length", "200"]
    found = run("compare", "kv", *arguments, "--timing", "0", "--no-controls", "-o", str(path), "--json")
    told = json.loads(found.stdout)
    assert told["files"] == {"results": str(path), "report": str(path.with_suffix(".html"))}
    assert path.exists()
    assert path.with_suffix(".html").exists()
    assert [row["label"] for row in told["rows"]] == ["DynamicCache", "snapkv:budget=64"]


def test_compare_prints_a_table(smollm2: None, tmp_path: Path) -> None:
    arguments = ["--methods", "window:budget=64", "--tasks", "passkey", "--prompts", "1", "--length", "200"]
    found = run("compare", "kv", *arguments, "--timing", "1", "--no-report", "-o", str(tmp_path / "r.jsonl"))
    assert "smollm2, prompts of 200 tokens" in found.stdout
    assert "ms/token" in found.stdout
    assert "OffloadedCache" in found.stdout  # the note that says why not


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "snapkv:budge=64"], "did you mean 'budget'"),
        (["--tasks", "pasky"], "did you mean 'passkey'"),
        (["--methods", "taylorseer"], "family 'denoise'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(smollm2: None, arguments: list[str], words: str) -> None:
    found = run("compare", "kv", *arguments, code=2)
    assert words in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert found.stdout == ""


def test_reproduce_runs_kv_claims(smollm2: None, tmp_path: Path) -> None:
    arguments = ["uniform_rtn", "--prompts", "2", "--length", "200", "-o", str(tmp_path / "r.jsonl")]
    told = json.loads(run("reproduce", *arguments, "--json").stdout)
    assert {f["claim"] for f in told["findings"]} == {"uniform_rtn/bits"}
    assert told["model"] == "smollm2"
    assert told["length"] == 200


@pytest.mark.parametrize("prompts", [[], ["--prompt", "one two three four five six seven eight"]])
def test_fit_writes_a_profile_that_compare_takes(smollm2: None, prompts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "prefix.safetensors"
    found = run("fit", "prefixkv:budget=0.5", "--calls", "2", "--length", "64", *prompts, "-o", str(path), "--json")
    told = json.loads(found.stdout)
    assert told["calls"] == told["prompts"] == (1 if prompts else 2)
    assert told["model"] == "smollm2"
    methods = ["--methods", f"prefixkv:budget=0.5,profile={path}"]
    quick = ["--tasks", "passkey", "--prompts", "1", "--length", "200", "--timing", "0", "--no-controls", "--no-report"]
    run("compare", "kv", *methods, *quick, "-o", str(tmp_path / "r.jsonl"))


def test_fit_refuses_branches_of_a_language_model(smollm2: None, tmp_path: Path) -> None:
    found = run("fit", "prefixkv", "--branches", "cond,uncond", "-o", str(tmp_path / "p.safetensors"), code=2)
    assert "branches belong to diffusion models" in found.stderr
