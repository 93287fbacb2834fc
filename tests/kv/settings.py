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
    "mikv": [{"ratio": 1.0}],
    "snapkv": [{"budget": 4096}],
    "uniform_rtn": [{"residual": 4096}],
    "zipcache": [{"bits_salient": 16, "bits_other": 16}, {"bits_salient": 16, "low_ratio": 0.0}],
}

# Parameters in float32: in 16 bits a minimum that differs in its last float32 bit can round to a neighbour a thousand
# times further away, so that two runs which add in another order could not be compared.
SMOOTH = {"params": "float32"}

# At these settings a prompt of 30 tokens is compressed on every tiny model.
ACTIVE: dict[str, list[Options]] = {
    "h2o": [{"budget": 10}, {"budget": 0.4}, {"heavy": 6, "recent": 4, "rolling": True}],
    "mikv": [
        SMOOTH | {"ratio": 0.3},
        SMOOTH | {"ratio": 0.3, "hi_bits": 8, "lo_bits": 3},
        SMOOTH | {"ratio": 0.3, "lo_bits": 4, "size": "prompt"},
        {"ratio": 0.5, "lo_bits": "drop"},
    ],
    "snapkv": [{"budget": 12, "window": 4}, {"budget": 0.5, "window": 3, "pooling": "max"}],
    "uniform_rtn": [
        SMOOTH | {"residual": 5, "group": 4},
        SMOOTH | {"residual": 3, "keys": "token", "bits": 3},
    ],
    "zipcache": [
        SMOOTH | {"gap": 3},
        SMOOTH | {"gap": 3, "requant": "block", "norm": "full_count"},
        SMOOTH | {"gap": 3, "bits_salient": 16},
    ],
}

# Methods that hold every token, most of them in packed form.
PACKS: frozenset[str] = frozenset({"mikv", "uniform_rtn", "zipcache"})


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
