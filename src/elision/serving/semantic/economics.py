"""Whether caching a category pays, and an optional controller that switches it off while it does not.

Spec, "Economics": with C_s seconds of embedding and search on every lookup, C_f seconds of fetch on a hit and T
seconds of model
latency, caching pays iff h·(T − C_f) > C_s, so the break-even hit rate is h_be = C_s / (T − C_f) (inferred).
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from typing import ClassVar

from elision.errors import OptionError
from elision.serving.semantic.load import Clock

MOST_PAIRS = 1000
"""Pairs of category and model that are accounted for."""


def break_even(search: float, fetch: float, model: float, embed: float = 0.0) -> float:
    """h_be = (C_embed + C_search) / (T − C_f); infinite where a fetch is no faster than the model. (inferred)

    Args:
        search: seconds of index search on every lookup.
        fetch: seconds to fetch a document on a hit.
        model: seconds the model takes.
        embed: seconds of embedding on every lookup.

    Example:
        >>> round(break_even(search=0.030, fetch=0.0, model=0.150), 3)     # remote search, the paper's 15-20 %
        0.2
    """
    for name, value in (("search", search), ("fetch", fetch), ("model", model), ("embed", embed)):
        if not value >= 0:
            raise OptionError(f"{name} = {value} s must be at least 0")
    return (embed + search) / (model - fetch) if model > fetch else math.inf


@dataclass
class _Mean:
    """A running mean that forgets: the newest of about `window` observations weigh most."""

    window: int = 200
    value: float = 0.0
    count: int = 0

    def add(self, x: float) -> None:
        self.count += 1
        self.value += (x - self.value) / min(self.count, self.window)


@dataclass
class Ledger:
    """What was measured for one category and model; all costs in seconds."""

    embed: _Mean = field(default_factory=_Mean)
    search: _Mean = field(default_factory=_Mean)
    fetch: _Mean = field(default_factory=_Mean)
    model: _Mean = field(default_factory=_Mean)
    lookups: int = 0
    hits: int = 0
    saved: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Hits per lookup of the current trial; 0 before the first lookup."""
        return self.hits / self.lookups if self.lookups else 0.0

    @property
    def break_even(self) -> float | None:
        """h_be from the measured means; `None` while no model latency is known."""
        if not self.model.count:
            return None
        return break_even(self.search.value, self.fetch.value, self.model.value, self.embed.value)


@dataclass(frozen=True)
class ControllerOptions:
    """When the controller switches a category off and tries it again. (inferred)

    Attributes:
        enabled: off by default: the break-even rate is only reported.
        min_lookups: lookups before the first verdict.
        confidence: standard deviations of the hit rate's upper bound (Wilson) that must lie below break-even.
        retry: seconds after which a category that was switched off gets a fresh trial.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # a misspelt option in YAML is an error

    enabled: bool = False
    min_lookups: int = 200
    confidence: float = 2.0
    retry: float = 600.0

    def __post_init__(self) -> None:
        if self.min_lookups < 1 or self.confidence < 0 or self.retry <= 0:
            raise OptionError(
                f"need min_lookups {self.min_lookups} >= 1, confidence {self.confidence} >= 0, retry {self.retry} > 0"
            )


def upper_bound(hits: int, lookups: int, z: float) -> float:
    """Upper end of the Wilson interval of a hit rate."""
    if not lookups:
        return 1.0
    p, n = hits / lookups, lookups
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return min(1.0, (centre + spread) / (1 + z * z / n))


class Economics:
    """Ledgers per category and model, and the verdict whether to look up at all; thread-safe."""

    def __init__(self, options: ControllerOptions | None = None, clock: Clock = time.monotonic) -> None:
        self.options = options or ControllerOptions()
        self._clock = clock
        self._lock = threading.Lock()
        self._ledgers: dict[tuple[str, str], Ledger] = {}
        self._off: dict[tuple[str, str], float] = {}

    def pays(self, category: str, model: str) -> bool:
        """Whether this category and model should be looked up now; always true while the controller is off."""
        with self._lock:
            since = self._off.get((category, model))
            if since is None:
                return True
            if self._clock() - since < self.options.retry:
                return False
            # A fresh trial: old hits and misses were counted under other traffic.
            del self._off[category, model]
            ledger = self._ledgers[category, model]
            ledger.lookups = ledger.hits = 0
            return True

    def looked_up(
        self, category: str, model: str, *, hit: bool, embed: float | None, search: float, fetch: float | None
    ) -> None:
        """A lookup's cost in seconds. `embed` and `fetch` are `None` where that step did not happen."""
        with self._lock:
            ledger = self._ledger(category, model)
            ledger.lookups += 1
            # An exact hit embeds nothing, and that is a true cost of 0 for this lookup.
            ledger.embed.add(embed or 0.0)
            ledger.search.add(search)
            if fetch is not None:
                ledger.fetch.add(fetch)
            if hit:
                ledger.hits += 1
                ledger.saved += max(0.0, ledger.model.value - (embed or 0.0) - search - (fetch or 0.0))
            self._judge(category, model, ledger)

    def answered(self, category: str, model: str, latency: float) -> None:
        """The model itself answered a question of this category in `latency` seconds."""
        with self._lock:
            self._ledger(category, model).model.add(latency)

    def report(self) -> list[dict[str, object]]:
        """One row per category and model with every term of the formula, in seconds."""
        with self._lock:
            rows = []
            for (category, model), ledger in sorted(self._ledgers.items()):
                h_be = ledger.break_even
                rows.append(
                    {
                        "category": category,
                        "model": model,
                        "lookups": ledger.lookups,
                        "hits": ledger.hits,
                        "hit_rate": ledger.hit_rate,
                        "break_even": None if h_be is None or math.isinf(h_be) else h_be,
                        "embed_s": ledger.embed.value,
                        "search_s": ledger.search.value,
                        "fetch_s": ledger.fetch.value,
                        "model_s": ledger.model.value,
                        "saved_s": ledger.saved,
                        "off": (category, model) in self._off,
                    }
                )
            return rows

    def _ledger(self, category: str, model: str) -> Ledger:
        ledger = self._ledgers.get((category, model))
        if ledger is None:
            # Callers choose the models' names: past the limit the pair that is asked for least makes room.
            if len(self._ledgers) >= MOST_PAIRS:
                least = min(self._ledgers, key=lambda pair: self._ledgers[pair].lookups)
                del self._ledgers[least]
                self._off.pop(least, None)
            ledger = self._ledgers[category, model] = Ledger()
        return ledger

    def _judge(self, category: str, model: str, ledger: Ledger) -> None:
        o, h_be = self.options, ledger.break_even
        if not o.enabled or h_be is None or ledger.lookups < o.min_lookups:
            return
        if upper_bound(ledger.hits, ledger.lookups, o.confidence) < h_be:
            self._off[category, model] = self._clock()
