"""The table of a KV comparison for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from elision.bench.table import fill, optional, size, width_of

if TYPE_CHECKING:
    from elision.bench.kv.summary import KVComparison, KVRow

_STYLES = {"full": "bold", "method": "cyan", "control": "dim", "cache": "magenta"}
_DISPENSABLE = ("peak", "agree", "prefill s", "× decode", "× prefill", "held", "KL")


def cells(row: KVRow, tasks: list[str]) -> dict[str, str]:
    """The columns of a row as text; columns that no arm can fill hold a dash."""
    plain = row.kind == "full"
    scores = {task: optional(row.scores.get(task), ".3g") for task in tasks}
    return {
        "": row.label,
        "share": "–" if row.share is None else f"{row.share.mean:.1%}",
        "held": "–" if row.bytes_held is None else size(row.bytes_held),
        "peak": "–" if row.bytes_peak is None else size(row.bytes_peak),
        **scores,
        "Δ nats": "–" if plain else optional(row.nll, "+.3f"),
        "KL": "–" if plain else optional(row.kl, ".3f"),
        "agree": "–" if plain or row.agree is None else f"{row.agree.mean:.1%}",
        "prefill s": "–" if row.prefill is None else f"{row.prefill:.2f}",
        "× prefill": "–" if plain else optional(row.prefill_ratio, ".2f"),
        "ms/token": "–" if row.decode is None else f"{row.decode:.1f}",
        "× decode": "–" if plain else optional(row.decode_ratio, ".2f"),
    }


def comparison_table(comparison: KVComparison, width: int | None = None) -> Table:
    """The rows of measured arms; columns that are empty everywhere are left out.

    Args:
        comparison: what to show.
        width: letters that fit on a line; the least important columns go until the others fit.
    """
    rows = [row for row in comparison.rows() if row.share is not None]
    texts = [cells(row, comparison.tasks) for row in rows]
    columns = [name for name in texts[0] if name == "" or any(text[name] != "–" for text in texts)]
    for name in _DISPENSABLE:
        if width is not None and width_of(columns, texts) > width and name in columns:
            columns.remove(name)
    table = Table(
        title=f"{comparison.model}, prompts of {comparison.length} tokens, {len(comparison.seeds)} per task",
        caption="± is half of a 95 % confidence interval over prompts · tasks: share of right answers; continuation: "
        "perplexity of what the full cache says · Δ nats: answer tokens' negative log-likelihood minus the full "
        "cache's · share, held, peak: bytes of tensors per prompt",
        title_style="bold",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    fill(table, columns, [(row.kind, text, _STYLES[row.kind]) for row, text in zip(rows, texts, strict=True)])
    return table
