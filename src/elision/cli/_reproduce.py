"""`elision reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elision.cli._common import JsonFlag, need_bench, out, print_json, print_table, progress, seeds_of, steps_of


def reproduce(
    names: Annotated[list[str], typer.Argument(help="Methods whose claims are tested, or `all`.")],
    model: Annotated[
        str | None,
        typer.Option(help="Zoo name, hub id or local path; by default the one that each claim is written for."),
    ] = None,
    family: Annotated[str | None, typer.Option(help="Only methods of this family.")] = None,
    steps: Annotated[str | None, typer.Option(help="Numbers of steps to test at; by default the model's own.")] = None,
    seeds: Annotated[str, typer.Option(help='How many seeds ("6"), or which ("3,7").')] = "6",
    prompts: Annotated[
        str | None, typer.Option(help="Prompts per task, for methods on language models; by default 12 or 6.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt for K/V methods (320), of prompt and answer for dllm methods (128)."),
    ] = None,
    episodes: Annotated[str, typer.Option(help="Episodes of every task of a policy.")] = "50",
    output: Annotated[Path | None, typer.Option("--out", "--output", "-o", help="Result file (.jsonl).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Test what papers claim of their methods, at our scale: paper's figure, ours, verdict.

    A claim that does not hold is a result: the exit code is 0.
    """
    need_bench()
    from elision.bench.reproduce import run_claims

    with progress(silent=as_json) as move:
        result = run_claims(
            names,
            model=model,
            family=family,
            steps=steps_of(steps),
            seeds=seeds_of(seeds),
            prompts=None if prompts is None else seeds_of(prompts),
            length=length,
            episodes=seeds_of(episodes),
            progress=move,
        )
    path = result.save(output or Path("results") / f"reproduce-{'-'.join(result.names)}.jsonl")
    if as_json:
        print_json({**result.to_dict(), "files": {"results": str(path)}})
        return
    print_table(result.table())
    out.print(f"results  {path}", highlight=False, soft_wrap=True)
