from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from elision.bench import subject as subjects
from elision.bench.policy.comparing import compare_policy
from elision.bench.policy.report import render, write_report
from elision.bench.policy.subject import PolicySubject
from elision.bench.policy.summary import PolicyComparison
from elision.errors import OptionError, UnknownName
from elision.zoo.metaworld import TASKS
from tests.bench.policy.conftest import Plane, small_pipeline
from tests.bench.test_cli import run as command

METHODS = ["bac:num_caches=3,union_blocks=2", "uniform:interval=1", "taylorseer:interval=3"]


@pytest.fixture(scope="module")
def comparison() -> PolicyComparison:
    told: list[tuple[int, int, str]] = []
    subject = PolicySubject("random-policy", small_pipeline(), TASKS[:2], Plane, steps=10, limit=16, together=4)
    result = compare_policy(subject, METHODS, episodes=4, timing=2, progress=lambda *a: told.append(a))
    assert any("bac" in what for _, _, what in told)
    assert all(done <= total for done, total, _ in told)
    return result


def test_every_arm_meets_the_same_episodes(comparison: PolicyComparison) -> None:
    wanted = [(task, seed) for task in TASKS[:2] for seed in range(4)]
    for arm in comparison.arms:
        assert [(e.task, e.seed) for e in arm.episodes] == wanted
        assert len(arm.seconds) == 2
    assert len({tuple(arm.solved()) for arm in comparison.arms}) > 1  # the toy world tells arms apart


def test_rows(comparison: PolicyComparison) -> None:
    rows = {row.label: row for row in comparison.rows()}
    plain, bac, same = rows["ddpm:steps=10"], rows[METHODS[0]], rows[METHODS[1]]
    assert plain.kind == "baseline"
    assert plain.error.mean == same.error.mean == 0
    assert same.success == plain.success
    assert same.share == plain.share == 1
    assert bac.error.mean > 0
    assert plain.flops == same.flops
    assert bac.flops is not None
    assert bac.share is not None
    assert bac.flops == pytest.approx(plain.flops * bac.share)  # type: ignore[operator]
    equal = rows[bac.equal_cost]
    assert equal.kind == "fewer_steps"
    assert equal.label.startswith("ddim")
    assert bac.share <= equal.share < bac.share + 0.1  # type: ignore[operator]
    assert bac.bytes_peak > 0
    assert plain.bytes_peak == 0
    assert bac.hz is not None
    assert bac.control_hz == pytest.approx(8 * bac.hz)
    assert min(comparison.spread) > 0


def test_the_table_fits_and_the_file_is_read_back(comparison: PolicyComparison, tmp_path: Path) -> None:
    wide, narrow = comparison.table(), comparison.table(90)
    assert len(narrow.columns) < len(wide.columns)
    assert wide.row_count == len(comparison.arms)
    again = PolicyComparison.load(comparison.save(tmp_path / "c.jsonl"))
    assert again.rows() == comparison.rows()
    assert again == comparison
    assert again.arms[1].options["num_caches"] == 3


def test_the_page_loads_nothing(comparison: PolicyComparison, tmp_path: Path) -> None:
    text = write_report(comparison, tmp_path / "deep" / "r.html").read_text()
    assert re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']([^"']*)""", text) == ["data:,"]
    assert "url(" not in text
    assert "<script" not in text
    plain = text.replace("<wbr>", "")
    for row in comparison.rows():
        assert f">{row.label}<" in plain
    assert text.count('class="plot"') == 2
    episodes = sum(len(arm.episodes) for arm in comparison.arms)
    assert text.count(' steps"></span>') == episodes
    assert text.count('class="failed"') == sum(not e.solved for arm in comparison.arms for e in arm.episodes)
    assert render(PolicyComparison.load(comparison.save(tmp_path / "c.jsonl"))).count("<svg") == 2


def test_without_controls_and_timing(subject: PolicySubject) -> None:
    result = compare_policy(subject, METHODS[:1], episodes=[5], tasks=TASKS[:1], controls=False, timing=0)
    plain, bac = result.rows()
    assert result.seeds == [5]
    assert plain.hz is bac.hz is bac.lead is bac.speedup is None
    assert "chunk Hz" not in [column.header for column in result.table().columns]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "h2o"}, "family 'kv'"),
        ({"episodes": 0}, "episodes=0"),
        ({"timing": -1}, "timing=-1"),
        ({"steps": 0}, "steps=0"),
        ({"together": 0}, "together=0"),
        ({"tasks": [TASKS[0], TASKS[0]]}, "twice"),
    ],
)
def test_bad_requests(subject: PolicySubject, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compare_policy(subject, **{"methods": "bac", **arguments})  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="button-press-topdown-v3"):
        compare_policy(subject, "bac", tasks=["button-pres-topdown-v3"])


def test_the_command_line(subject: PolicySubject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "_load", lambda model, prompts: subject.subject())
    arguments = ["--model", "metaworld-policy", "--methods", "uniform:interval=2", "--seeds", "2", "--no-controls"]
    told = json.loads(command("compare", "denoise", *arguments, "-o", str(tmp_path / "c.jsonl"), "--json").stdout)
    assert [row["label"] for row in told["rows"]] == ["ddpm:steps=10", "uniform:interval=2"]
    assert (tmp_path / "c.html").exists()
    shown = command("compare", "denoise", *arguments, "-o", str(tmp_path / "d.jsonl"), "--no-report").stdout
    assert "control Hz" in shown
    assert not (tmp_path / "d.html").exists()
    for more, message in ((["--guidance", "2"], "guidance"), (["--steps", "5,6"], "takes one")):
        assert message in command("compare", "denoise", *arguments, *more, code=2).stderr


def test_fit_on_the_command_line(subject: PolicySubject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes is what a comparison would have fitted, so that both give the same actions."""
    monkeypatch.setattr(subjects, "_load", lambda model, prompts: subject.subject())
    where = str(tmp_path / "p.safetensors")
    told = json.loads(
        command("fit", "bac", "--model", "metaworld-policy", "--calls", "1", "-o", where, "--json").stdout
    )
    assert (told["steps"], told["samples"]) == (10, 2)
    methods = ["bac:num_caches=2", f"bac:num_caches=2,union_blocks=0,profile={where}"]
    rows = compare_policy(subject, methods, episodes=2, controls=False, timing=0).rows()
    again = compare_policy(subject, "bac:num_caches=2,union_blocks=0", episodes=2, controls=False, timing=0).rows()
    assert rows[2].error == again[1].error
    assert rows[1].error != rows[2].error
    with pytest.raises(OptionError, match="two profiles"):
        compare_policy(subject, [f"bac:profile={where}", "bac"], episodes=2)


def test_an_action_error_is_a_root_mean_square() -> None:
    from elision.bench.policy.measure import errors

    assert errors(np.zeros((2, 3, 4)), np.full((2, 3, 4), [[[2.0]], [[0.0]]])) == [2.0, 0.0]
