"""Prometheus metrics and the numbers of the dashboard; both read the cache's own counts, so they cannot disagree."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from elision.serving.semantic.cache import SemanticCache
from elision.serving.semantic.policies import effective_threshold, effective_ttl
from elision.serving.semantic.proxy.loads import Loads

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_RECENT = 2000
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Everything that `/metrics` and the dashboard show. No label carries a tenant, a question or an answer.

    Args:
        cache: whose counts to show.
        loads: the load signals to show.
    """

    def __init__(self, cache: SemanticCache, loads: Loads) -> None:
        self._cache, self._loads = cache, loads
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "elision_requests",
            "Requests by path, outcome and status",
            ["path", "outcome", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "elision_request_seconds",
            "Seconds to the first byte",
            ["outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._added = Histogram(
            "elision_added_seconds", "Seconds that the proxy added to a miss", buckets=_SECONDS, registry=self.registry
        )
        self._embedding = Histogram(
            "elision_embed_seconds", "Seconds of embedding per text", buckets=_SECONDS, registry=self.registry
        )
        self.errors = Counter(
            "elision_cache_errors", "Unexpected cache errors; the request passed", registry=self.registry
        )
        self._recent: deque[tuple[float, str, float]] = deque(maxlen=_RECENT)
        self.registry.register(self)

    def request(self, path: str, outcome: str, status: int, seconds: float) -> None:
        """A request was answered: "hit", "miss" or "bypass", with this status, first byte after so many seconds."""
        self._requests.labels(path, outcome, str(status)).inc()
        self._seconds.labels(outcome).observe(seconds)
        self._recent.append((time.time(), outcome, seconds))

    def added(self, seconds: float) -> None:
        """Seconds before a miss went upstream."""
        self._added.observe(seconds)

    def embedded(self, seconds: float) -> None:
        """Seconds of one embedding."""
        self._embedding.observe(seconds)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The cache's own counts as Prometheus metrics, read when asked for."""
        cache = self._cache
        events = CounterMetricFamily("elision_cache_events", "Cache events by category", labels=["category", "event"])
        for (category, event), count in cache.stats.events().items():
            events.add_metric([category, event], count)
        yield events
        reasons = CounterMetricFamily("elision_lookups", "Lookups by reason", labels=["category", "event", "reason"])
        for key, count in cache.stats.reasons().items():
            reasons.add_metric(list(key), count)
        yield reasons
        saved = CounterMetricFamily("elision_saved_seconds", "Model seconds saved by hits", labels=["category"])
        for category, seconds in cache.stats.saved_seconds().items():
            saved.add_metric([category], seconds)
        yield saved
        yield from self._gauges()

    def _gauges(self) -> Iterator[Metric]:
        cache = self._cache
        entries = GaugeMetricFamily("elision_entries", "Entries by category", labels=["category"])
        threshold = GaugeMetricFamily("elision_threshold", "Threshold in force", labels=["category", "model"])
        ttl = GaugeMetricFamily("elision_ttl_seconds", "TTL in force", labels=["category", "model"])
        load = GaugeMetricFamily("elision_load", "Load signal by model", labels=["model"])
        counts, loads = cache.counts(), self._loads.values()
        for category in cache.policies.names():
            entries.add_metric([category], counts.get(category, 0))
            policy = cache.policies.of(category)
            # Callers choose the models' names: only those whose load moves something get rows of their own.
            for model, s in {"": 0.0, **{model: s for model, s in loads.items() if s > 0}}.items():
                threshold.add_metric([category, model], effective_threshold(policy, s))
                ttl.add_metric([category, model], effective_ttl(policy, s))
        for model, s in loads.items():
            load.add_metric([model], s)
        yield from (entries, threshold, ttl, load)
        pays = GaugeMetricFamily("elision_break_even_rate", "Break-even hit rate", labels=["category", "model"])
        for row in cache.economics.report():
            if isinstance(row["break_even"], float):
                pays.add_metric([str(row["category"]), str(row["model"])], row["break_even"])
        yield pays
        yield GaugeMetricFamily("elision_index_bytes", "Bytes of vectors and graphs", value=cache.nbytes())
        yield GaugeMetricFamily("elision_degraded", "1 while the store fails", value=float(cache.problem() is not None))

    def dashboard(self) -> dict[str, Any]:
        """The dashboard's numbers as plain JSON."""
        cache = self._cache
        now, counts, table = time.time(), cache.counts(), cache.stats.table()
        rows = []
        for category in cache.policies.names():
            policy, row = cache.policies.of(category), table.get(category, {})
            rows.append(
                {
                    "category": category,
                    "enabled": policy.caches,
                    "threshold": policy.threshold,
                    "ttl": policy.ttl,
                    "entries": counts.get(category, 0),
                    **row,
                }
            )
        recent = [(at, outcome, s) for at, outcome, s in list(self._recent) if now - at < 300]
        latency = {o: _percentiles([s for _, outcome, s in recent if outcome == o]) for o in ("hit", "miss", "bypass")}
        return {
            "time": now,
            "problem": cache.problem(),
            "entries": len(cache),
            "index_bytes": cache.nbytes(),
            "categories": rows,
            "latency_ms": latency,
            "recent": [[round(at - now, 1), outcome, round(s * 1e3, 2)] for at, outcome, s in recent[-300:]],
            "loads": self._loads.values(),
            "economics": cache.economics.report(),
        }


def _percentiles(seconds: list[float]) -> dict[str, float | int | None]:
    """Count, median and 99th percentile in milliseconds."""
    if not seconds:
        return {"count": 0, "p50": None, "p99": None}
    ordered = sorted(seconds)

    def at(q: float) -> float:
        return round(1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2)

    return {"count": len(ordered), "p50": at(0.5), "p99": at(0.99)}
