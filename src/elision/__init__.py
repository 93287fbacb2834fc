"""Elision: generative models made cheaper by not computing again what was already computed.

    import elision

    with elision.apply(pipe, "easycache", threshold=0.05) as run:
        image = pipe("sneaker").images[0]
    print(run.report())

Importing is light and has no side effects; families load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from elision import errors
from elision.errors import ElisionError, ElisionWarning

if TYPE_CHECKING:
    from elision.api import apply, fit, methods
    from elision.method import Method, MethodInfo, Paper
    from elision.profile import Profile
    from elision.session import Applied, Report

__version__ = "0.1.0"
__all__ = [
    "Applied",
    "ElisionError",
    "ElisionWarning",
    "Method",
    "MethodInfo",
    "Paper",
    "Profile",
    "Report",
    "apply",
    "errors",
    "fit",
    "methods",
]

_WHERE = {
    "Applied": "session",
    "Method": "method",
    "MethodInfo": "method",
    "Paper": "method",
    "Profile": "profile",
    "Report": "session",
    "apply": "api",
    "fit": "api",
    "methods": "api",
}


def __getattr__(name: str) -> Any:
    """Load the public names on first use, so that importing the package does not import torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'elision' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"elision.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
