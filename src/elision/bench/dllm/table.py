"""The tables of a comparison of methods for masked-diffusion models, for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from elision.bench.table import fill, optional, size, width_of

if TYPE_CHECKING:
    from elision.bench.dllm.summary import DllmComparison, DllmRow

_STYLES = {"baseline": "bold", "method": "cyan", "control": "dim", "fewer_steps": "magenta"}
_DISPENSABLE = ("full", "characters", "FLOPs", "peak held", "agree")


def cells(row: DllmRow) -> dict[str, str]:
    """The columns of a row as text; columns that no arm can fill hold a dash."""
    plain = row.kind == "baseline"
    exact = "–" if row.exact is None else f"{row.exact.mean:.0%}"
    if row.exact is not None and row.exact.low is not None and row.exact.high is not None:
        exact += f" [{row.exact.low:.0%}, {row.exact.high:.0%}]"
    return {
        "": row.label,
        "exact match": exact,
        **{task: f"{value.mean:.0%}" for task, value in row.tasks.items()},
        "characters": "–" if row.right is None else f"{row.right.mean:.1%}",
        "agree": "–" if plain else f"{row.agree.mean:.1%}",
        "tokens/s": f"{row.speed:.1f}",
        "speed-up": "1" if plain else optional(row.speedup, ".2f"),
        "calls": f"{row.calls:.3g}",
        "full": f"{row.full_calls:.3g}",
        "token-layers": f"{row.token_layers:,.0f}",
        "× fewer": "1" if plain else f"{row.layers_ratio:.2f}",
        "FLOPs": f"{row.flops / 1e9:.3g} G",
        "peak held": "–" if row.bytes_peak == 0 else size(row.bytes_peak),
        "Δ fewer steps": optional(row.lead, "+.2f"),
    }


def comparison_table(comparison: DllmComparison, length: int, width: int | None = None) -> Table:
    """The rows at one length; columns that are empty everywhere are left out.

    Args:
        comparison: what to show.
        length: which of its lengths.
        width: letters that fit on a line; the least important columns go until the others fit.
    """
    rows = comparison.rows(length)
    texts = [cells(row) for row in rows]
    columns = [name for name in texts[0] if name == "" or any(text[name] != "–" for text in texts)]
    for name in (*_DISPENSABLE, *comparison.tasks):
        if width is not None and width_of(columns, texts) > width and name in columns:
            columns.remove(name)
    count = len(comparison.seeds[length])
    table = Table(
        title=f"{comparison.model}, prompt and answer of {length} tokens, {count} questions per task",
        caption="brackets and ±: 95 % confidence intervals over questions · speed-up: tokens per second, one question "
        "at a time, over the uncached run's · token-layers: rows that went through a layer · Δ: exact match minus that "
        "of plain decoding with as few calls as cost at least as much",
        title_style="bold",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    fill(table, columns, [(row.kind, text, _STYLES[row.kind]) for row, text in zip(rows, texts, strict=True)])
    return table
