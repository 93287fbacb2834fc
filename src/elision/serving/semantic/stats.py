"""Counts of what the cache did, by category: the source of metrics, dashboard and the admin API's numbers."""

from __future__ import annotations

import threading
from collections import Counter

EVENTS = ("exact", "semantic", "miss", "skip", "stored", "refused", "evicted", "expired", "deleted", "reported")
"""Hits by kind, misses, skipped lookups, answers stored and refused, entries gone and why, false hits reported."""


class Stats:
    """Counters by (category, event) and by (category, reason of a lookup); thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: Counter[tuple[str, str]] = Counter()
        self._reasons: Counter[tuple[str, str, str]] = Counter()
        self._saved: Counter[str] = Counter()

    def count(self, category: str, event: str, n: int = 1) -> None:
        """Counts an event out of `EVENTS`."""
        with self._lock:
            self._events[category, event] += n

    def looked_up(self, category: str, event: str, reason: str) -> None:
        """Counts a lookup and its reason."""
        with self._lock:
            self._events[category, event] += 1
            self._reasons[category, event, reason] += 1

    def saved(self, category: str, seconds: float) -> None:
        """Adds model seconds that a hit saved."""
        with self._lock:
            self._saved[category] += seconds  # type: ignore[assignment]

    def events(self) -> dict[tuple[str, str], int]:
        """Counts by (category, event)."""
        with self._lock:
            return dict(self._events)

    def reasons(self) -> dict[tuple[str, str, str], int]:
        """Counts by (category, event, reason)."""
        with self._lock:
            return dict(self._reasons)

    def saved_seconds(self) -> dict[str, float]:
        """Model seconds saved, by category."""
        with self._lock:
            return dict(self._saved)

    def table(self) -> dict[str, dict[str, float]]:
        """One row per category: every event, the hit rate among lookups, and the model seconds saved."""
        events, saved = self.events(), self.saved_seconds()
        rows: dict[str, dict[str, float]] = {}
        for category in sorted({category for category, _ in events}):
            row: dict[str, float] = {event: events.get((category, event), 0) for event in EVENTS}
            hits = row["exact"] + row["semantic"]
            looked = hits + row["miss"]
            row["hit_rate"] = hits / looked if looked else 0.0
            row["saved_s"] = saved.get(category, 0.0)
            rows[category] = row
        return rows
