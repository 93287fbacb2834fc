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
    "cake": [{"budget": 4096}, {"budget": 4096, "schedule": "one_shot"}],
    "dapq": [{"budget": 4096}],
    "elastic_cache": [{"budget": 1.0}, {"ratio": 0.0}],
    "h2o": [{"budget": 4096}, {"heavy": 0, "recent": 4096}],
    "knorm": [{"budget": 4096}],
    "layer_shared": [{"budget": 1.0}],
    "mikv": [{"ratio": 1.0}],
    "prefixkv": [{"budget": 1.0}, {"ratio": 0.0}],
    "pyramidkv": [{"budget": 4096}],
    "random": [{"budget": 4096}],
    "snapkv": [{"budget": 4096}],
    "streaming_llm": [{"budget": 4096, "rolling": False}],
    "tova": [{"budget": 4096}],
    "uniform_rtn": [{"residual": 4096}],
    "window": [{"budget": 4096}],
    "zipcache": [{"bits_salient": 16, "bits_other": 16}, {"bits_salient": 16, "low_ratio": 0.0}],
}

# Parameters in float32: in 16 bits a minimum that differs in its last float32 bit can round to a neighbour a thousand
# times further away, so that two runs which add in another order could not be compared.
SMOOTH = {"params": "float32"}

# At these settings a prompt of 30 tokens is compressed on every tiny model.
ACTIVE: dict[str, list[Options]] = {
    "cake": [
        {"budget": 12, "window": 4},
        {"budget": 12, "window": 4, "schedule": "one_shot", "repair": "water_filling"},
        {"budget": 0.4, "window": 3},
    ],
    "dapq": [{"budget": 12, "window": 6}, {"budget": 0.4, "window": 4, "content": "random"}],
    "elastic_cache": [{"budget": 0.5}, {"ratio": 0.6, "merge": False}],
    "h2o": [{"budget": 10}, {"budget": 0.4}, {"heavy": 6, "recent": 4, "rolling": True}],
    "knorm": [{"budget": 12}],
    "layer_shared": [{"budget": 0.5, "mode": "paper"}],
    "mikv": [
        SMOOTH | {"ratio": 0.3},
        SMOOTH | {"ratio": 0.3, "hi_bits": 8, "lo_bits": 3},
        SMOOTH | {"ratio": 0.3, "lo_bits": 4, "size": "prompt"},
        {"ratio": 0.5, "lo_bits": "drop"},
    ],
    "prefixkv": [{"budget": 0.5}, {"ratio": 0.6}],
    "pyramidkv": [{"budget": 12, "window": 4}],
    "random": [{"budget": 12, "seed": 3}],
    "snapkv": [{"budget": 12, "window": 4}, {"budget": 0.5, "window": 3, "pooling": "max"}],
    "streaming_llm": [{"budget": 12}, {"budget": 12, "rolling": False}],
    "tova": [{"budget": 12}, {"budget": 0.4, "heads": "group"}],
    "uniform_rtn": [
        SMOOTH | {"residual": 5, "group": 4},
        SMOOTH | {"residual": 3, "keys": "token", "bits": 3},
    ],
    "window": [{"budget": 12}],
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
