"""The HTML report of a comparison on a policy: one file, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

import elision
from elision.bench.environment import environment
from elision.bench.policy.summary import PolicyArm, PolicyComparison, PolicyRow
from elision.bench.policy.table import cells, percent, short, spread
from elision.bench.report._page import templates
from elision.bench.report._plot import Frame, Point, scatter
from elision.bench.stats import Estimate


def write_report(comparison: PolicyComparison, path: str | Path) -> Path:
    """Write the report of `comparison` to `path` and return it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(comparison), encoding="utf-8")
    return path


def render(comparison: PolicyComparison) -> str:
    """The report as one HTML document."""
    rows = comparison.rows()
    texts = [cells(row) for row in rows]
    columns = [name for name in texts[0] if name == "" or any(text[name] != "–" for text in texts)]
    return (
        templates()
        .get_template("policy.html")
        .render(
            comparison=comparison,
            tasks=[short(task) for task in comparison.tasks],
            cards=[_card(row) for row in rows if row.kind == "method"],
            plots=_plots(rows),
            columns=[name or "arm" for name in columns],
            rows=[
                {"kind": row.kind, "cells": [text[c] for c in columns]} for row, text in zip(rows, texts, strict=True)
            ],
            played=[_played(comparison, arm) for arm in comparison.arms],
            spread=spread(comparison),
            environment=comparison.environment or environment(),
            version=elision.__version__,
        )
    )


def _card(row: PolicyRow) -> dict[str, str]:
    """A method at a glance; the verdict against fewer steps is read off the confidence interval."""
    verdict, word = "even", "not separated from fewer steps"
    if row.lead is not None and row.lead.low is not None and row.lead.high is not None:
        if row.lead.low > 0:
            verdict, word = "better", "better than fewer steps"
        elif row.lead.high < 0:
            verdict, word = "worse", "worse than fewer steps"
    name, _, options = row.label.partition(":")
    return {
        "name": name,
        "options": options.replace(",", ", ") or "default options",
        "success": percent(row.success).split(" ")[0],
        "speedup": "–" if row.speedup is None else f"{row.speedup.mean:.2f}×",
        "hz": "–" if row.control_hz is None else f"{row.control_hz:.0f}",
        "share": "–" if row.share is None else f"{row.share:.0%}",
        "verdict": verdict,
        "word": word if row.lead is not None else "no control at equal cost",
        "lead": "" if row.lead is None else row.lead.interval("+.2f"),
    }


def _plots(rows: Sequence[PolicyRow]) -> list[dict[str, Any]]:
    kinds: list[tuple[str, str, Callable[[PolicyRow], Estimate | float | None]]] = [
        ("by wall time", "chunks per second, as a factor", lambda row: row.speedup),
        ("by operations", "denoiser FLOPs saved, as a factor", lambda row: 1 / row.share if row.share else None),
    ]
    made = []
    for place, (title, x, x_of) in enumerate(kinds):
        frame = Frame(x, "success, %", "Success against cost", y_unit=" %")
        found = [point for row in rows if row.kind != "baseline" for point in _point(row, x_of(row))]
        svg = scatter(found, frame, f"plot-policy-{place}")
        if svg:
            made.append({"title": title, "svg": Markup(svg)})
    return made


def _point(row: PolicyRow, x: Estimate | float | None) -> list[Point]:
    if x is None:
        return []
    y = row.success
    low, high = (y.mean if end is None else end for end in (y.low, y.high))
    x = x if isinstance(x, Estimate) else Estimate(x, None, None, 1)
    # one line for one sampler: the policy's own with fewer steps stands beside it
    kind = "control" if row.kind == "fewer_steps" and row.label.startswith("ddpm") else row.kind
    return [Point(x.mean, y.mean * 100, low * 100, high * 100, row.label, kind, x.low, x.high)]


def _played(comparison: PolicyComparison, arm: PolicyArm) -> dict[str, Any]:
    """Every episode of an arm, task by task."""
    groups = [[e for e in arm.episodes if e.task == task] for task in comparison.tasks]
    return {
        "label": arm.label,
        "kind": arm.kind,
        "told": f"{sum(e.solved for e in arm.episodes)} of {len(arm.episodes)} solved",
        "groups": [{"task": short(task), "episodes": g} for task, g in zip(comparison.tasks, groups, strict=True)],
    }
