"""`elision demo`: images and answers, with and without caches, on models that need no hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elision.cli._common import JsonFlag, need_bench, out, print_table, progress, seeds_of
from elision.cli._compare import RESULTS, publish
from elision.errors import MissingDependency

if TYPE_CHECKING:
    from elision.bench.kv.demo import Answer


def demo(
    output: Annotated[Path | None, typer.Option("--out", "--output", "-o", help="Result file (.jsonl).")] = None,
    seeds: Annotated[str, typer.Option(help="How many seeds.")] = "3",
    as_json: JsonFlag = False,
) -> None:
    """Ask SmolLM2 about a long text over compressed caches, and draw with cached denoisers; about two minutes."""
    need_bench(report=True)
    from elision.bench.compare import compare_denoise

    found, why = _answers(as_json)
    with progress(silent=as_json) as move:
        result = compare_denoise("garments-flux", "auto", seeds=seeds_of(seeds), progress=move)
    if as_json:
        more = {"answers": [dataclasses.asdict(answer) for answer in found], "answers_missing": why}
        publish(result, output or RESULTS / "demo.jsonl", True, True, more=more)
        return
    if why:
        out.print(f"note: no language model was asked: {why}", style="dim", highlight=False, soft_wrap=True)
    else:
        _print(found)
    publish(result, output or RESULTS / "demo.jsonl", True, False)


def _answers(silent: bool) -> tuple[list[Answer], str]:
    """The language half, and why there is none, if so."""
    try:
        from elision.bench.kv.demo import METHODS, ask
        from elision.bench.kv.subject import load_language

        with progress(silent=silent) as move:
            steps = len(METHODS) + 2
            move(0, steps, "loading SmolLM2")
            subject = load_language("smollm2")
            place = [0]

            def told(what: str) -> None:
                place[0] += 1
                move(place[0], steps, f"asking SmolLM2, {what}")

            return ask(subject, told=told), ""
    except MissingDependency as error:
        return [], str(error)
    except ModuleNotFoundError as error:
        return [], f"{error.name} is not installed: pip install 'elision[demo]'"


def _print(answers: list[Answer]) -> None:
    from rich.table import Table

    from elision.bench.kv.demo import QUESTION
    from elision.bench.table import size

    table: Any = Table(
        title=f"SmolLM2, asked after a text of {answers[0].tokens} tokens: {QUESTION}",
        title_style="bold",
        caption="bytes of keys and values after the answer",
        caption_style="dim",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for name in ("cache", "answer", "bytes", "share", "seconds"):
        table.add_column(name, justify="left" if name in ("cache", "answer") else "right", no_wrap=name != "answer")
    for answer in answers:
        share = answer.bytes_held / answer.bytes_full
        style = "bold" if answer is answers[0] else "cyan"
        cells = (answer.label, answer.text, size(answer.bytes_held), f"{share:.1%}", f"{answer.seconds:.1f}")
        table.add_row(*cells, style=style)
    print_table(table)
    out.print()
