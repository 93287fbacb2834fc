from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import elision
from elision.cli import app
from elision.cli._common import seeds_of, steps_of

runner = CliRunner()


def run(*arguments: str, code: int = 0):  # type: ignore[no-untyped-def]
    found = runner.invoke(app, list(arguments))
    assert found.exit_code == code, (found.output, found.stderr, found.exception)
    return found


def test_version() -> None:
    assert run("--version").stdout.strip() == f"elision {elision.__version__}"


def test_methods_lists_the_registry() -> None:
    rows = json.loads(run("methods", "--json").stdout)
    assert [row["name"] for row in rows] == [m.name for m in elision.methods()]
    text = run("methods").stdout
    assert all(m.name in text for m in elision.methods())
    listed = json.loads(run("methods", "--family", "denoise", "--json").stdout)
    assert [row["name"] for row in listed] == [m.name for m in elision.methods("denoise")]


def test_show_tells_options_with_ranges_and_the_paper() -> None:
    text = run("show", "taylorseer").stdout
    assert "interval" in text
    assert "at least 1" in text
    assert "2503.06923" in text
    found = json.loads(run("show", "easycache", "--json").stdout)
    assert {o["option"] for o in found["options"]} >= {"threshold", "warmup_steps"}
    assert "EasyCache" in found["documentation"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "easycash"], "did you mean 'easycache'"),
        (["methods", "--family", "denoised"], "did you mean 'denoise'"),
        (["fit", "easycache", "-o", "x.safetensors"], "has no offline part"),
        (["fit", "teacache:degre=2", "-o", "x.safetensors"], "did you mean 'degree'"),
        (["compare", "denoise", "--methods", "taylorseer:interval=0"], "at least 1"),
        (["reproduce", "nothing"], "unknown method with claims"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(zoo: None, arguments: list[str], words: str) -> None:
    found = run(*arguments, code=2)
    assert words in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert found.stdout == ""
    assert "Traceback" not in found.stderr


def test_compare_writes_results_and_report(zoo: None, tmp_path: Path) -> None:
    path = tmp_path / "out" / "r.jsonl"
    arguments = ["--methods", "taylorseer:interval=2,uniform:interval=2", "--steps", "6", "--seeds", "2"]
    found = run("compare", "denoise", *arguments, "--prompt", "bag", "--batch", "2", "-o", str(path), "--json")
    told = json.loads(found.stdout)
    assert told["files"] == {"results": str(path), "report": str(path.with_suffix(".html"))}
    assert path.exists()
    assert path.with_suffix(".html").exists()
    assert told["steps"] == [6]
    assert "taylorseer:interval=2" in [row["label"] for row in told["rows"]]


def test_compare_prints_a_table(zoo: None, tmp_path: Path) -> None:
    arguments = ["--methods", "uniform:interval=2", "--steps", "4", "--seeds", "1", "--prompt", "bag"]
    found = run("compare", "denoise", *arguments, "--no-controls", "--no-report", "-o", str(tmp_path / "r.jsonl"))
    assert "garments-flux" in found.stdout
    assert "PSNR" in found.stdout
    assert "uniform:interval=2,site=model" not in found.stdout
    assert "fewer_steps:steps=2 " in found.stdout  # not folded
    assert not (tmp_path / "r.html").exists()


def test_demo_ends_with_a_table_and_the_path_of_the_report(
    zoo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("demo", "--seeds", "1")
    assert "PSNR" in found.stdout
    assert found.stdout.strip().endswith(str(tmp_path / "results" / "demo.html"))
    assert (tmp_path / "results" / "demo.jsonl").exists()


def test_demo_asks_a_language_model(zoo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import elision.zoo
    from tests.bench.kv.conftest import small_subject

    small, load = small_subject(), elision.zoo.load
    monkeypatch.setattr(
        elision.zoo, "load", lambda name: (small.model, small.tokenizer) if name == "smollm2" else load(name)
    )
    monkeypatch.chdir(tmp_path)
    told = json.loads(run("demo", "--seeds", "1", "--json").stdout)
    assert [a["label"] for a in told["answers"]] == ["full cache", "cake:budget=0.25", "zipcache"]
    assert all(a["bytes_held"] <= a["bytes_full"] for a in told["answers"])


def test_reproduce_returns_zero_whatever_the_verdicts(zoo: None, tmp_path: Path) -> None:
    arguments = ["stale", "uniform", "--steps", "6", "--seeds", "2", "-o", str(tmp_path / "r.jsonl")]
    findings = json.loads(run("reproduce", *arguments, "--json").stdout)["findings"]
    assert {f["claim"] for f in findings} == {"stale/uniform", "uniform/interval"}
    assert (tmp_path / "r.jsonl").exists()
    assert "verdict" in run("reproduce", *arguments).stdout


def test_fit_writes_a_profile_that_compare_takes(zoo: None, tmp_path: Path) -> None:
    path = tmp_path / "tea.safetensors"
    found = run(
        "fit", "teacache:degree=2", "--calls", "1", "--steps", "8", "--prompt", "bag", "-o", str(path), "--json"
    )
    told = json.loads(found.stdout)
    assert told["tensors"]["coefficients"] == [3]
    arguments = ["--methods", f"teacache:degree=2,profile={path}", "--steps", "6", "--seeds", "1", "--prompt", "bag"]
    run("compare", "denoise", *arguments, "--no-report", "-o", str(tmp_path / "r.jsonl"))


def test_zoo_commands(zoo: None) -> None:
    assert "samples 7" in run("zoo", "list").stdout
    assert set(json.loads(run("zoo", "list", "--json").stdout)) == {"garments-flux", "garments-classifier"}
    assert json.loads(run("zoo", "check", "garments-flux", "--json").stdout) == {"accuracy": 0.91234, "images": 1000}
    assert "0.9123" in run("zoo", "check", "garments-flux").stdout


def test_zoo_train_hands_the_folder_over(zoo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import elision.zoo

    asked: list[object] = []
    monkeypatch.setattr(elision.zoo, "train", lambda name, out: asked.append((name, out)))
    run("zoo", "train", "garments-flux", "-o", str(tmp_path))
    assert asked == [("garments-flux", tmp_path)]


def test_doctor_checks_upstream() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert {name: row["ok"] for name, row in found["checks"].items()} == {
        "tap": True,
        "cache context": True,
        "scheduler": True,
        "end to end": True,
    }
    assert found["packages"]["core"]["torch"]
    assert "ok" in run("doctor").stdout


def test_doctor_fails_where_upstream_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.nn.Module, "__call__", lambda self, *args, **kwargs: self.forward(*args, **kwargs))
    found = run("doctor", "--json", code=1)
    assert json.loads(found.stdout)["checks"]["tap"]["ok"] is False


def test_serve_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "serving" in name else find(name, *a))
    assert "elision.serving is not part" in run("serve", code=2).stderr


def test_serve_hands_its_arguments_over(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    import types

    asked: list[str] = []

    def serve(upstream: str = "none") -> None:
        """Serve."""
        asked.append(upstream)

    package, module = types.ModuleType("elision.serving"), types.ModuleType("elision.serving.cli")
    module.serve = serve  # type: ignore[attr-defined]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: package if "serving" in name else find(name, *a))
    monkeypatch.setitem(sys.modules, "elision.serving", package)
    monkeypatch.setitem(sys.modules, "elision.serving.cli", module)
    run("serve", "--upstream", "http://localhost:1")
    assert asked == ["http://localhost:1"]


def test_numbers() -> None:
    assert seeds_of("5") == 5
    assert seeds_of("3,7") == [3, 7]
    assert steps_of("28,50") == [28, 50]
    assert steps_of(None) is None
    assert "whole numbers" in run("compare", "denoise", "--seeds", "many", code=2).stderr


def _subprocess(*arguments: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(elision.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "elision.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)


def test_a_real_process() -> None:
    found = _subprocess("show", "easycash")
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("error: unknown method 'easycash'")
    assert _subprocess("--version").stdout.strip() == f"elision {elision.__version__}"


def test_the_command_line_starts_without_torch() -> None:
    code = (
        "import sys; import elision.cli; print(sorted(m for m in ('torch', 'diffusers', 'scipy') if m in sys.modules))"
    )
    source = str(Path(elision.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
        check=True,
        timeout=60,
    )
    assert found.stdout.strip() == "[]"
