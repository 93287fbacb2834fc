"""How busy a downstream model is, as one number in [0, 1].

Spec: "Adaptive load policy (per downstream model; existence in paper, formulas inferred)": queue length, p95 latency
    or in-flight
over limit, smoothed (EWMA) with hysteresis.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from elision.errors import OptionError

Clock = Callable[[], float]
"""A function that returns seconds; injectable wherever time matters."""


@dataclass(frozen=True)
class LoadOptions:
    """How raw load becomes the signal s. (inferred)

    Attributes:
        in_flight_limit: requests in flight that count as full load.
        latency_target: seconds of p95 latency that count as full load; `None` leaves latency out.
        queue_limit: waiting requests (reported by the model server) that count as full load.
        half_life: seconds after which half of an old observation is forgotten.
        engage: smoothed load from which the policies react.
        release: smoothed load below which they stop; below `engage`, so that the signal does not flap.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # a misspelt option in YAML is an error

    in_flight_limit: int = 32
    latency_target: float | None = None
    queue_limit: int = 16
    half_life: float = 5.0
    engage: float = 0.7
    release: float = 0.4

    def __post_init__(self) -> None:
        if self.in_flight_limit < 1 or self.queue_limit < 1:
            raise OptionError(
                f"in_flight_limit {self.in_flight_limit} and queue_limit {self.queue_limit} must be at least 1"
            )
        if self.half_life <= 0 or (self.latency_target is not None and self.latency_target <= 0):
            raise OptionError(f"half_life {self.half_life} and latency_target {self.latency_target} must be above 0 s")
        if not 0 <= self.release <= self.engage <= 1:
            raise OptionError(f"need 0 <= release <= engage <= 1, got release {self.release}, engage {self.engage}")


class LoadMeter:
    """The load signal of one model; thread-safe.

    `value` is 0 exactly until the smoothed load reaches `engage`, then the smoothed load until it falls below
    `release`.
    """

    def __init__(self, options: LoadOptions | None = None, clock: Clock = time.monotonic) -> None:
        self.options = options or LoadOptions()
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight = 0
        self._queued = 0
        self._latencies: deque[float] = deque(maxlen=128)
        self._smooth = 0.0
        self._engaged = False
        self._at = clock()

    def started(self) -> None:
        """A request went to the model."""
        with self._lock:
            self._update()
            self._in_flight += 1

    def finished(self, latency: float) -> None:
        """A request came back after `latency` seconds, well or not."""
        with self._lock:
            self._update()
            self._in_flight = max(0, self._in_flight - 1)
            self._latencies.append(latency)

    def queued(self, waiting: int) -> None:
        """The model server reports `waiting` requests in its queue."""
        with self._lock:
            self._update()
            self._queued = max(0, waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and the signal is 0."""
        return self._in_flight == 0 and self.value == 0.0

    @property
    def value(self) -> float:
        """s in [0, 1]; 0 exactly while not engaged."""
        with self._lock:
            self._update()
            return self._smooth if self._engaged else 0.0

    def _raw(self) -> float:
        o = self.options
        parts = [self._in_flight / o.in_flight_limit, self._queued / o.queue_limit]
        # Old latencies say nothing about now once nothing is running.
        if o.latency_target is not None and self._latencies and self._in_flight:
            ordered = sorted(self._latencies)
            parts.append(ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)] / o.latency_target)
        return min(1.0, max(parts))

    def _update(self) -> None:
        """Moves the EWMA to now: since the last event the raw load was constant, so the closed form is exact."""
        now = self._clock()
        keep = 0.5 ** (max(0.0, now - self._at) / self.options.half_life)
        self._at = now
        self._smooth = min(1.0, keep * self._smooth + (1.0 - keep) * self._raw())
        if self._engaged:
            self._engaged = self._smooth >= self.options.release
        else:
            self._engaged = self._smooth >= self.options.engage
