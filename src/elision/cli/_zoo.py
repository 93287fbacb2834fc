"""`elision zoo list|train|check`: the small trained models that ship with the library."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from elision.cli._common import Group, JsonFlag, err, need, out, print_json, print_table, quiet_loading

app = typer.Typer(cls=Group, no_args_is_help=True, help="The small trained models that ship with the library.")


def _zoo() -> Any:
    need("diffusers", extra="diffusers")
    quiet_loading()
    return importlib.import_module("elision.zoo")


@app.command("list")
def list_(as_json: JsonFlag = False) -> None:
    """List the models with their measured quality."""
    zoo = _zoo()
    cards = {name: zoo.card(name) for name in zoo.names()}
    if as_json:
        print_json(cards)
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("what it is")
    table.add_column("measured")
    for name, summary in zoo.names().items():
        quality = cards[name].get("quality", {})
        numbers = [f"{key} {value}" for key, value in quality.items() if isinstance(value, (int, float))]
        table.add_row(name, summary, ", ".join(numbers))
    print_table(table)


@app.command("train")
def train(
    name: Annotated[str, typer.Argument(help="Name of a model, see `elision zoo list`.")],
    output: Annotated[Path, typer.Option("--out", "--output", "-o", help="Folder to write the trained model to.")],
) -> None:
    """Train a model again from its recipe; progress is printed as it goes."""
    _zoo().train(name, out=output)
    out.print(f"wrote {output}", highlight=False)


@app.command("check")
def check(
    name: Annotated[str, typer.Argument(help="Name of a model, see `elision zoo list`.")], as_json: JsonFlag = False
) -> None:
    """Measure the quality that a model's card states."""
    zoo = _zoo()
    with err.status(f"measuring {name}"):
        numbers = zoo.check(name)
    if as_json:
        print_json(numbers)
        return
    for key, value in numbers.items():
        out.print(f"{key:<28} {value:.4g}" if isinstance(value, float) else f"{key:<28} {value}", highlight=False)
