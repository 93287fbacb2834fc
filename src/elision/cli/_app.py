"""The application and the commands that need nothing heavy."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated, Any

import typer

import elision
from elision.cli import _catalogue, _compare, _compare_dllm, _demo, _doctor, _reproduce, _zoo
from elision.cli._common import Group
from elision.errors import MissingDependency

app = typer.Typer(
    name="elision",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Generative models made cheaper by not computing again what was already computed.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"elision {elision.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    del version


app.command("demo")(_demo.demo)
app.command("methods")(_catalogue.methods)
app.command("show")(_catalogue.show)
_compare.app.command("dllm")(_compare_dllm.dllm)
app.add_typer(_compare.app, name="compare")
app.command("reproduce")(_reproduce.reproduce)
app.command("fit")(_catalogue.fit)
app.add_typer(_zoo.app, name="zoo")
app.command("doctor")(_doctor.doctor)


@app.command(
    "serve",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Serve a semantic cache in front of an OpenAI-compatible server.",
)
def _serve(ctx: typer.Context) -> None:
    """Load the serving family only now, and hand everything over to its own command."""
    if importlib.util.find_spec("elision.serving") is None:
        raise MissingDependency("elision.serving is not part of this installation")
    try:
        serve: Any = importlib.import_module("elision.serving.cli").serve
    except ModuleNotFoundError as error:
        raise MissingDependency(f"{error.name} is not installed: pip install 'elision[serve]'") from error
    if not isinstance(serve, typer.Typer):
        made = typer.Typer(add_completion=False)
        made.command()(serve)
        serve = made
    typer.main.get_command(serve).main(list(ctx.args), prog_name="elision serve", standalone_mode=False)
