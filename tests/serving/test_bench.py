"""The workloads say the truth about themselves, and the comparison shows the paper's trends on the controlled one."""

from __future__ import annotations

import json
import re
from collections import Counter
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from elision.errors import OptionError, UnknownName
from elision.serving.bench import compare as bench
from elision.serving.bench.workload import KINDS, text_workload, texts_of, vector_workload
from elision.serving.semantic import Economics, Policies, break_even


def test_text_workload_is_consistent_and_repeatable() -> None:
    asks = text_workload(3000, seed=3)
    assert asks == text_workload(3000, seed=3) != text_workload(3000, seed=4)
    assert [a.at for a in asks] == sorted(a.at for a in asks)
    intent_of = {}
    for ask in asks:
        assert intent_of.setdefault(ask.text, ask.intent) == ask.intent, "one text must not mean two things"
        assert "{" not in ask.text
    shares = Counter(a.category for a in asks)
    assert all(abs(shares[name] / 3000 - kind.share) < 0.03 for name, kind in KINDS.items())
    versions = {(a.intent, a.version) for a in asks if a.category == "markets"}
    assert len(versions) > len({intent for intent, _ in versions})
    assert {a.version for a in asks if a.category == "code"} == {0}


def test_repetition_follows_its_law() -> None:
    asks = text_workload(6000, seed=0)

    def top(category: str) -> float:
        counts = Counter(a.intent for a in asks if a.category == category).most_common()
        return sum(n for _, n in counts[: len(counts) // 10]) / sum(n for _, n in counts)

    assert top("code") > 0.35  # Zipf: a tenth of the intents gets far more than a tenth
    assert top("medical") < 0.25  # uniform


def test_vector_workload_has_the_density_it_claims() -> None:
    asks, table = vector_workload(2000, seed=1)
    by_intent: dict[str, list[np.ndarray]] = {}
    for text, vector in table.items():
        by_intent.setdefault(text.split(" #")[0], []).append(vector)
    dense = [v[0] for intent, v in by_intent.items() if intent.startswith("dense")]
    between = [float(a @ b) for i, a in enumerate(dense) for b in dense[:i]]
    assert 0.78 < np.median(between) < 0.88
    within = [float(v[0] @ v[1]) for intent, v in by_intent.items() if intent.startswith("sparse")]
    assert 0.70 < np.median(within) < 0.88
    assert set(texts_of(asks)) <= set(table)


@pytest.mark.slow
def test_category_aware_beats_every_single_threshold() -> None:
    """Trend of the paper: no single threshold has as many right hits, unless with more false ones."""
    stream = bench.vector_stream(1500, seed=0)
    rows = {row.system: row for row in bench.rows_of(stream)}
    ours = rows["by category"]
    for name, row in rows.items():
        if name.startswith("one threshold"):
            assert ours.right > row.right, name
            assert ours.stale < row.stale, name
            assert ours.false <= row.false + 0.003, name
    assert ours.false_of_hits <= bench.MOST_FALSE
    assert rows["no cache"].hit_rate == 0
    assert rows["exact only"].false == 0
    assert rows["one threshold 0.80"].false_of_hits > 0.15 > rows["one threshold 0.90"].false_of_hits


def test_local_search_makes_the_tail_pay_and_remote_does_not() -> None:
    tail, model = 0.08, 0.2
    assert break_even(0.002, 0.001, model) < tail < break_even(0.030, 0.001, model)
    local, remote = Economics(), Economics()
    for i in range(1000):
        for economics, search in ((local, 0.002), (remote, 0.030)):
            hit = i % 100 < 8
            economics.looked_up("legal", "m", hit=hit, embed=None, search=search, fetch=0.001 if hit else None)
            economics.answered("legal", "m", model)
    (a,), (b,) = local.report(), remote.report()
    assert a["hit_rate"] == b["hit_rate"] == pytest.approx(tail)
    assert a["break_even"] < tail < b["break_even"]


def test_judge_counts_right_false_and_stale() -> None:
    stream = bench.vector_stream(30, seed=2)
    asks = stream.asks[:4]
    found = [asks[0].answer, f"{asks[1].intent}|99", "other|0", None]
    row = bench.judge("x", stream, asks, found, [0.001] * 4)
    assert (row.hit_rate, row.right, row.stale, row.false, row.false_of_hits) == (0.75, 0.25, 0.25, 0.25, 0.3333)
    assert row.saved_s == stream.kinds[asks[0].category].model_seconds


def test_compare_prints_and_writes(tmp_path: Path) -> None:
    out, text = tmp_path / "r.jsonl", StringIO()
    rows = bench.compare(["vectors"], count=60, out=out, console=Console(file=text, width=160))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0]["kind"] == "environment"
    assert lines[0]["count"] == 60
    assert [line["system"] for line in lines[1:]] == [row.system for row in rows]
    assert "by category" in text.getvalue()
    assert not re.search(r"/(home|root|work|tmp)/", out.read_text()), "results name no paths of a machine"
    with pytest.raises(UnknownName, match="did you mean 'text'"):
        bench.compare(["texts"])
    with pytest.raises(OptionError, match="count 0"):
        text_workload(0)


def test_a_missing_gptcache_is_an_error_with_its_reason(tmp_path: Path) -> None:
    import sys

    stream = bench.vector_stream(20, seed=0)
    with pytest.raises(OptionError, match="gptcache did not run"):
        bench.gptcache_rows(stream, Path(sys.executable))


def test_fitted_thresholds_come_from_the_other_seed() -> None:
    stream = bench.vector_stream(400, seed=5)
    assert not set(texts_of(stream.asks)) & set(texts_of(stream.calibration))
    fitted = bench.fit_thresholds(stream, verifier=None)
    assert fitted["dense"] > fitted["sparse"]
    assert isinstance(bench._category_policies(stream, fitted), Policies)
