"""The command line: `elision demo`, `methods`, `show`, `compare`, `reproduce`, `fit`, `serve`, `zoo`, `doctor`."""

from __future__ import annotations

from elision.cli._app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script."""
    app()
