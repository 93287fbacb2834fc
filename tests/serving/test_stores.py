"""One suite for SQLite and Redis: documents, journal, several caches on one store, faults."""

from __future__ import annotations

import contextlib
import multiprocessing
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from elision.errors import OptionError, StoreUnavailable
from elision.serving.semantic import (
    Answer,
    CacheOptions,
    HashEncoder,
    Partition,
    Policies,
    Query,
    RedisStore,
    SemanticCache,
    SQLiteStore,
)
from elision.serving.semantic.store import Change, Record, new_id

from .conftest import FakeClock, free_port, start_redis


def record(text: str = "q", **fields) -> Record:
    base = {
        "id": new_id(),
        "fingerprint": f"fp-{text}",
        "partition": Partition("t", "m", "s"),
        "category": "c",
        "text": text,
        "created_at": 1.5,
        "ttl": None,
        "route": "caller",
        "encoder": "hash/256",
        "revision": "",
        "cost": 0.25,
        "vector": np.ones(4, np.float32) / 2,
    }
    return Record(**{**base, **fields})


def same(a: Record, b: Record) -> bool:
    pair = [(r.id, r.header(), r.vector_bytes()) for r in (a, b)]
    return pair[0] == pair[1]


def test_put_get_delete(store_factory) -> None:
    store = store_factory()
    one = record("ünï \U0001f98a \ud800", ttl=3.0)
    answer = Answer("line\nline", "m-1", {"total_tokens": 3}, {"reasoning_content": "hm"})
    store.put(one, answer)
    assert store.get(one.id) == answer
    assert same(next(iter(store.records())), one)
    assert same(next(iter(store.records([one.id, "unknown"]))), one)
    store.delete([one.id, "unknown"])
    assert store.get(one.id) is None
    assert list(store.records()) == []
    bare = record("no vector", vector=None)
    store.put(bare, answer)
    assert next(iter(store.records())).vector is None


def test_all_records_come_once_in_pages(store_factory) -> None:
    store = store_factory()
    made = [record(f"q{i}") for i in range(1203)]
    store.put_many([(r, Answer("a")) for r in made])
    assert [r.id for r in store.records()] == sorted(r.id for r in made)


def test_journal(store_factory) -> None:
    store = store_factory()
    start = store.head()
    one, two = record("1"), record("2")
    store.put(one, Answer("a"))
    cursor, changes = store.changes(start)
    assert changes == [Change("put", one.id)]
    store.put(two, Answer("b"))
    store.delete([one.id])
    cursor, changes = store.changes(cursor)
    assert changes == [Change("put", two.id), Change("del", one.id)]
    assert store.changes(cursor) == (cursor, [])
    assert store.head() == cursor


def test_a_trimmed_journal_says_so(store_factory) -> None:
    store = store_factory(journal=100)
    store.put(record("first"), Answer("a"))
    cursor = store.head()
    for i in range(1300):
        store.put(record(f"q{i}"), Answer("a"))
    assert store.changes(cursor) is None
    assert store.changes(store.head()) == (store.head(), [])


def test_two_caches_share_one_store(store_factory, clock: FakeClock, who: Partition) -> None:
    one = SemanticCache(HashEncoder(), store=store_factory(), clock=clock)
    two = SemanticCache(HashEncoder(), store=store_factory(), clock=clock)
    kept = one.insert(Query("what is the capital of france", who), Answer("Paris"))
    assert two.lookup(Query("what is the capital of france", who)).status == "miss"
    assert two.sync() == 1
    assert two.lookup(Query("what is the capital of France?", who)).answer == Answer("Paris")
    assert two.delete(kept.entry)
    assert one.sync() == 1
    assert one.lookup(Query("what is the capital of france", who)).status == "miss"
    # Both answer the same question before they hear of each other: both end with the newer answer, and one document.
    one.insert(Query("same", who), Answer("old"))
    clock.tick(1)
    two.insert(Query("same", who), Answer("new"))
    one.sync(), two.sync()
    assert one.lookup(Query("same", who)).answer == two.lookup(Query("same", who)).answer == Answer("new")
    one.sweep(), two.sweep(), one.sync(), two.sync()
    assert len(one) == len(two) == len(list(store_factory().records())) == 1
    one.check(), two.check()


def test_sync_survives_a_trimmed_journal(store_factory, clock: FakeClock, who: Partition) -> None:
    one = SemanticCache(HashEncoder(), store=store_factory(journal=50), clock=clock)
    two = SemanticCache(HashEncoder(), store=store_factory(journal=50), clock=clock)
    for i in range(1100):
        one.insert(Query(f"question number {i}", who), Answer(str(i)))
    two.sync()
    assert len(two) == len(one) == 1100
    two.check()


def test_a_document_deleted_behind_the_caches_back_is_a_miss(store_factory, who: Partition) -> None:
    cache = SemanticCache(HashEncoder(), store=store_factory())
    kept = cache.insert(Query("hello world", who), Answer("x"))
    store_factory().delete([kept.entry])
    assert cache.lookup(Query("hello world", who)).status == "miss"
    assert len(cache) == 0


def test_another_encoders_vectors_are_not_compared(store_factory, who: Partition) -> None:
    first = SemanticCache(HashEncoder(256), store=store_factory())
    first.insert(Query("hello big world", who), Answer("x"))
    second = SemanticCache(HashEncoder(64), store=store_factory())
    assert second.lookup(Query("hello big world", who)).reason == "exact"
    assert second.lookup(Query("hello big world!", who)).status == "miss"


def test_restart_drops_what_may_not_be_served_any_more(store_factory, clock: FakeClock, who: Partition) -> None:
    first = SemanticCache(
        HashEncoder(), store=store_factory(), clock=clock, policies=Policies.parse({"default": {"ttl": 100}})
    )
    for i in range(20):
        first.insert(Query(f"question {i}", who), Answer(str(i)))
        clock.tick(10)
    shorter = Policies.parse({"default": {"ttl": 50}})
    second = SemanticCache(
        HashEncoder(), store=store_factory(), clock=clock, policies=shorter, options=CacheOptions(capacity=3)
    )
    assert len(second) == 3
    assert {m.text for m in second.entries()} == {"question 19", "question 18", "question 17"}
    assert len(list(store_factory().records())) == 3
    third = SemanticCache(HashEncoder(), store=store_factory(), clock=clock, policies=Policies.parse({"revision": "2"}))
    assert len(third) == 0


def open_store(kind: str, target: str, prefix: str) -> RedisStore | SQLiteStore:
    return RedisStore(target, prefix=prefix) if kind == "redis" else SQLiteStore(target)


def write_until_killed(kind: str, target: str, prefix: str, number: int, pipe) -> None:
    """The victim: inserts for ever and says which entries were acknowledged."""
    options = CacheOptions(capacity=400)
    cache = SemanticCache(HashEncoder(), store=open_store(kind, target, prefix), options=options)
    cache.check()
    while True:
        query = Query(f"question {number} of this run", Partition("t", "m", "s"))
        assert cache.insert(query, Answer(f"answer {number}" * 50)).stored
        pipe.send(number)
        number += 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_kill_9_in_the_middle_of_writes_100_times(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each acknowledged entry is there after each of 100 kills, and no index entry points nowhere."""
    if kind == "redis":
        target, prefix = request.getfixturevalue("redis_url"), f"kill{time.monotonic_ns()}"
    else:
        target, prefix = str(tmp_path / "kill.db"), "-"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["elision.serving.semantic"])
    rng, acknowledged, cut = np.random.default_rng(0), [], 0
    for kill in range(100):
        ours, theirs = context.Pipe(duplex=False)
        start = acknowledged[-1] + 2 if acknowledged else 0  # the one in between may or may not have been stored
        process = context.Process(target=write_until_killed, args=(kind, target, prefix, start, theirs), daemon=True)
        process.start()
        theirs.close()
        acknowledged += [ours.recv() for _ in range(int(rng.integers(1, 12)))]
        time.sleep(float(rng.uniform(0, 0.002)))
        process.kill()
        process.join()
        assert process.exitcode == -9
        with contextlib.suppress(EOFError, OSError):  # the pipe ends where the victim was cut off
            while True:
                acknowledged.append(ours.recv())
        ours.close()
        store = open_store(kind, target, prefix)
        stored = {r.text: r.id for r in store.records()}
        cut += f"question {acknowledged[-1] + 1} of this run" in stored
        # The newest of them at each kill, all that the capacity holds after the last one.
        for number in acknowledged[-300 if kill == 99 else -40 :]:
            answer = store.get(stored[f"question {number} of this run"])
            assert answer is not None
            assert answer.text == f"answer {number}" * 50
        store.close()
    assert len(acknowledged) > 500
    assert cut > 0, "at least once the kill fell between storing and acknowledging"
    last = SemanticCache(HashEncoder(), store=open_store(kind, target, prefix), options=CacheOptions(capacity=400))
    last.check()
    assert len(last) == 400
    last.close()


def test_full_disk_degrades_and_recovers(tmp_path: Path, who: Partition) -> None:
    store = SQLiteStore(tmp_path / "full.db")
    cache = SemanticCache(HashEncoder(), store=store, options=CacheOptions(retry=0.0))
    kept = cache.insert(Query("kept", who), Answer("kept"))
    assert kept.stored
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages + 2}")  # SQLite's own "database or disk is full"
    reasons = {cache.insert(Query(f"question {i}", who), Answer("x" * 5000)).reason for i in range(10)}
    assert "store-unavailable" in reasons
    assert "full" in (cache.problem() or "")
    assert cache.lookup(Query("kept", who)).answer == Answer("kept")
    cache.check()
    store._db.execute("PRAGMA max_page_count=100000")
    assert cache.insert(Query("again", who), Answer("x" * 5000)).stored
    assert cache.problem() is None
    cache.check()


def test_redis_down_and_back(tmp_path: Path, who: Partition) -> None:
    port = free_port()
    server = start_redis(tmp_path, port)
    cache = SemanticCache(
        HashEncoder(),
        store=RedisStore(f"redis://127.0.0.1:{port}/0", timeout=0.3),
        options=CacheOptions(retry=0.2),
    )
    cache.insert(Query("hello there", who), Answer("x"))
    server.kill()
    server.wait()
    found = cache.lookup(Query("hello there", who))
    assert (found.status, found.reason) == ("miss", "store-unavailable")
    assert cache.insert(found, Answer("y")).reason == "store-unavailable"
    start = time.perf_counter()
    for _ in range(100):
        assert cache.lookup(Query("hello there", who)).status == "miss"
    assert time.perf_counter() - start < 5  # the breaker: not 100 time-outs
    assert "Redis" in (cache.problem() or "")
    with pytest.raises(StoreUnavailable):
        cache.purge("acme")
    server = start_redis(tmp_path, port)
    try:
        time.sleep(0.25)
        cache.heal()
        cache.sync()  # the server lost everything: the journal does not reach back, the catalog is built again
        assert cache.problem() is None
        assert len(cache) == 0
        assert cache.insert(Query("hello there", who), Answer("z")).stored
        assert cache.lookup(Query("hello there", who)).answer == Answer("z")
        cache.check()
    finally:
        server.kill()
        server.wait()


def test_redis_absent_at_the_start(who: Partition) -> None:
    cache = SemanticCache(
        HashEncoder(), store=RedisStore(f"redis://127.0.0.1:{free_port()}/0", timeout=0.2), load_now=False
    )
    assert cache.lookup(Query("a", who)).reason == "warming"
    with pytest.raises(StoreUnavailable, match="check that the server runs"):
        cache.load()
    assert cache.lookup(Query("a", who)).reason == "store-unavailable"


def test_sqlite_errors_name_the_cause(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="cannot open"):
        SQLiteStore(tmp_path)
    (tmp_path / "not.db").write_bytes(b"this is no database at all, but it is long enough to be looked at" * 20)
    with pytest.raises(StoreUnavailable, match="not a database"):
        SQLiteStore(tmp_path / "not.db")
    with pytest.raises(OptionError, match="'NORMAL' or 'FULL'"):
        SQLiteStore(tmp_path / "x.db", synchronous="OFF")


def test_a_lock_held_by_another_process_is_an_error_not_a_hang(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "locked.db", timeout=0.1)
    other = sqlite3.connect(tmp_path / "locked.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        store.put(record(), Answer("a"))
    other.execute("ROLLBACK")
    store.put(record(), Answer("a"))
    other.close()
    store.close()
