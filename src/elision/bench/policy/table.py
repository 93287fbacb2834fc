"""The table of a comparison on a policy, for the terminal."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from elision.bench.stats import Estimate
from elision.bench.table import fill, optional, size, width_of

if TYPE_CHECKING:
    from elision.bench.policy.summary import PolicyComparison, PolicyRow

_STYLES = {"baseline": "bold", "method": "cyan", "control": "dim", "fewer_steps": "magenta"}
_DISPENSABLE = ("chunk Hz", "control steps", "peak held", "FLOPs", "Δ uncached")


def percent(estimate: Estimate) -> str:
    """A share with the ends of its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.0%}"
    return f"{estimate.mean:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]"


def short(task: str) -> str:
    """The name of a task without its version."""
    return task.removesuffix("-v3")


def cells(row: PolicyRow) -> dict[str, str]:
    """The columns of a row as text; columns that no arm can fill hold a dash."""
    plain = row.kind == "baseline"
    return {
        "": row.label,
        "success": percent(row.success),
        **{short(task): f"{value.mean:.0%}" for task, value in row.tasks.items()},
        "Δ uncached": optional(row.lost, "+.2f"),
        "control steps": "–" if row.control_steps is None else f"{row.control_steps:.0f}",
        "action error": "–" if plain else f"{row.error:.3f}",
        "chunk Hz": "–" if row.hz is None else f"{row.hz:.2f}",
        "control Hz": "–" if row.control_hz is None else f"{row.control_hz:.1f}",
        "speed-up": "–" if row.speedup is None else "1" if plain else f"{row.speedup:.2f}",
        "FLOPs": "–" if row.flops is None else f"{row.flops / 1e9:.3g} G",
        "share": "–" if row.share is None else f"{row.share:.1%}",
        "peak held": "–" if row.bytes_peak == 0 else size(row.bytes_peak),
        "Δ fewer steps": optional(row.lead, "+.2f"),
    }


def comparison_table(comparison: PolicyComparison, width: int | None = None) -> Table:
    """One line per arm; columns that are empty everywhere are left out.

    Args:
        comparison: what to show.
        width: letters that fit on a line; the least important columns go until the others fit.
    """
    rows = comparison.rows()
    texts = [cells(row) for row in rows]
    columns = [name for name in texts[0] if name == "" or any(text[name] != "–" for text in texts)]
    for name in (*_DISPENSABLE, *map(short, comparison.tasks)):
        if width is not None and width_of(columns, texts) > width and name in columns:
            columns.remove(name)
    table = Table(
        title=f"{comparison.model}, {comparison.steps} denoising steps, {len(comparison.seeds)} episodes of each of "
        f"{len(comparison.tasks)} tasks",
        caption="brackets and ±: 95 % confidence intervals, over episodes for success · action error: root mean square "
        f"to the uncached policy for the same observation and noise (other noise: {spread(comparison)}) · Hz: one "
        f"robot, {comparison.chunk} actions per chunk, no simulator · Δ fewer steps: success minus that of DDIM with "
        "as few steps as cost at least as much",
        title_style="bold",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    fill(table, columns, [(row.kind, text, _STYLES[row.kind]) for row, text in zip(rows, texts, strict=True)])
    return table


def spread(comparison: PolicyComparison) -> str:
    """The yardstick of action errors as text."""
    return f"{statistics.fmean(comparison.spread):.3f}"
