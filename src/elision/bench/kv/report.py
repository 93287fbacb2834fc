"""The HTML report of a KV comparison: one file, nothing loaded from anywhere."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

import elision
from elision.bench import stats
from elision.bench.environment import environment
from elision.bench.kv.summary import KVArm, KVComparison, KVRow, Sample
from elision.bench.kv.table import cells
from elision.bench.report._page import templates
from elision.bench.report._plot import Frame, Point, scatter
from elision.bench.stats import Estimate

_DROPPED = 0.1  # a token held by a smaller share of layers and heads counts as dropped
_ROUGH = 10  # answers in a cell of a heat map below which it is called rough


def write_report(comparison: KVComparison, path: str | Path) -> Path:
    """Write the report of `comparison` to `path` and return it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(comparison), encoding="utf-8")
    return path


def render(comparison: KVComparison) -> str:
    """The report as one HTML document."""
    rows = [row for row in comparison.rows() if row.share is not None]
    texts = [cells(row, comparison.tasks) for row in rows]
    columns = [name for name in texts[0] if name == "" or any(text[name] != "–" for text in texts)]
    maps = heat_maps(comparison)
    return (
        templates()
        .get_template("kv.html")
        .render(
            comparison=comparison,
            cards=[_card(row, arm) for row, arm in _paired(comparison, rows) if arm.kind == "method"],
            plots=_plots(comparison, rows),
            maps=maps,
            faint=any(cell["of"] < _ROUGH for found in maps for line in found["lines"] for cell in line["cells"]),
            layers=[_bars(arm) for arm in comparison.arms if arm.kind != "full" and _layers(arm)],
            samples=[_sample(arm.label, arm.sample) for arm in comparison.arms if arm.sample is not None],
            columns=[name or "arm" for name in columns],
            rows=[
                {"kind": row.kind, "cells": [text[c] for c in columns]} for row, text in zip(rows, texts, strict=True)
            ],
            notes=[(row.label, note) for row in rows for note in row.notes],
            environment=comparison.environment or environment(),
            version=elision.__version__,
        )
    )


def _paired(comparison: KVComparison, rows: Sequence[KVRow]) -> list[tuple[KVRow, KVArm]]:
    arms = {arm.label: arm for arm in comparison.arms}
    return [(row, arms[row.label]) for row in rows]


def _right(arm: KVArm) -> Estimate | None:
    """Share of right answers over all tasks that have one."""
    values = [o.exact for o in arm.outcomes if o.exact is not None]
    return stats.mean(values) if values else None


def _card(row: KVRow, arm: KVArm) -> dict[str, str]:
    """A method at a glance; the verdict is read off the interval of what it loses."""
    assert row.share is not None
    assert row.nll is not None
    assert row.agree is not None
    verdict, word = "even", "not separated from the full cache"
    if row.nll.low is not None and row.nll.high is not None:
        if row.nll.low > 0:
            verdict, word = "worse", "loses against the full cache"
        elif row.nll.high < 0:
            verdict, word = "better", "likelier answers than the full cache"
    name, _, options = row.label.partition(":")
    right = _right(arm)
    return {
        "name": name,
        "options": options.replace(",", ", ") or "default options",
        "share": f"{row.share.mean:.1%}",
        "right": "–" if right is None else f"{right.mean:.0%}",
        "agree": f"{row.agree.mean:.0%}",
        "verdict": verdict,
        "word": word,
        "loss": f"{row.nll.interval('+.3f')} nats",
    }


def _plots(comparison: KVComparison, rows: Sequence[KVRow]) -> list[dict[str, Any]]:
    agree, right = [], []
    for row, arm in _paired(comparison, rows):
        if row.kind == "full" or row.share is None or row.agree is None:
            continue
        agree.append(_point(row.share.mean, row.agree, row))
        answers = _right(arm)
        if answers is not None:
            right.append(_point(row.share.mean, answers, row))
    x = "bytes held, share of the full cache"
    frames = [
        ("tokens as over the full cache", agree, Frame(x, "equal likeliest tokens, %", "Bytes against agreement")),
        ("answers", right, Frame(x, "right answers, %", "Bytes against right answers")),
    ]
    made = []
    for place, (title, found, frame) in enumerate(frames):
        frame = Frame(frame.x_title, frame.y_title, frame.about, " %", 0.0, " %")
        svg = scatter(found, frame, f"plot-kv-{place}")
        if svg:
            made.append({"title": title, "svg": Markup(svg)})
    return made


def _point(x: float, y: Estimate, row: KVRow) -> Point:
    low, high = (y.mean if end is None else end for end in (y.low, y.high))
    return Point(x * 100, y.mean * 100, max(low, 0.0) * 100, min(high, 1.0) * 100, row.label, row.kind)


def heat_maps(comparison: KVComparison) -> list[dict[str, Any]]:
    """Per method: right answers by depth, a column for every setting; the full cache is a method like any other."""
    by_name: dict[str, list[KVArm]] = {}
    for arm in comparison.arms:
        if any(o.depth is not None and o.exact is not None for o in arm.outcomes):
            by_name.setdefault(arm.name, []).append(arm)
    made = []
    for name, arms in by_name.items():
        depths = sorted({o.depth for arm in arms for o in arm.outcomes if o.depth is not None and o.exact is not None})
        lines = [{"depth": depth, "cells": [_cell(arm, depth) for arm in arms]} for depth in depths]
        columns = [arm.label.partition(":")[2] or "default" for arm in arms]
        made.append({"name": name, "columns": columns, "lines": lines})
    return made


def _cell(arm: KVArm, depth: float) -> dict[str, Any]:
    # of several turns only the first asks for the fact at this depth
    right = [o.turns[0] for o in arm.outcomes if o.depth == depth and o.turns]
    return {"value": statistics.fmean(right) if right else 0.0, "right": f"{sum(right):g}", "of": len(right)}


def _layers(arm: KVArm) -> list[float]:
    """Tokens of every layer, on average over prompts."""
    held = [o.layers for o in arm.outcomes if o.layers]
    return [statistics.fmean(column) for column in zip(*held, strict=True)] if held else []


def _bars(arm: KVArm) -> dict[str, Any]:
    tokens = _layers(arm)
    most = max(tokens)
    return {
        "label": arm.label,
        "told": f"{min(tokens):.0f} to {most:.0f} tokens, {statistics.fmean(tokens):.0f} on average",
        "heights": [{"height": 100 * count / most, "tokens": count} for count in tokens],
    }


def _sample(label: str, sample: Sample) -> dict[str, Any]:
    first, last = sample.where or (0, 0)
    tokens = []
    for place, (text, held, packed) in enumerate(zip(sample.tokens, sample.held, sample.packed, strict=True)):
        kinds = ["dropped"] if held + packed < _DROPPED else []
        kinds += ["fact"] if first <= place < last else []
        tokens.append({"text": text, "held": held, "packed": packed, "kind": " ".join(kinds)})
    kept, packed, n = sum(sample.held), sum(sample.packed), len(sample.tokens)
    told = f"{kept / n:.0%} kept as they are, {packed / n:.0%} packed, {max(1 - (kept + packed) / n, 0):.0%} dropped"
    return {"label": label, "task": sample.task, "answer": sample.answer.strip(), "tokens": tokens, "told": told}
