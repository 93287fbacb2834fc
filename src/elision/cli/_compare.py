"""`elision compare denoise`, `elision compare kv`, `elision compare serving`."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elision.cli._common import (
    Group,
    JsonFlag,
    need,
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
    from elision.bench.policy.summary import PolicyComparison
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
        typer.Option(
            help='Methods with options, as in "taylorseer:interval=4,easycache:threshold=0.1", or caches of other '
            'libraries, as in "diffusers:pab,range=2"; repeatable.'
        ),
    ] = None,
    steps: Annotated[str | None, typer.Option(help='One or more numbers of steps, as in "28,50".')] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help='How many seeds ("5"), or which ("3,7"); of a policy, episodes per task (50 by default).'),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt, or of a policy a task; repeat for several.")
    ] = None,
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
    from elision.bench.policy.summary import PolicyComparison

    result: Any  # of policies another kind
    with progress(silent=as_json) as move:
        result = compare_denoise(
            model,
            methods or "auto",
            steps=steps_of(steps),
            seeds=None if seeds is None else seeds_of(seeds),
            prompts=prompt,
            batch=batch,
            guidance=guidance,
            controls=controls,
            progress=move,
        )
    path = output or _default(result.model)
    if isinstance(result, PolicyComparison):
        publish_policy(result, path, report, as_json)
    else:
        publish(result, path, report, as_json)


def publish_policy(result: PolicyComparison, path: Path, report: bool, as_json: bool) -> None:
    """Write the files, print the table."""
    result.save(path)
    page: Path | None = None
    if report:
        from elision.bench.policy.report import write_report

        page = write_report(result, path.with_suffix(".html"))
    if as_json:
        print_json({**result.to_dict(), "files": {"results": str(path), "report": str(page) if page else None}})
        return
    print_table(result.table(table_width()))
    _say(result.notes, path, page)


@app.command("kv")
def kv(
    model: Annotated[str, typer.Option(help="Zoo name, hub id or local path of a causal language model.")] = "smollm2",
    methods: Annotated[
        list[str] | None,
        typer.Option(help='Methods with options, as in "cake:budget=0.25,zipcache,h2o:budget=128"; repeatable.'),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help='Tasks, as in "needle,continuation"; by default all.')] = None,
    prompts: Annotated[str, typer.Option(help='How many prompts per task ("5"), or which seeds ("3,7").')] = "5",
    length: Annotated[int, typer.Option(min=96, help="Tokens of every prompt.")] = 384,
    controls: Annotated[bool, typer.Option(help="Add window, random and transformers' other caches.")] = True,
    timing: Annotated[int, typer.Option(min=0, help="Rounds of the timing; 0 leaves it out.")] = 3,
    harness: Annotated[
        str | None, typer.Option(help='Also run these tasks of the package lm-eval, as in "niah_single_1,wikitext".')
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of every task of lm-eval.")] = None,
    output: Annotated[Path | None, typer.Option("--out", "--output", "-o", help="Result file (.jsonl).")] = None,
    report: Annotated[bool, typer.Option(help="Also write the HTML report beside the result file.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Compare K/V cache methods: quality, bytes and speed, each beside the full cache and transformers' own ones."""
    need("scipy", *(("jinja2",) if report else ()), extra="bench")
    need("transformers", extra="transformers")
    from elision.bench.kv.compare import compare_kv
    from elision.bench.kv.report import write_report
    from elision.bench.kv.subject import load_language

    if harness:
        need("lm_eval", extra="transformers' plus the package lm-eval")
    with progress(silent=as_json) as move:
        move(0, 1, f"loading {model}")
        subject = load_language(model)
        result = compare_kv(
            subject,
            methods or "auto",
            tasks=tasks,
            prompts=seeds_of(prompts),
            length=length,
            controls=controls,
            timing=timing,
            progress=move,
        )
    path = result.save(output or _default(f"kv-{result.model}"))
    page = write_report(result, path.with_suffix(".html")) if report else None
    found: dict[str, Any] = {}
    if harness:
        from elision.bench.kv.harness import evaluate

        found = evaluate(subject, methods or "auto", harness.split(","), limit=limit)
    if as_json:
        files = {"results": str(path), "report": str(page) if page else None}
        print_json({**result.to_dict(), "harness": found, "files": files})
        return
    print_table(result.table(table_width()))
    _say(result.notes, path, page)
    for label, scores in found.items():
        out.print(f"lm-eval  {label}: {scores}", highlight=False, soft_wrap=True)


def _default(model: str) -> Path:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return RESULTS / f"compare-{model.replace('/', '-')}-{now}.jsonl"


def publish(result: Comparison, path: Path, report: bool, as_json: bool, more: Mapping[str, Any] | None = None) -> None:
    """Write the files, print the table; `more` goes into the JSON."""
    result.save(path)
    page: Path | None = None
    if report:
        from elision.bench.report import write_report

        page = write_report(result, path.with_suffix(".html"))
    if as_json:
        files = {"results": str(path), "report": str(page) if page else None}
        print_json({**result.to_dict(), **(more or {}), "files": files})
        return
    for steps in result.steps:
        print_table(result.table(steps, table_width()))
    _say(result.notes, path, page)


def _say(notes: Iterable[str], path: Path, page: Path | None) -> None:
    for note in notes:
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
