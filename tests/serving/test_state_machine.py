"""Hypothesis: any interleaving of the cache's operations, with restarts and another process on the same store."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elision.serving.semantic import (
    Answer,
    CacheOptions,
    IndexOptions,
    Partition,
    Policies,
    Query,
    SemanticCache,
    SQLiteStore,
    effective_threshold,
    effective_ttl,
    unit,
)
from elision.serving.semantic.policies import limit

from .conftest import FakeClock, TableEncoder, at_angle

RNG = np.random.default_rng(11)
CENTRES = unit(RNG.standard_normal((4, 16)))
TEXTS = [f"text {i}" for i in range(24)]
TABLE = {t: at_angle(CENTRES[i % 4], float(RNG.uniform(0.8, 0.999)), RNG) for i, t in enumerate(TEXTS)}
PARTITIONS = [Partition(t, m, s) for t in ("a", "b") for m in ("m", "n") for s in ("x", "y")]
CATEGORIES = ["default", "dense", "loose"]
CAPACITY = 12
START = Policies.parse(
    {
        "default": {"threshold": 0.85, "ttl": 100},
        "categories": {
            "dense": {"threshold": 0.97, "ttl": 40, "quota": 0.34},
            "loose": {
                "threshold": 0.75,
                "floor": 0.6,
                "delta": 0.3,
                "kappa": 1.0,
                "ttl": 60,
                "ttl_max": 90,
                "quota": 0.5,
            },
        },
    }
)

texts, partitions, categories = st.sampled_from(TEXTS), st.sampled_from(PARTITIONS), st.sampled_from(CATEGORIES)


class CacheMachine(RuleBasedStateMachine):
    """The model: every answer ever stored, with where, what and when. The cache may forget, but never break a rule."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.clock, self.load = FakeClock(), 0.0
        self.policies = START
        self.made: dict[str, tuple[Partition, str, str, float]] = {}
        self.dead: set[str] = set()  # answers that must never be seen again
        self.number = 0
        self.cache = self.open()
        self.other: SemanticCache | None = None

    def open(self) -> SemanticCache:
        return SemanticCache(
            TableEncoder(16, TABLE),
            policies=self.policies,
            store=SQLiteStore(Path(self.folder.name) / "c.db"),
            options=CacheOptions(capacity=CAPACITY, index=IndexOptions(promote=4)),
            load=lambda model: self.load,
            clock=self.clock,
        )

    def verify_hit(self, text: str, where: Partition, category: str, found) -> None:
        partition, kind, stored, at = self.made[found.answer.text]
        policy = self.policies.of(category)
        assert found.answer.text not in self.dead
        assert (partition, kind) == (where, category)
        assert self.clock.now - at <= effective_ttl(policy, self.load)
        assert policy.caches
        if found.reason == "exact":
            assert stored == text
        else:
            assert TABLE[text] @ TABLE[stored] >= effective_threshold(policy, self.load) - 1e-5

    def store(self, cache: SemanticCache, text: str, where: Partition, category: str) -> None:
        self.number += 1
        answer = str(self.number)
        stored = cache.insert(Query(text, where, category), Answer(answer))
        assert stored.stored == self.policies.of(category).caches
        if stored.stored:
            self.made[answer] = (where, category, text, self.clock.now)

    @rule(text=texts, where=partitions, category=categories)
    def insert(self, text: str, where: Partition, category: str) -> None:
        self.store(self.cache, text, where, category)
        if self.policies.of(category).caches:
            found = self.cache.lookup(Query(text, where, category))
            assert found.answer == Answer(str(self.number)), "a fresh answer is found at once"

    @rule(text=texts, where=partitions, category=categories)
    def lookup(self, text: str, where: Partition, category: str) -> None:
        found = self.cache.lookup(Query(text, where, category))
        if found.answer is not None:
            self.verify_hit(text, where, category, found)

    @rule(seconds=st.floats(0.1, 60))
    def wait(self, seconds: float) -> None:
        self.clock.tick(seconds)

    @rule(load=st.sampled_from([0.0, 0.5, 1.0]))
    def change_load(self, load: float) -> None:
        self.load = load

    @rule(
        category=categories,
        change=st.sampled_from(
            [
                {"threshold": 0.9},
                {"threshold": 0.99},
                {"ttl": 5},
                {"ttl": 80},
                {"quota": 0.1},
                {"quota": 1.0},
                {"enabled": False},
                {"enabled": True},
            ]
        ),
    )
    def change_policy(self, category: str, change: dict[str, object]) -> None:
        self.policies = self.policies.changed(category, {"floor": None, "ttl_max": None, **change})
        self.cache.set_policies(self.policies)
        if self.other is not None:
            self.other.set_policies(self.policies)

    @rule(tenant=st.sampled_from(["a", "b"]))
    def purge(self, tenant: str) -> None:
        self.cache.purge(tenant)
        assert not self.cache.entries(tenant=tenant)
        if self.other is not None:
            self.other.sync()
        self.dead |= {answer for answer, made in self.made.items() if made[0].tenant == tenant}

    @rule(data=st.data())
    @precondition(lambda self: len(self.cache) > 0)
    def delete(self, data: st.DataObject) -> None:
        meta = data.draw(st.sampled_from(self.cache.entries()))
        answer = self.cache.answer(meta.id)
        assert answer is not None
        assert self.cache.delete(meta.id)
        self.dead.add(answer.text)
        if self.other is not None:
            self.other.sync()

    @rule()
    def sweep(self) -> None:
        self.cache.sweep()

    @rule()
    def restart(self) -> None:
        before = {(m.text, m.cell) for m in self.cache.entries()}
        self.cache.close()
        self.cache = self.open()
        after = {(m.text, m.cell) for m in self.cache.entries()}
        if self.other is None:
            assert after <= before

    @rule()
    @precondition(lambda self: self.other is None)
    def another_process(self) -> None:
        self.other = self.open()

    @rule(text=texts, where=partitions, category=categories)
    @precondition(lambda self: self.other is not None)
    def other_inserts(self, text: str, where: Partition, category: str) -> None:
        assert self.other is not None
        self.other.sync()
        self.store(self.other, text, where, category)
        self.cache.sync()

    @rule()
    @precondition(lambda self: self.other is not None)
    def exchange(self) -> None:
        assert self.other is not None
        self.other.sync()
        self.cache.sync()

    @invariant()
    def counts_keep_their_quota(self) -> None:
        if not hasattr(self, "cache"):
            return
        for category, count in self.cache.counts().items():
            assert count <= limit(self.policies.of(category), CAPACITY)
        assert len(self.cache) <= CAPACITY

    @invariant()
    def tables_agree(self) -> None:
        if hasattr(self, "cache"):
            self.cache._catalog.check()
            if self.other is None:
                self.cache.check()

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            if self.other is not None:
                self.other.close()
            self.folder.cleanup()


class TestCache(CacheMachine.TestCase):
    settings = settings(
        max_examples=60,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )


TestCache = pytest.mark.slow(TestCache)
