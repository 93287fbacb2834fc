"""The language half of the demo."""

from __future__ import annotations

import pytest

from elision.bench.kv import demo
from elision.bench.kv.subject import LanguageSubject


def test_the_same_question_over_every_cache(tiny: LanguageSubject) -> None:
    told: list[str] = []
    found = demo.ask(tiny, ["snapkv:budget=0.25", "no_such_method"], length=200, most=3, told=told.append)
    assert [a.label for a in found] == ["full cache", "snapkv:budget=0.25"]
    full, snap = found
    assert full.bytes_held == full.bytes_full == snap.bytes_full
    assert snap.bytes_held < 0.5 * full.bytes_held
    assert all(a.text.startswith(demo.REPLY) and a.seconds > 0 for a in found)
    assert len(told) == 2


def test_answers_are_printed_as_a_table(tiny: LanguageSubject, capsys: pytest.CaptureFixture[str]) -> None:
    from elision.cli import _demo

    _demo._print(demo.ask(tiny, ["snapkv:budget=0.25"], length=200, most=3))
    shown = capsys.readouterr().out
    assert "night train" in shown
    assert "snapkv:budget=0.25" in shown
    assert "KiB" in shown


def test_the_fact_stands_in_the_middle(tiny: LanguageSubject) -> None:
    text = demo.long_text(tiny, 400)
    place = text.index("platform 7") / len(text)
    assert 0.25 < place < 0.75
    assert abs(len(tiny.encode(text)) - 400) < 100
