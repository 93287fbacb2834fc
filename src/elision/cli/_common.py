"""What all commands share: consoles, JSON, progress bars, and errors as one line."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from typer.core import TyperGroup

from elision.errors import ElisionError, ElisionWarning, MissingDependency

out = Console()
err = Console(stderr=True)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_BENCH = ("scipy", "skimage")
_REPORT = ("jinja2",)


class Group(TyperGroup):
    """A group whose commands end with one clear line and exit code 2 where the library refuses something."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; `ElisionError` becomes a line, warnings of the library too."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", ElisionWarning)
                warnings.showwarning = _show
                return super().invoke(ctx)
        except ElisionError as error:
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del filename, lineno, file, line
    if issubclass(category, ElisionWarning):
        err.print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on standard output and nothing else."""
    typer.echo(json.dumps(value, indent=2, default=str))


def table_width() -> int:
    """Columns for tables: the terminal's, or plenty where the output goes to a file or a pipe."""
    return out.width if out.is_terminal else 220


def print_table(table: RenderableType) -> None:
    """A table as wide as it may be; a console of its own, as `print` cannot exceed the width of `out`."""
    (out if out.is_terminal else Console(width=table_width())).print(table)


def need(*packages: str, extra: str) -> None:
    """Refuse with the command that installs what is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"{', '.join(missing)} is not installed: pip install 'elision[{extra}]'")


def need_bench(report: bool = False) -> None:
    """What comparisons need, and reports if asked for."""
    need(*_BENCH, *(_REPORT if report else ()), extra="bench")
    need("diffusers", extra="diffusers")
    quiet_loading()


def quiet_loading() -> None:
    """No progress bars but ours."""
    from diffusers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def progress(silent: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error; gives the function that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True, disable=silent or not err.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def move(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(what))

        yield move


def seeds_of(text: str) -> int | list[int]:
    """`5` is the first five seeds, `3,7` are these."""
    return _numbers(text, "seeds") if "," in text else _numbers(text, "seeds")[0]


def steps_of(text: str | None) -> list[int] | None:
    """One or more numbers of steps."""
    return None if text is None else _numbers(text, "steps")


def _numbers(text: str, what: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"{what}={text!r}: give whole numbers, separated by commas") from None
