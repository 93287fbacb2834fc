"""`elision compare dllm`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from elision.cli._common import (
    JsonFlag,
    need,
    out,
    print_json,
    print_table,
    progress,
    seeds_of,
    steps_of,
    table_width,
)


def dllm(
    model: Annotated[
        str, typer.Option(help="Zoo name, hub id or local path of a masked-diffusion language model.")
    ] = "digits-mdlm",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help='Methods with options, as in "dkv_cache:interval=4,elastic_cache_dllm:gamma=0.7"; repeatable.'
        ),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help='Tasks, as in "chain,recall"; by default sums and recall.')] = None,
    questions: Annotated[
        str | None, typer.Option(help='How many questions per task and length ("5"), or which seeds ("3,7").')
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer together.")] = "64,256,512",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to continue, for models that are not of the zoo; repeatable.")
    ] = None,
    controls: Annotated[bool, typer.Option(help="Add controls, and fewer calls at equal cost.")] = True,
    output: Annotated[Path | None, typer.Option("--out", "--output", "-o", help="Result file (.jsonl).")] = None,
    report: Annotated[bool, typer.Option(help="Also write the HTML report beside the result file.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Compare methods for masked-diffusion models: exact match, tokens per second and rows, each beside no cache."""
    need("scipy", *(("jinja2",) if report else ()), extra="bench")
    need("transformers", extra="transformers")
    from elision.bench.dllm.compare import compare_dllm
    from elision.bench.dllm.report import write_report

    with progress(silent=as_json) as move:
        result = compare_dllm(
            model,
            methods or "auto",
            tasks=tasks,
            questions=None if questions is None else seeds_of(questions),
            lengths=steps_of(lengths) or [],
            prompts=prompt,
            controls=controls,
            progress=move,
        )
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = result.save(output or Path("results") / f"compare-dllm-{result.model.replace('/', '-')}-{now}.jsonl")
    page = write_report(result, path.with_suffix(".html")) if report else None
    if as_json:
        print_json({**result.to_dict(), "files": {"results": str(path), "report": str(page) if page else None}})
        return
    for length in result.lengths:
        print_table(result.table(length, table_width()))
    for note in result.notes:
        out.print(f"note: {note}", style="dim", highlight=False, soft_wrap=True)
    out.print(f"results  {path}", highlight=False, soft_wrap=True)
    if page:
        out.print(f"report   {page.resolve()}", highlight=False, soft_wrap=True)
