"""Fills the template."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import elision
from elision.bench.environment import environment
from elision.bench.report._grid import grid
from elision.bench.report._images import AMPLIFY
from elision.bench.report._plot import Frame, points, scatter
from elision.bench.summary import Arm, Comparison, Row
from elision.bench.table import cells

KINDS = {
    "baseline": "uncached",
    "method": "method",
    "control": "baseline or control",
    "fewer_steps": "plain, fewer steps",
}
STATES = {
    "computed": "everything ran",
    "reused": "kept outputs stood in",
    "predicted": "forecasts stood in",
    "mixed": "some sites or tokens ran, some did not",
}


def write_report(comparison: Comparison, path: str | Path) -> Path:
    """Write the report of `comparison` to `path` and return it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(comparison), encoding="utf-8")
    return path


def render(comparison: Comparison) -> str:
    """The report as one HTML document."""
    return (
        templates()
        .get_template("report.html")
        .render(
            comparison=comparison,
            sections=[_section(comparison, steps) for steps in comparison.steps],
            environment=comparison.environment or environment(),
            amplify=AMPLIFY,
            scores=list(comparison.arms[0].samples[0].scores),
            states=STATES,
            kinds=KINDS,
            version=elision.__version__,
        )
    )


def templates() -> Environment:
    """The templates of reports."""
    jinja = Environment(
        loader=PackageLoader("elision.bench", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["breakable"] = breakable
    return jinja


def breakable(label: str) -> Markup:
    """A label that may break after its colon and commas, and nowhere else."""
    return Markup("").join(
        Markup("{}<wbr>" if part in ":," else "{}").format(part) for part in re.split("([:,])", label)
    )


def _section(comparison: Comparison, steps: int) -> dict[str, Any]:
    arms = comparison.at(steps)
    rows = [row for row in comparison.rows() if row.steps == steps]
    by_time = points(rows, lambda row: row.speedup)
    by_cost = points(rows, lambda row: row.flops_ratio)
    plots = [
        ("by wall time", scatter(by_time, Frame("speed-up, wall time of the whole pipeline"), f"plot-time-{steps}")),
        ("by operations", scatter(by_cost, Frame("denoiser FLOPs saved, as a factor"), f"plot-flops-{steps}")),
    ]
    return {
        "steps": steps,
        "cards": [_card(row) for row in rows if row.kind == "method"],
        "plots": [{"title": title, "svg": Markup(svg)} for title, svg in plots if svg],
        "grid": grid(comparison, arms),
        "strips": [_strip(arm) for arm in arms if arm.kind != "fewer_steps"],
        **_table(rows),
        "notes": [(row.label, note) for row in rows for note in row.notes],
    }


def _card(row: Row) -> dict[str, str]:
    """A method at a glance; the verdict against fewer steps is read off the confidence interval."""
    gain = row.psnr_gain
    verdict, word = "even", "not separated from fewer steps"
    if gain is not None and gain.low is not None and gain.high is not None:
        if gain.low > 0:
            verdict, word = "better", "better than fewer steps"
        elif gain.high < 0:
            verdict, word = "worse", "worse than fewer steps"
    name, _, options = row.label.partition(":")
    return {
        "name": name,
        "options": options.replace(",", ", ") or "default options",
        "speedup": f"{row.speedup.mean:.2f}×",
        "psnr": "identical" if row.psnr.mean > 99 else f"{row.psnr.mean:.1f} dB",
        "steps": f"{row.steps_computed:.3g} of {row.steps}",
        "gain": "–" if gain is None else f"{gain.interval('+.1f')} dB",
        "verdict": verdict,
        "word": word,
    }


def _strip(arm: Arm) -> dict[str, Any]:
    states = arm.samples[0].states
    counts = Counter(states)
    told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return {"label": arm.label, "kind": arm.kind, "states": states, "told": told, "alt": f"{arm.label}: {told}"}


def _table(rows: list[Row]) -> dict[str, Any]:
    texts = [cells(row) for row in rows]
    columns = [name for name in texts[0] if name == "" or any(text[name] != "–" for text in texts)]
    return {
        "columns": [name or "arm" for name in columns],
        "rows": [
            {"kind": row.kind, "cells": [text[c] for c in columns]} for row, text in zip(rows, texts, strict=True)
        ],
    }
