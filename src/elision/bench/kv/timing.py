"""Times of caches, paired: every round runs every entry once, in rotating order, in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from elision.bench import stats
from elision.bench.kv.measure import applied
from elision.bench.stats import Estimate
from elision.kv.method import KVMethod


@dataclass
class Times:
    """Seconds of one entry, one number per round: of the whole prompt, and of one decoded token.

    `bytes_held` and `bytes_peak` are those of the last round; None for a `DynamicCache`.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    bytes_held: int | None = None
    bytes_peak: int | None = None

    def prefill_ratio(self, base: Times) -> Estimate:
        """How many times longer the prompt takes than over the cache `base`, paired by round."""
        return stats.ratio(self.prefill, base.prefill)

    def decode_ratio(self, base: Times) -> Estimate:
        """How many times longer a token takes than over the cache `base`, paired by round."""
        return stats.ratio(self.decode, base.decode)


@dataclass(frozen=True)
class Entry:
    """What is timed: a method with its profile, a maker of a cache, or neither: a plain `DynamicCache`."""

    method: KVMethod | None = None
    profile: Any = None
    cache: Callable[[], Any] | None = None


WARM = 256  # tokens of the prompt that warms up


@torch.no_grad()
def race(
    model: Any,
    ids: Tensor,
    entries: Mapping[str, Entry],
    *,
    steps: int,
    rounds: int,
    told: Callable[[str], None] = lambda text: None,
) -> dict[str, Times]:
    """Time every entry on the prompt `ids` [B, S] and `steps` decoded tokens after it; a short round warms up."""
    found = {name: Times() for name in entries}
    names: Sequence[str] = list(entries)
    for turn in range(rounds + 1):
        gc.collect()
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            told(name)
            if not turn:
                _once(model, ids[:, :WARM], entries[name], 2)
                continue
            prefill, decode, sizes = _once(model, ids, entries[name], steps)
            found[name].prefill.append(prefill)
            found[name].decode.append(decode)
            found[name].bytes_held, found[name].bytes_peak = sizes
    return found


def _once(model: Any, ids: Tensor, entry: Entry, steps: int) -> tuple[float, float, tuple[int | None, int | None]]:
    notes: list[str] = []
    around = nullcontext() if entry.method is None else applied(model, entry.method, entry.profile, notes)
    with around as run:
        if run is not None:
            cache = run.cache()
        else:
            cache = entry.cache() if entry.cache is not None else DynamicCache(config=model.config)
        _wait()
        started = perf_counter()
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        _wait()
        middle = perf_counter()
        for _ in range(steps):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        _wait()
        ended = perf_counter()
        report = None if run is None else run.report()
    sizes = (None, None) if report is None else (report.bytes_held, report.bytes_peak)
    return middle - started, (ended - middle) / steps, sizes


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
