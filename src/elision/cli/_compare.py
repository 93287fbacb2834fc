"""`elision compare denoise` and `elision demo`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elision.cli._common import (
    Group,
    JsonFlag,
    need_bench,
    out,
    print_json,
    print_table,
    progress,
    seeds_of,
    steps_of,
    table_width,
)
from elision.errors import MissingDependency

if TYPE_CHECKING:
    from elision.bench.summary import Comparison

app = typer.Typer(cls=Group, no_args_is_help=True, help="Compare methods with their baselines and controls.")
RESULTS = Path("results")


@app.callback()
def _family() -> None:
    """Compare methods with their baselines and controls, interleaved in one process."""


@app.command("denoise")
def denoise(
    model: Annotated[str, typer.Option(help="Zoo name, hub id or local path of a pipeline.")] = "garments-flux",
    methods: Annotated[
        list[str] | None,
        typer.Option(help='Methods with options, as in "taylorseer:interval=4,easycache:threshold=0.1"; repeatable.'),
    ] = None,
    steps: Annotated[str | None, typer.Option(help='One or more numbers of steps, as in "28,50".')] = None,
    seeds: Annotated[str, typer.Option(help='How many seeds ("5"), or which ("3,7").')] = "5",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeat for a batch.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per run.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    controls: Annotated[bool, typer.Option(help="Add uniform, random and stale reuse at matched cost.")] = True,
    output: Annotated[Path | None, typer.Option("--out", "--output", "-o", help="Result file (.jsonl).")] = None,
    report: Annotated[bool, typer.Option(help="Also write the HTML report beside the result file.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Compare denoise methods: quality, speed, cost and memory, each beside the uncached run and fewer steps."""
    need_bench(report)
    from elision.bench.compare import compare_denoise

    with progress(silent=as_json) as move:
        result = compare_denoise(
            model,
            methods or "auto",
            steps=steps_of(steps),
            seeds=seeds_of(seeds),
            prompts=prompt,
            batch=batch,
            guidance=guidance,
            controls=controls,
            progress=move,
        )
    _publish(result, output or _default(result.model), report, as_json)


def demo(
    output: Annotated[Path | None, typer.Option("--out", "--output", "-o", help="Result file (.jsonl).")] = None,
    seeds: Annotated[str, typer.Option(help="How many seeds.")] = "3",
    as_json: JsonFlag = False,
) -> None:
    """Compare the default methods on the small garment model that ships with the library; under two minutes."""
    need_bench(report=True)
    from elision.bench.compare import compare_denoise

    with progress(silent=as_json) as move:
        result = compare_denoise("garments-flux", "auto", seeds=seeds_of(seeds), progress=move)
    _publish(result, output or RESULTS / "demo.jsonl", True, as_json)


def _default(model: str) -> Path:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return RESULTS / f"compare-{model.replace('/', '-')}-{now}.jsonl"


def _publish(result: Comparison, path: Path, report: bool, as_json: bool) -> None:
    """Write the files, print the table."""
    result.save(path)
    page: Path | None = None
    if report:
        from elision.bench.report import write_report

        page = write_report(result, path.with_suffix(".html"))
    if as_json:
        files = {"results": str(path), "report": str(page) if page else None}
        print_json({**result.to_dict(), "files": files})
        return
    for steps in result.steps:
        print_table(result.table(steps, table_width()))
    for note in result.notes:
        out.print(f"note: {note}", style="dim", highlight=False, soft_wrap=True)
    out.print(f"results  {path}", highlight=False, soft_wrap=True)
    if page:
        out.print(f"report   {page.resolve()}", highlight=False, soft_wrap=True)


@app.command("serving")
def serving(
    workload: Annotated[list[str] | None, typer.Option(help='"text" or "vectors"; by default both.')] = None,
    count: Annotated[int, typer.Option(min=1, help="Requests per workload.")] = 5000,
    seed: Annotated[int, typer.Option(help="Seed of the workloads; thresholds are fitted on another one.")] = 0,
    gptcache_python: Annotated[
        Path | None, typer.Option(help="An interpreter with gptcache==0.1.44; without one GPTCache is left out.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--out", "--output", "-o", help="Result file (.jsonl).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare the semantic cache with every single global threshold, with GPTCache and with no cache."""
    try:
        from elision.serving.bench.compare import compare
    except ModuleNotFoundError as error:
        raise MissingDependency(f"{error.name} is not installed: pip install 'elision[serve]'") from error
    compare(
        workload or ("text", "vectors"),
        count=count,
        seed=seed,
        gptcache_python=gptcache_python,
        out=output,
        as_json=as_json,
        console=out,
    )
