"""The report: every arm in it, nothing loaded from anywhere, marks that match what was kept."""

from __future__ import annotations

import re

import pytest

from elision.bench.kv.compare import compare_kv
from elision.bench.kv.report import heat_maps, render
from elision.bench.kv.subject import LanguageSubject
from elision.bench.kv.summary import KVComparison


@pytest.fixture(scope="module")
def comparison(tiny: LanguageSubject) -> KVComparison:
    methods = ["snapkv:budget=48", "snapkv:budget=96", "mikv"]
    return compare_kv(tiny, methods, tasks="passkey,continuation", prompts=5, length=200, timing=0, controls=False)


def test_page_holds_everything_and_loads_nothing(comparison: KVComparison) -> None:
    page = render(comparison)
    text = page.replace("<wbr>", "")
    assert all(arm.label in text for arm in comparison.arms)
    assert "Facts by depth and budget" in page
    assert "What each layer holds" in page
    assert page.count("<svg") == 2
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert set(links) <= {"data:,"}
    assert "times" not in re.findall(r"<title>(.*?)</title>", page)[1]


def test_heat_maps_have_a_column_per_setting_and_a_row_per_depth(comparison: KVComparison) -> None:
    maps = {found["name"]: found for found in heat_maps(comparison)}
    assert maps["snapkv"]["columns"] == ["budget=48", "budget=96"]
    assert [line["depth"] for line in maps["snapkv"]["lines"]] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert all(cell["of"] == 1 for line in maps["mikv"]["lines"] for cell in line["cells"])


def test_marks_tell_kept_from_dropped_and_demoted(comparison: KVComparison) -> None:
    page = render(comparison)
    parts = {part.partition(":")[0]: part for part in re.split(r"<summary>", page)[1:]}
    assert "% dropped" in parts["snapkv"]
    assert parts["snapkv"].count('class="dropped') > 5
    assert parts["mikv"].count('class="dropped') == 0
    assert "--p: 1.00" in parts["mikv"]
    assert 'class="fact"' in parts["mikv"]


def test_a_report_of_a_read_file_is_the_same(comparison: KVComparison, tmp_path) -> None:  # type: ignore[no-untyped-def]
    again = KVComparison.load(comparison.save(tmp_path / "c.jsonl"))
    body = render(comparison).partition("<main>")[2].partition("<details>\n    <summary>Environment")[0]
    assert body in render(again)
