"""What every registered KV method must declare to be tested: settings that keep everything, and settings that do not.

A method that is registered and missing here fails `test_every_method_is_declared`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import elision

Options = dict[str, Any]

# At these settings nothing leaves the cache, and outputs equal DynamicCache's bit for bit.
LIMITS: dict[str, list[Options]] = {
    "h2o": [{"budget": 4096}, {"heavy": 0, "recent": 4096}],
    "snapkv": [{"budget": 4096}],
}

# At these settings a prompt of 30 tokens is compressed on every tiny model.
ACTIVE: dict[str, list[Options]] = {
    "h2o": [{"budget": 10}, {"budget": 0.4}, {"heavy": 6, "recent": 4, "rolling": True}],
    "snapkv": [{"budget": 12, "window": 4}, {"budget": 0.5, "window": 3, "pooling": "max"}],
}

# Methods (with their options) that drop tokens, so that slots held can be compared with the budget.
PACKS: frozenset[str] = frozenset()


def known_methods() -> list[str]:
    """Names of all registered KV methods."""
    return [row.name for row in elision.methods("kv")]


def cases(table: dict[str, list[Options]]) -> list[tuple[str, Options]]:
    """(name, options) of every setting."""
    return [(name, options) for name, settings in sorted(table.items()) for options in settings]


def label(value: Any) -> str:
    """Readable test ids."""
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    return str(value)


__all__ = ["ACTIVE", "LIMITS", "PACKS", "Callable", "Options", "cases", "known_methods", "label"]
