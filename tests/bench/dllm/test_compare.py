from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from elision.bench.dllm.compare import compare_dllm
from elision.bench.dllm.lab import UNCACHED
from elision.bench.dllm.measure import Arm, run
from elision.bench.dllm.report import layer_shares, render, write_report
from elision.bench.dllm.subject import DllmSubject
from elision.bench.dllm.summary import DllmComparison, Strip
from elision.errors import OptionError, UnknownName
from tests.bench.test_cli import run as command

METHODS = ["dkv_cache:interval=4", "elastic_cache_dllm:eps=0.3"]


@pytest.fixture(scope="module")
def comparison(tiny: DllmSubject) -> DllmComparison:
    told: list[tuple[int, int, str]] = []
    result = compare_dllm(
        tiny, METHODS, tasks="chain,recall", questions=2, lengths=[32, 48], progress=lambda *a: told.append(a)
    )
    assert any("elastic" in what for _, _, what in told)
    assert all(done <= total for done, total, _ in told)
    return result


def test_every_arm_has_a_row_at_every_length(comparison: DllmComparison) -> None:
    for length in (32, 48):
        rows = {row.label: row for row in comparison.rows(length)}
        assert next(iter(rows)) == "no_cache"
        assert {*METHODS, "dkv_cache:delay=false", "no_cache (threshold 0.9, window 16)"} <= set(rows)
        plain, cached = rows["no_cache"], rows[METHODS[0]]
        assert plain.layers_ratio == plain.flops_ratio == plain.speedup.mean == plain.agree.mean == 1
        assert plain.bytes_peak == 0
        assert cached.bytes_peak > 0
        assert cached.layers_ratio > 1
        assert cached.calls == plain.calls
        assert cached.exact is not None
        assert cached.exact.n == 4
        assert cached.tasks.keys() == {"chain", "recall"}
        equal = rows[cached.equal_cost]
        assert equal.kind == "fewer_steps"
        assert equal.token_layers >= cached.token_layers
        assert cached.lead is not None


def test_the_table_fits_and_the_file_is_read_back(comparison: DllmComparison, tmp_path: Path) -> None:
    wide, narrow = comparison.table(48), comparison.table(48, 90)
    assert len(narrow.columns) < len(wide.columns)
    assert wide.row_count == len(comparison.rows(48))
    again = DllmComparison.load(comparison.save(tmp_path / "c.jsonl"))
    assert again.rows() == comparison.rows()
    assert [arm.strip for arm in again.arms] == [arm.strip for arm in comparison.arms]
    assert again.seeds == comparison.seeds
    assert len(comparison.to_dict()["rows"]) == len(comparison.rows())


def test_strips_say_what_ran(tiny: DllmSubject, comparison: DllmComparison) -> None:
    question = tiny.question("chain", 32, 0)
    for label in METHODS:
        strip = next(arm.strip for arm in comparison.arms if arm.label == label)
        record = run(tiny, Arm.of(label), question, shadow=True)[2]
        assert strip == Strip.of("chain", 32, record)
        positions = np.array(strip.shares())
        layers = layer_shares(positions, tiny.lm.layers)
        assert positions.sum() * tiny.lm.layers == pytest.approx(record.token_layers)
        assert layers.shape == (record.calls, tiny.lm.layers)
        assert layers.sum() * question.total == pytest.approx(record.token_layers)
        assert strip.stale
    plain = next(arm.strip for arm in comparison.arms if arm.label == UNCACHED.label)
    assert plain is not None
    assert plain.stale == []
    assert plain.drift[0] == pytest.approx(0, abs=1e-5)
    assert min(plain.drift[1:]) > 0


def test_layers_above_the_query_are_the_upper_ones() -> None:
    shares = layer_shares(
        np.array([[1.0, 0.25, 0.25, 0.0]]), 4
    )  # one position in the query, two in reach above layer 3
    assert shares.tolist() == [[0.25, 0.25, 0.25, 0.75]]


def test_models_without_answers_are_compared_by_agreement(tiny: DllmSubject) -> None:
    result = compare_dllm(tiny.lm, "dkv_cache", prompts=[torch.tensor([5, 6, 7])], questions=1, lengths=32)
    row = result.rows()[1]
    assert row.exact is None
    assert row.tasks == {}
    assert 0 <= row.agree.mean <= 1
    assert any("agreement" in note for note in result.notes)
    assert "tokens agree" in render(result)


def test_bad_requests(tiny: DllmSubject) -> None:
    with pytest.raises(OptionError, match="family 'kv'"):
        compare_dllm(tiny, "h2o")
    with pytest.raises(OptionError, match="at least 1"):
        compare_dllm(tiny, "dkv_cache", questions=0)
    with pytest.raises(OptionError, match="lengths"):
        compare_dllm(tiny, "dkv_cache", lengths=[])
    with pytest.raises(UnknownName, match="task"):
        compare_dllm(tiny, "dkv_cache", tasks="sums")


def test_the_page_loads_nothing(comparison: DllmComparison, tmp_path: Path) -> None:
    text = write_report(comparison, tmp_path / "deep" / "r.html").read_text()
    links = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']([^"']*)""", text)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in text
    assert "<script" not in text
    images = re.findall(r'<img [^>]*alt="([^"]+)"', text)
    shown = [arm for arm in comparison.arms if arm.strip is not None]
    assert len(set(images)) == len(images) == 2 * len(shown)
    plain = text.replace("<wbr>", "")
    for row in comparison.rows():
        assert f">{row.label}<" in plain
    assert text.count('class="plot"') == 4
    loaded = DllmComparison.load(comparison.save(tmp_path / "c.jsonl"))
    assert render(loaded).count("<img") == len(images)


def test_the_command_line(small_zoo: None, tmp_path: Path) -> None:
    arguments = ["--methods", "dkv_cache", "--tasks", "chain", "--questions", "2", "--lengths", "32", "--no-controls"]
    found = command("compare", "dllm", *arguments, "-o", str(tmp_path / "c.jsonl"), "--json")
    told = json.loads(found.stdout)
    assert [row["label"] for row in told["rows"]] == ["no_cache", "dkv_cache"]
    assert (tmp_path / "c.jsonl").exists()
    assert (tmp_path / "c.html").exists()
    shown = command("compare", "dllm", *arguments, "-o", str(tmp_path / "d.jsonl"), "--no-report").stdout
    assert "exact match" in shown
    assert "tokens/s" in shown
    assert not (tmp_path / "d.html").exists()


def test_reproduce_on_the_command_line(small_zoo: None, tmp_path: Path) -> None:
    arguments = ["no_cache", "--prompts", "2", "--length", "32", "-o", str(tmp_path / "r.jsonl")]
    findings = json.loads(command("reproduce", *arguments, "--json").stdout)["findings"]
    assert {f["claim"] for f in findings} == {"no_cache/answers"}
    assert {f["verdict"] for f in findings} == {"does not hold"}  # random weights answer nothing
