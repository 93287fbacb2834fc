"""The spec's exact list, (1) to (8); (9) is in test_proxy.py."""

from __future__ import annotations

import numpy as np
import pytest

from elision.serving.semantic import (
    Answer,
    CacheOptions,
    HashEncoder,
    IndexOptions,
    Partition,
    Policies,
    Query,
    SemanticCache,
    SQLiteStore,
    VectorIndex,
    break_even,
    effective_threshold,
    effective_ttl,
    unit,
)
from elision.serving.semantic.policies import Policy

from .conftest import CountingStore, FakeClock, TableEncoder, at_angle


def policies(**categories: dict[str, object]) -> Policies:
    return Policies.parse({"default": {"threshold": 0.8, "ttl": 100}, "categories": categories})


def test_1_one_default_category_is_a_plain_semantic_cache(clock: FakeClock, who: Partition) -> None:
    """Decision for decision equal to a plain cache: brute force over all fresh entries, best first, threshold."""
    rng = np.random.default_rng(0)
    encoder = TableEncoder()
    centres = unit(rng.standard_normal((20, 32)))
    cache = SemanticCache(encoder, policies=policies(), clock=clock)
    plain: list[tuple[str, np.ndarray, str, float]] = []
    outcomes = []
    for step in range(1500):
        text = f"question {rng.integers(400)}"
        if text not in encoder.table:
            encoder.table[text] = at_angle(centres[rng.integers(20)], rng.uniform(0.75, 0.99), rng)
        vector = encoder.table[text]
        clock.tick(float(rng.integers(0, 2)))
        plain = [e for e in plain if clock.now - e[3] <= 100]
        same = [e for e in plain if e[0] == text]
        scores = [float(e[1] @ vector) for e in plain]
        best = int(np.argmax(scores)) if scores else -1
        expected = same[0][2] if same else plain[best][2] if best >= 0 and scores[best] >= 0.8 else None
        found = cache.lookup(Query(text, who))
        assert (found.answer.text if found.answer else None) == expected, (step, found)
        outcomes.append(found.reason)
        if expected is None:
            cache.insert(found, Answer(f"answer {step}"))
            plain.append((text, vector, f"answer {step}", clock.now))
    assert {"exact", "semantic", "below-threshold"} <= set(outcomes)


def test_2_full_beam_is_brute_force() -> None:
    rng = np.random.default_rng(1)
    vectors = unit(rng.standard_normal((2000, 24)))
    index = VectorIndex(24, IndexOptions(promote=1, ef_search=2000))
    index.add_many(range(2000), vectors)
    assert index.build()
    for query in unit(rng.standard_normal((100, 24))):
        found = index.search(query, 10)
        true = np.argsort(-(vectors @ query), kind="stable")[:10]
        assert [slot for slot, _ in found] == list(true)
        np.testing.assert_allclose([s for _, s in found], vectors[true] @ query, atol=1e-5)


@pytest.mark.slow
def test_2_recall_at_ef_20_over_10_000() -> None:
    rng = np.random.default_rng(2)
    centres = rng.standard_normal((200, 64))
    vectors = unit(centres[rng.integers(200, size=10_000)] + 0.7 * rng.standard_normal((10_000, 64)))
    index = VectorIndex(64, IndexOptions(promote=1, ef_search=20))
    index.add_many(range(10_000), vectors)
    assert index.build()
    queries = unit(centres[rng.integers(200, size=500)] + 0.7 * rng.standard_normal((500, 64)))
    hits = [index.search(q, 1)[0][0] == int(np.argmax(vectors @ q)) for q in queries]
    assert np.mean(hits) >= 0.95


@pytest.mark.slow
def test_2_every_live_entry_finds_itself_after_turnover() -> None:
    """Three full turnovers by removal and insertion, then upkeep: each entry's own vector finds it."""
    rng = np.random.default_rng(3)
    n, dim = 3000, 48
    index = VectorIndex(dim, IndexOptions(promote=100))
    vectors = dict(enumerate(unit(rng.standard_normal((n, dim)))))
    index.add_many(vectors, np.stack(list(vectors.values())))
    assert index.build()
    for slot in range(n, 4 * n):
        gone = int(rng.choice(n)) if slot < 0 else slot - n
        assert index.remove(gone)
        del vectors[gone]
        vectors[slot] = unit(rng.standard_normal(dim))
        index.add(slot, vectors[slot])
    index.repair(list(vectors))
    lost = [slot for slot, v in vectors.items() if index.search(v, 1)[0][0] != slot]
    assert not lost
    assert len(index) == n


def test_3_no_hit_violates_threshold_ttl_scope_model_or_category(clock: FakeClock) -> None:
    rng = np.random.default_rng(4)
    encoder = TableEncoder()
    rules = policies(code={"threshold": 0.95, "ttl": 50}, chat={"threshold": 0.7, "ttl": 20})
    cache = SemanticCache(encoder, policies=rules, clock=clock)
    centres = unit(rng.standard_normal((6, 32)))
    made: dict[str, tuple[Partition, str, str, float]] = {}
    hits = 0
    for step in range(4000):
        clock.tick(rng.uniform(0, 1))
        text = f"t{rng.integers(300)}"
        encoder.table.setdefault(text, at_angle(centres[rng.integers(6)], rng.uniform(0.85, 0.999), rng))
        partition = Partition(f"tenant{rng.integers(2)}", f"model{rng.integers(2)}", f"scope{rng.integers(2)}")
        category = str(rng.choice(["code", "chat", "default"]))
        found = cache.lookup(Query(text, partition, category))
        if found.answer is None:
            cache.insert(found, Answer(str(step)))
            made[str(step)] = (partition, category, text, clock.now)
            continue
        hits += 1
        where, kind, stored_text, at = made[found.answer.text]
        assert (where, kind) == (partition, category)
        policy = rules.of(category)
        assert clock.now - at <= policy.ttl
        assert text == stored_text or encoder.table[text] @ encoder.table[stored_text] >= policy.threshold - 1e-6
    assert hits > 500


def test_4_what_is_off_embeds_and_reads_nothing(clock: FakeClock, who: Partition) -> None:
    encoder, store = TableEncoder(), CountingStore(SQLiteStore(":memory:"))
    rules = policies(off={"enabled": False}, secret={"allow_caching": False}, never={"ttl": 0})
    cache = SemanticCache(encoder, policies=rules, store=store, clock=clock)
    for category in ("off", "secret", "never"):
        found = cache.lookup(Query("hello", who, category))
        assert (found.status, found.reason) == ("skip", "category-off")
        assert not cache.insert(found, Answer("x")).stored
    assert (encoder.calls, store.gets, store.puts) == (0, 0, 0)


def test_4_misses_and_expired_entries_cause_no_store_reads(clock: FakeClock, who: Partition) -> None:
    encoder, store = TableEncoder(), CountingStore(SQLiteStore(":memory:"))
    cache = SemanticCache(encoder, policies=policies(), store=store, clock=clock)
    cache.insert(Query("a", who), Answer("A"))
    assert cache.lookup(Query("zzz", who)).reason == "below-threshold"
    assert cache.lookup(Query("a", Partition("other", "gpt-x", who.scope))).reason == "no-entry"
    clock.tick(101)
    assert cache.lookup(Query("a", who)).status == "miss"
    assert store.gets == 0
    assert len(cache) == 0


def test_5_quota_holds_at_all_times_and_eviction_stays_inside(clock: FakeClock, who: Partition) -> None:
    rng = np.random.default_rng(5)
    rules = policies(a={"quota": 0.3}, b={"quota": 0.5}, c={"quota": 0.2})
    cache = SemanticCache(TableEncoder(), policies=rules, options=CacheOptions(capacity=40), clock=clock)
    for i in range(30):
        cache.insert(Query(f"b{i}", who, "b"), Answer("x"))
    before = cache.counts()["b"]
    for i in range(200):
        cache.insert(Query(f"a{i}", who, "a"), Answer("x"))
        assert cache.counts()["a"] <= 12
        assert cache.counts()["b"] == before == 20
    for i in range(300):
        category = str(rng.choice(["a", "b", "c"]))
        cache.insert(Query(f"{category}-{i}", who, category), Answer("x"))
        counts = cache.counts()
        assert counts.get("a", 0) <= 12
        assert counts["b"] <= 20
        assert counts.get("c", 0) <= 8
    cache.check()


def test_5_over_committed_quotas_evict_from_the_category_most_over(clock: FakeClock, who: Partition) -> None:
    rules = policies(a={"quota": 1.0}, b={"quota": 0.5})
    cache = SemanticCache(TableEncoder(), policies=rules, options=CacheOptions(capacity=20), clock=clock)
    for i in range(20):
        cache.insert(Query(f"a{i}", who, "a"), Answer("x"))
    for i in range(5):
        cache.insert(Query(f"b{i}", who, "b"), Answer("x"))
    assert cache.counts() == {"a": 15, "b": 5}


def test_5_least_recently_used_goes_first(clock: FakeClock, who: Partition) -> None:
    cache = SemanticCache(TableEncoder(), policies=policies(), options=CacheOptions(capacity=3), clock=clock)
    for text in "abc":
        cache.insert(Query(text * 5, who), Answer(text))
    assert cache.lookup(Query("aaaaa", who)).status == "hit"
    cache.insert(Query("ddddd", who), Answer("d"))
    assert cache.lookup(Query("bbbbb", who)).status == "miss"
    assert cache.lookup(Query("aaaaa", who)).status == "hit"


def test_6_no_load_is_the_static_policy_exactly() -> None:
    p = Policy(threshold=0.87, ttl=123.0, floor=0.7, delta=0.3, kappa=2.0, ttl_max=1000.0)
    assert effective_threshold(p, 0.0) == p.threshold
    assert effective_ttl(p, 0.0) == p.ttl
    assert effective_threshold(p, 1.0) == 0.7
    assert effective_ttl(p, 1.0) == pytest.approx(369.0)
    safe = p.model_copy(update={"safety_critical": True})
    assert effective_threshold(safe, 1.0) == p.threshold
    assert effective_ttl(safe, 1.0) == p.ttl


def test_6_hits_never_fall_with_load_for_a_frozen_cache(who: Partition) -> None:
    rng = np.random.default_rng(6)
    loaded = {"threshold": 0.9, "floor": 0.7, "delta": 0.3, "kappa": 3, "ttl": 50, "ttl_max": 150}
    rules = Policies.parse({"default": loaded})
    encoder, base = TableEncoder(), unit(rng.standard_normal((30, 32)))
    for i in range(30):
        encoder.table[f"stored {i}"] = base[i]
        for j in range(10):
            encoder.table[f"asked {i} {j}"] = at_angle(base[i], rng.uniform(0.6, 0.99), rng)
    counts = []
    for load in np.linspace(0, 1, 11):
        clock, level = FakeClock(), [0.0]
        cache = SemanticCache(encoder, policies=rules, clock=clock, load=lambda model, level=level: level[0])
        for i in range(30):
            cache.insert(Query(f"stored {i}", who), Answer(str(i)))
            clock.tick(3)
        level[0] = float(load)
        found = [cache.lookup(Query(f"asked {i} {j}", who)) for i in range(30) for j in range(10)]
        counts.append(sum(f.status == "hit" for f in found))
        assert all(f.score >= 0.7 for f in found if f.status == "hit")
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_7_break_even_is_where_mean_latency_crosses() -> None:
    rng = np.random.default_rng(7)
    search, fetch, model, embed = 0.030, 0.002, 0.180, 0.004
    h = break_even(search, fetch, model, embed)
    assert h == pytest.approx(0.034 / 0.178)

    def mean_saving(rate: float) -> tuple[float, float]:
        hit = rng.random(200_000) < rate
        noise = rng.exponential(1.0, 200_000)
        with_cache = embed + search + np.where(hit, fetch, model * noise)
        saving = model * noise - with_cache
        return float(saving.mean()), float(saving.std() / np.sqrt(len(saving)))

    for rate, sign in ((h - 0.01, -1), (h + 0.01, 1)):
        mean, error = mean_saving(rate)
        assert sign * mean > 3 * error
    mean, error = mean_saving(h)
    assert abs(mean) < 4 * error
    assert break_even(0.001, 0.2, 0.1) == float("inf")


@pytest.mark.parametrize("stage", ["put", "before_put"])
def test_8_crash_between_put_and_index_leaves_nothing_dangling(store_factory, clock, who, stage, monkeypatch) -> None:
    class Crash(BaseException):
        pass

    store = store_factory()
    cache = SemanticCache(HashEncoder(), store=store, clock=clock)
    cache.insert(Query("kept question", who), Answer("kept"))
    if stage == "put":
        monkeypatch.setattr(cache._catalog, "add", lambda record: (_ for _ in ()).throw(Crash()))
    else:
        monkeypatch.setattr(store, "put", lambda record, answer: (_ for _ in ()).throw(Crash()))
    with pytest.raises(Crash):
        cache.insert(Query("lost question", who), Answer("lost"))
    monkeypatch.undo()
    cache.check()
    again = SemanticCache(HashEncoder(), store=store_factory(), clock=clock)
    again.check()
    assert again.lookup(Query("kept question", who)).answer == Answer("kept")
    assert (again.lookup(Query("lost question", who)).status == "hit") == (stage == "put")


def test_8_restart_gives_identical_lookups(store_factory, clock: FakeClock, who: Partition) -> None:
    rng = np.random.default_rng(8)
    encoder = TableEncoder()
    centres = unit(rng.standard_normal((15, 32)))
    for i in range(300):
        encoder.table[f"q{i}"] = at_angle(centres[rng.integers(15)], rng.uniform(0.8, 0.99), rng)
    rules = policies(code={"threshold": 0.95})
    cache = SemanticCache(encoder, policies=rules, store=store_factory(), clock=clock)
    for i in range(0, 300, 2):
        cache.insert(Query(f"q{i}", who, "code" if i % 4 else None), Answer(f"a{i}"))
        clock.tick(0.5)
    again = SemanticCache(encoder, policies=rules, store=store_factory(), clock=clock)
    for i in range(300):
        query = Query(f"q{i}", who, "code" if i % 4 else None)
        one, two = cache.lookup(query), again.lookup(query)
        assert (one.status, one.reason, one.answer, one.score) == (two.status, two.reason, two.answer, two.score)
