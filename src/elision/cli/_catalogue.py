"""`elision methods`, `elision show`, `elision fit`: what there is, and its offline part."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from elision.cli._common import JsonFlag, need_bench, out, print_json, print_table, progress


def methods(
    family: Annotated[str | None, typer.Option(help="Only methods of this family.")] = None, as_json: JsonFlag = False
) -> None:
    """List every method."""
    import elision
    from elision.errors import UnknownName
    from elision.method import FAMILIES

    if family is not None and family not in FAMILIES:
        raise UnknownName.of("family", family, FAMILIES)
    rows = elision.methods(family)
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("method", "family", "what it does", "published"):
        table.add_column(column)
    for row in sorted(rows, key=lambda r: (r.family, r.control, r.name)):
        venue = row.paper.venue if row.paper else "–"
        table.add_row(row.name, row.family, row.description, venue, style="dim" if row.control else "")
    print_table(table)
    out.print("Dim rows are baselines and controls. `elision show NAME` tells options and paper.", style="dim")


def _options(cls: Any) -> list[dict[str, Any]]:
    from elision.method import describe_range

    return [
        {
            "option": field.name,
            "default": field.default,
            "type": str(field.type),
            "range": describe_range(field),
            "meaning": field.metadata.get("doc", ""),
        }
        for field in cls.options().values()
    ]


def show(
    name: Annotated[str, typer.Argument(help="Name of a method, see `elision methods`.")], as_json: JsonFlag = False
) -> None:
    """Show one method: what it does, its options with their ranges, its paper, what it can be applied to."""
    from elision.method import find, info

    cls = find(name)
    row, text = info(cls), inspect.getdoc(inspect.getmodule(cls)) or inspect.getdoc(cls) or ""
    if as_json:
        print_json({**dataclasses.asdict(row), "options": _options(cls), "documentation": text})
        return
    from rich.markup import escape
    from rich.table import Table

    out.print(f"[bold]{row.name}[/]  {escape(row.description)}\n")
    out.print(escape(text), highlight=False, style="dim")
    table = Table(title="options", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("option", "default", "range", "meaning"):
        table.add_column(column)
    for option in _options(cls):
        table.add_row(option["option"], escape(repr(option["default"])), escape(option["range"]), option["meaning"])
    out.print()
    print_table(table)
    if row.paper:
        out.print(f"\n[bold]paper[/]    {escape(row.paper.title)}, {row.paper.venue}, {row.paper.url}")
    out.print(f"[bold]targets[/]  {', '.join(row.targets) or 'any'}")
    profile = "a profile is required: elision fit" if row.needs_profile else "no profile is required"
    out.print(f"[bold]profile[/]  {profile}")


def fit(
    method: Annotated[str, typer.Argument(help='A method with options, as in "teacache:degree=3" or "prefixkv".')],
    output: Annotated[Path, typer.Option("--out", "--output", "-o", help="Profile file to write (.safetensors).")],
    model: Annotated[
        str | None,
        typer.Option(help="Zoo name, hub id or local path; by default garments-flux, or smollm2 for K/V caches."),
    ] = None,
    calls: Annotated[int, typer.Option(min=1, help="Runs to learn from; each draws one batch of prompts.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of every run of a diffusion model.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeat for a batch.")] = None,
    branches: Annotated[
        str | None, typer.Option(help='Guidance branches in the order of their calls, as in "cond,uncond".')
    ] = None,
    length: Annotated[int, typer.Option(min=16, help="Tokens of every generated prompt of a language model.")] = 512,
    as_json: JsonFlag = False,
) -> None:
    """Run the offline part of a method and write what it learned."""
    need_bench()
    import elision
    from elision.bench.spec import parse

    spec = parse(method)
    if type(spec.method).fit is elision.Method.fit:
        spec.method.fit(None, [])  # has no offline part and says so, before a model is loaded
    with progress(silent=as_json) as move:
        if spec.method.family == "kv":
            name, target, made = _language_calls(model or "smollm2", prompt, calls, length)
        else:
            name, target, made = _denoise_calls(model or "garments-flux", prompt, calls, steps, move)
        named = tuple(branches.split(",")) if branches else ()
        profile = elision.fit(target, spec.method, calls=made, branches=named)
    profile.save(output)
    facts = {"method": spec.label, "model": name, "calls": len(made), "profile": str(output), **profile.facts}
    if as_json:
        print_json({**facts, "tensors": {key: list(t.shape) for key, t in profile.tensors.items()}})
        return
    out.print(f"wrote {output}: {spec.label} on {name}, {len(made)} runs", highlight=False)
    out.print(
        f'use it: elision compare {spec.method.family} --methods "{spec.name}:profile={output}"',
        style="dim",
        highlight=False,
    )


def _denoise_calls(
    model: str, prompt: list[str] | None, calls: int, steps: int | None, move: Callable[[int, int, str], None]
) -> tuple[str, Any, list[Any]]:
    """Name, pipeline and runs from different noise."""
    from elision.bench.subject import load_subject

    subject = load_subject(model, prompts=prompt)
    if subject.kind == "policy":
        policy = subject.pipe
        rows = [policy.observations(number) for number in range(calls)]
        return subject.name, policy.pipe, [lambda pipe, r=r: policy.answer(steps or subject.steps, r) for r in rows]

    def call(seed: int) -> Any:
        def run(pipe: Any) -> Any:
            del pipe  # the subject's own
            move(seed, calls, f"run {seed + 1}")
            return subject.sample(steps or subject.steps, seed)

        return run

    return subject.name, subject.pipe, [call(seed) for seed in range(calls)]


def _language_calls(model: str, prompt: list[str] | None, calls: int, length: int) -> tuple[str, Any, list[Any]]:
    """Name, model and prompts: those given, or generated prose of `length` tokens."""
    from elision.bench.kv import tasks
    from elision.bench.kv.subject import load_language

    subject = load_language(model)
    if prompt:
        rows = [subject.encode(text) for text in prompt]
    else:  # seeds that no comparison and no claim uses
        rows = [list(tasks.continuation(subject, length, 20_000 + i, 0.5).turns[0].ids) for i in range(calls)]
    return subject.name, subject.model, [subject.tensor([row]) for row in rows]
