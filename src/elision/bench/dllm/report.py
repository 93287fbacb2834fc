"""The HTML report of a comparison of methods for masked-diffusion models: one file, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

import elision
from elision.bench.dllm.summary import DllmArm, DllmComparison, DllmRow, Strip
from elision.bench.dllm.table import cells
from elision.bench.environment import environment
from elision.bench.report._page import templates
from elision.bench.report._plot import Frame, Point, scatter
from elision.bench.stats import Estimate

# from "nothing ran" over "some layers" to "every layer"
_RAMP = np.array([[214, 222, 238], [232, 163, 61], [43, 58, 103]])


def write_report(comparison: DllmComparison, path: str | Path) -> Path:
    """Write the report of `comparison` to `path` and return it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(comparison), encoding="utf-8")
    return path


def render(comparison: DllmComparison) -> str:
    """The report as one HTML document."""
    shown = [arm for arm in comparison.arms if arm.strip is not None]
    return (
        templates()
        .get_template("dllm.html")
        .render(
            comparison=comparison,
            sections=[_section(comparison, length) for length in comparison.lengths],
            strips=[_strip(arm.label, arm.kind, arm.strip) for arm in shown if arm.strip is not None],
            about=next((arm.strip for arm in shown), None),
            bars=_bars(shown),
            environment=comparison.environment or environment(),
            version=elision.__version__,
        )
    )


def _section(comparison: DllmComparison, length: int) -> dict[str, Any]:
    rows = comparison.rows(length)
    texts = [cells(row) for row in rows]
    columns = [name for name in texts[0] if name == "" or any(text[name] != "–" for text in texts)]
    return {
        "length": length,
        "questions": len(comparison.arms[0].at(length)),
        "cards": [_card(row) for row in rows if row.kind == "method"],
        "plots": _plots(rows, length),
        "columns": [name or "arm" for name in columns],
        "rows": [
            {"kind": row.kind, "cells": [text[c] for c in columns]} for row, text in zip(rows, texts, strict=True)
        ],
    }


def _card(row: DllmRow) -> dict[str, str]:
    """A method at a glance; the verdict against fewer calls is read off the confidence interval."""
    verdict, word = "even", "not separated from fewer steps"
    if row.lead is not None and row.lead.low is not None and row.lead.high is not None:
        if row.lead.low > 0:
            verdict, word = "better", "better than fewer steps"
        elif row.lead.high < 0:
            verdict, word = "worse", "worse than fewer steps"
    name, _, options = row.label.partition(":")
    quality = row.agree if row.exact is None else row.exact
    return {
        "name": name,
        "options": options.replace(",", ", ") or "default options",
        "speedup": f"{row.speedup.mean:.2f}×",
        "layers": f"{row.layers_ratio:.1f}×",
        "quality": f"{quality.mean:.0%}",
        "measure": "tokens agree" if row.exact is None else "exact match",
        "verdict": verdict,
        "word": word if row.lead is not None else "no control at equal cost",
        "lead": "" if row.lead is None else row.lead.interval("+.2f"),
    }


def _plots(rows: Sequence[DllmRow], length: int) -> list[dict[str, Any]]:
    exact = any(row.exact is not None for row in rows)
    y = "exact match, %" if exact else "tokens as in the uncached run, %"
    kinds: list[tuple[str, str, Callable[[DllmRow], Estimate | float]]] = [
        ("by wall time", "tokens per second, as a factor", lambda row: row.speedup),
        ("by rows computed", "token-layers saved, as a factor", lambda row: row.layers_ratio),
    ]
    made = []
    for place, (title, x, x_of) in enumerate(kinds):
        frame = Frame(x, y, f"Quality against cost at length {length}", y_unit=" %")
        found = [_point(row, x_of(row)) for row in rows if row.kind != "baseline"]
        svg = scatter(found, frame, f"plot-dllm-{length}-{place}")
        if svg:
            made.append({"title": title, "svg": Markup(svg)})
    return made


def _point(row: DllmRow, x: Estimate | float) -> Point:
    y = row.agree if row.exact is None else row.exact
    low, high = (y.mean if end is None else min(max(end, 0.0), 1.0) for end in (y.low, y.high))
    x = x if isinstance(x, Estimate) else Estimate(x, None, None, 1)
    return Point(x.mean, y.mean * 100, low * 100, high * 100, row.label, row.kind, x.low, x.high)


# -- what ran --------------------------------------------------------------------------------------------------------


def _strip(label: str, kind: str, strip: Strip) -> dict[str, Any]:
    positions = np.array(strip.shares())  # [calls, N]
    layers = layer_shares(positions, strip.layers)
    calls, share = len(positions), float(positions.mean())
    told = f"{calls} calls, {share:.1%} of rows and layers"
    return {
        "label": label,
        "kind": kind,
        "told": told,
        "positions": _picture(positions),
        "layers": _picture(layers),
        "alt": f"{label}: {told}",
        "prompt": f"{100 * strip.prompt / positions.shape[1]:.1f}",
    }


def layer_shares(positions: npt.NDArray[np.float64], layers: int) -> npt.NDArray[np.float64]:
    """[calls, L] share of the positions that every layer took.

    A position that is not in the query of a call goes through the upper layers alone, so the number of its layers says
    which.
    """
    above = np.arange(layers, 0, -1) / layers  # layer l is reached by those that go through at least L − l
    return np.asarray((positions[:, None, :] >= above[:, None] - 0.5 / layers).mean(axis=-1))


def _picture(shares: npt.NDArray[np.float64]) -> str:
    """A pixel per number as a data URI."""
    place = shares * (len(_RAMP) - 1)
    channels = [np.interp(place, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)]
    stream = io.BytesIO()
    Image.fromarray(np.stack(channels, -1).round().astype(np.uint8)).save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _bars(arms: Sequence[DllmArm]) -> list[dict[str, Any]]:
    """Drift of the true keys and values in the uncached run, and the error of what every arm held."""
    found: list[tuple[str, list[float]]] = []
    for arm in arms:
        assert arm.strip is not None
        if arm.kind == "baseline":
            found.append(("true K and V of decided tokens, change from call to call", arm.strip.drift))
        elif arm.strip.stale:
            found.append((f"{arm.label}, error of what is held", arm.strip.stale))
    most = max((max(values) for _, values in found), default=0.0) or 1.0
    return [
        {
            "label": label,
            "told": f"{min(values):.3f} to {max(values):.3f}, {statistics.fmean(values):.3f} on average",
            "heights": [{"height": 100 * value / most, "value": value} for value in values],
        }
        for label, values in found
    ]
