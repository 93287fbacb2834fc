"""`elision compare denoise` on a policy: episodes instead of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from elision.cli._common import need, out, print_json, print_table, progress, seeds_of, steps_of, table_width
from elision.errors import OptionError


def policy(
    model: str,
    methods: Sequence[str] | None,
    *,
    steps: str | None,
    seeds: str | None,
    tasks: Sequence[str] | None,
    together: int | None,
    guidance: float | None,
    controls: bool,
    output: Path,
    report: bool,
    as_json: bool,
) -> None:
    """Compare, write the files, print the table."""
    need("scipy", *(("jinja2",) if report else ()), extra="bench")
    from elision.bench.policy.compare import compare_policy
    from elision.bench.policy.report import write_report

    grid = steps_of(steps) or [None]
    if len(grid) != 1:
        raise OptionError(f"steps={steps} names {len(grid)} numbers of steps; a comparison on a policy takes one")
    if guidance is not None:
        raise OptionError(f"guidance={guidance:g} has no meaning for a policy: leave it out")
    with progress(silent=as_json) as move:
        result = compare_policy(
            model,
            methods or "auto",
            steps=grid[0],
            tasks=tasks or (),
            episodes=seeds_of(seeds or "50"),
            together=together,
            controls=controls,
            progress=move,
        )
    path = result.save(output)
    page = write_report(result, path.with_suffix(".html")) if report else None
    if as_json:
        print_json({**result.to_dict(), "files": {"results": str(path), "report": str(page) if page else None}})
        return
    print_table(result.table(table_width()))
    for note in result.notes:
        out.print(f"note: {note}", style="dim", highlight=False, soft_wrap=True)
    out.print(f"results  {path}", highlight=False, soft_wrap=True)
    if page:
        out.print(f"report   {page.resolve()}", highlight=False, soft_wrap=True)
