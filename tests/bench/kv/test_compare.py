"""Comparisons: rows with intervals, reasons for what cannot run, files that are read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from elision.bench.kv.compare import compare_kv, quantized_backend
from elision.bench.kv.subject import LanguageSubject
from elision.bench.kv.summary import KVComparison
from elision.bench.kv.timing import Entry, race
from elision.bench.spec import parse
from elision.errors import OptionError, UnknownName


@pytest.fixture(scope="module")
def comparison(tiny: LanguageSubject) -> KVComparison:
    told: list[tuple[int, int, str]] = []
    result = compare_kv(
        tiny,
        ["snapkv:budget=0.25", "h2o:budget=0.25,zipcache"],
        tasks="passkey,continuation",
        prompts=3,
        length=200,
        timing=2,
        steps=2,
        progress=lambda *a: told.append(a),
    )
    assert any("zipcache" in what for _, _, what in told)
    assert all(done <= total for done, total, _ in told)
    return result


def test_every_arm_has_a_row(comparison: KVComparison) -> None:
    rows = {row.label: row for row in comparison.rows()}
    assert next(iter(rows)) == "DynamicCache"
    assert {"snapkv:budget=0.25", "h2o:budget=0.25", "zipcache", "window:budget=0.25", "random:budget=0.25"} <= set(
        rows
    )
    full, snap = rows["DynamicCache"], rows["snapkv:budget=0.25"]
    assert full.nll is not None
    assert full.nll.mean == 0
    assert full.share is not None
    assert full.share.mean == 1
    assert snap.share is not None
    assert snap.share.mean < 0.6
    assert snap.scores.keys() == {"passkey", "continuation"}
    assert snap.scores["continuation"].mean > 1
    assert snap.scores["passkey"].n == 3
    assert snap.prefill_ratio is not None
    assert snap.decode_ratio is not None
    assert snap.bytes_held is not None
    assert snap.bytes_peak is not None
    assert snap.bytes_peak >= snap.bytes_held


def test_what_cannot_run_says_why(comparison: KVComparison) -> None:
    rows = {row.label.partition(":")[0]: row for row in comparison.rows()}
    assert "accelerator" in rows["OffloadedCache"].why
    assert rows["OffloadedCache"].share is None
    if not quantized_backend()[0]:
        assert "pip install" in rows["QuantizedCache"].why
    assert any("OffloadedCache" in note for note in comparison.notes)


def test_the_table_fits_and_the_file_is_read_back(comparison: KVComparison, tmp_path: Path) -> None:
    wide, narrow = comparison.table(), comparison.table(80)
    assert len(narrow.columns) < len(wide.columns)
    assert wide.row_count == (8 if quantized_backend()[0] else 6)  # QuantizedCache at two widths, where it can run
    again = KVComparison.load(comparison.save(tmp_path / "c.jsonl"))
    assert again.rows() == comparison.rows()
    assert again.arms[1].sample == comparison.arms[1].sample
    assert [row["label"] for row in comparison.to_dict()["rows"]] == [arm.label for arm in comparison.arms]


def test_samples_tell_where_the_tokens_of_one_prompt_are(comparison: KVComparison) -> None:
    sample = next(arm.sample for arm in comparison.arms if arm.name == "snapkv")
    assert sample is not None
    assert len(sample.tokens) == len(sample.held) == len(sample.packed)
    assert sum(sample.held) == pytest.approx(50, abs=1)
    assert sample.where is not None
    assert sample.answer.strip() in "".join(sample.tokens[slice(*sample.where)])


def test_bad_requests(tiny: LanguageSubject) -> None:
    with pytest.raises(OptionError, match="family 'denoise'"):
        compare_kv(tiny, "uniform")
    with pytest.raises(OptionError, match="at least 1"):
        compare_kv(tiny, "snapkv", prompts=0)
    with pytest.raises(UnknownName, match="unknown task"):
        compare_kv(tiny, "snapkv", tasks="passkeys")


def test_races_are_paired_and_count_bytes(tiny: LanguageSubject) -> None:
    ids = tiny.tensor([list(range(2, 130))])
    entries = {"full": Entry(), "snapkv": Entry(parse("snapkv:budget=64").method)}  # type: ignore[arg-type]
    times = race(tiny.model, ids, entries, steps=2, rounds=3)
    assert all(len(t.prefill) == len(t.decode) == 3 for t in times.values())
    assert times["full"].bytes_held is None
    assert times["snapkv"].bytes_held is not None
    assert times["snapkv"].decode_ratio(times["full"]).n == 3
