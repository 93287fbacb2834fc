"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from elision.bench.stats import Estimate
    from elision.bench.summary import Comparison, Row

_STYLES = {"baseline": "bold", "method": "cyan", "control": "dim", "fewer_steps": "magenta"}


def size(number: float) -> str:
    """Bytes in words: `1.4 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def optional(estimate: Estimate | None, spec: str) -> str:
    """An estimate as text, a dash where there is none."""
    return "–" if estimate is None else format(estimate, spec)


def cells(row: Row) -> dict[str, str]:
    """The columns of a row as text; columns that no arm can fill hold a dash."""
    plain = row.kind == "baseline"
    return {
        "": row.label,
        "seconds": f"{row.seconds:.2f}",
        "speed-up": "1" if plain else f"{row.speedup:.2f}",
        "steps": f"{row.steps_computed:.3g}",
        "calls": "–" if row.calls is None else f"{row.calls:.3g}",
        "FLOPs": "–" if row.flops_ratio is None else f"1/{row.flops_ratio:.2f}",
        "peak held": "–" if row.bytes_peak == 0 else size(row.bytes_peak),
        "PSNR dB": "–" if plain else f"{row.psnr:.1f}",
        "SSIM": "–" if plain else f"{row.ssim:.3f}",
        "LPIPS": "–" if plain else optional(row.lpips, ".3f"),
        "distance": "–" if plain else optional(row.distance, ".3g"),
        "to real": optional(row.distance_real, ".3g"),
        **{name: format(value, ".2f" if abs(value.mean) <= 1 else ".1f") for name, value in row.scores.items()},
        "Δ fewer steps": optional(row.psnr_gain, "+.1f"),
    }


def comparison_table(comparison: Comparison, steps: int, width: int | None = None) -> Table:
    """The rows at one number of steps; columns that are empty everywhere are left out.

    Args:
        comparison: what to show.
        steps: which of its numbers of steps.
        width: letters that fit on a line; the least important columns go until the others fit.
    """
    rows = [row for row in comparison.rows() if row.steps == steps]
    texts = [cells(row) for row in rows]
    columns = [name for name in texts[0] if name == "" or any(text[name] != "–" for text in texts)]
    for name in _DISPENSABLE:
        if width is not None and width_of(columns, texts) > width and name in columns:
            columns.remove(name)
    table = Table(
        title=f"{comparison.model}, {steps} steps, {comparison.samples} from {len(comparison.seeds)} seeds",
        caption="± is half of a 95 % confidence interval over seeds · PSNR, SSIM and distance are against the uncached "
        "run from the same noise · Δ is PSNR minus that of plain sampling with as many steps as were computed",
        title_style="bold",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    fill(table, columns, [(row.kind, text, _STYLES[row.kind]) for row, text in zip(rows, texts, strict=True)])
    return table


_DISPENSABLE = ("calls", "to real", "seconds", "SSIM", "distance", "peak held", "LPIPS", "FLOPs")


def width_of(columns: list[str], texts: list[dict[str, str]]) -> int:
    """Letters of a line: every column as wide as its longest cell, with padding, dividers and both edges."""
    return sum(max(len(name), *(len(text[name]) for text in texts)) + 3 for name in columns) + 1


def fill(table: Table, columns: Sequence[str], lines: Iterable[tuple[str, Mapping[str, str], str]]) -> None:
    """Add the columns, the first of them without a name, and the lines: kind, cells and style; kinds are set apart."""
    for name in columns:
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=name != "", overflow="fold")
    last = ""
    for kind, text, style in lines:
        if last not in ("", kind):
            table.add_section()
        last = kind
        table.add_row(*(text[name] for name in columns), style=style)
