"""Documents in Redis: one store for several proxies, also on several machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar, cast

from elision.errors import MissingDependency, StoreUnavailable
from elision.serving.semantic.store import Answer, Change, Record

T = TypeVar("T")
_BATCH = 500


class RedisStore:
    """A store in one Redis server.

    Keys: `{prefix}:e:{id}` is a hash (header, vector, answer), `{prefix}:ids` the set of ids, `{prefix}:log` a stream
        of changes.
    Entries carry no Redis expiry: a TTL belongs to the category's policy, which may change after the entry was stored.

    Args:
        url: such as "redis://localhost:6379/0" (also rediss:// and unix://).
        prefix: what all keys start with; two caches with different prefixes share nothing.
        timeout: seconds to wait for the server (the router's 2 s).
        journal: about how many lines of the change journal are kept.
    """

    def __init__(self, url: str, *, prefix: str = "elision", timeout: float = 2.0, journal: int = 10_000) -> None:
        try:
            import redis
        except ImportError as error:
            raise MissingDependency(
                "the Redis store needs the package 'redis': pip install 'elision[serve]'"
            ) from error
        self._errors = (redis.RedisError, OSError)
        self._redis = cast(Any, redis.Redis).from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)
        self._prefix, self._journal = prefix, journal

    def _run(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except self._errors as error:
            raise StoreUnavailable(
                f"Redis store: {error}; check that the server runs, its memory limit and the URL"
            ) from error

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    def put(self, record: Record, answer: Answer) -> None:
        """See `Store.put`."""
        self.put_many([(record, answer)])

    def put_many(self, items: Iterable[tuple[Record, Answer]]) -> None:
        """Stores many entries in one transaction: all of them or none."""

        def action() -> None:
            pipe = self._redis.pipeline(transaction=True)
            for record, answer in items:
                fields = {"header": record.header(), "vector": record.vector_bytes(), "answer": answer.dump()}
                pipe.hset(self._key("e", record.id), mapping=fields)
                pipe.sadd(self._key("ids"), record.id)
                pipe.xadd(self._key("log"), {"op": "put", "id": record.id}, maxlen=self._journal, approximate=True)
            pipe.execute()

        self._run(action)

    def get(self, id: str) -> Answer | None:
        """See `Store.get`."""
        data = self._run(lambda: self._redis.hget(self._key("e", id), "answer"))
        return None if data is None else Answer.read(data.decode())

    def delete(self, ids: Iterable[str]) -> None:
        """See `Store.delete`."""
        keys = list(ids)
        if not keys:
            return

        def action() -> None:
            pipe = self._redis.pipeline(transaction=True)
            for id in keys:
                pipe.delete(self._key("e", id))
                pipe.srem(self._key("ids"), id)
                pipe.xadd(self._key("log"), {"op": "del", "id": id}, maxlen=self._journal, approximate=True)
            pipe.execute()

        self._run(action)

    def records(self, ids: Iterable[str] | None = None) -> Iterator[Record]:
        """See `Store.records`; all entries come in order of their id."""
        wanted = sorted(self._all_ids()) if ids is None else ids
        for some in _batches(wanted, _BATCH):
            for id, (header, vector) in zip(some, self._fetch(some), strict=True):
                if header is not None and (record := Record.read(id, header.decode(), vector)) is not None:
                    yield record

    def _all_ids(self) -> list[str]:
        return [id.decode() for id in self._run(lambda: list(self._redis.sscan_iter(self._key("ids"), count=1000)))]

    def _fetch(self, ids: list[str]) -> list[tuple[bytes | None, bytes | None]]:
        def action() -> list[tuple[bytes | None, bytes | None]]:
            pipe = self._redis.pipeline(transaction=False)
            for id in ids:
                pipe.hmget(self._key("e", id), "header", "vector")
            return [(row[0], row[1]) for row in pipe.execute()]

        return self._run(action)

    def head(self) -> str:
        """See `Store.head`."""
        last = self._run(lambda: self._redis.xrevrange(self._key("log"), count=1))
        return last[0][0].decode() if last else "0-0"

    def changes(self, cursor: str) -> tuple[str, list[Change]] | None:
        """See `Store.changes`."""

        def action() -> tuple[list[Any], list[Any], int]:
            pipe = self._redis.pipeline(transaction=True)
            pipe.xrange(self._key("log"), count=1)
            pipe.xrange(self._key("log"), min=f"({cursor}")
            pipe.xlen(self._key("log"))
            first, rows, length = pipe.execute()
            return first, rows, length

        first, rows, length = self._run(action)
        if cursor == "0-0":
            lost = length >= self._journal
        else:
            # The line at the cursor itself is gone (trimmed, or the server was emptied): lines after it may be gone
            # too.
            lost = not first or _order(first[0][0].decode()) > _order(cursor)
        if lost:
            return None
        found = [Change("put" if row[b"op"] == b"put" else "del", row[b"id"].decode()) for _, row in rows]
        return (rows[-1][0].decode() if rows else cursor), found

    def ping(self) -> None:
        """See `Store.ping`."""
        self._run(self._redis.ping)

    def close(self) -> None:
        """See `Store.close`."""
        self._redis.close()


def _order(stream_id: str) -> tuple[int, int]:
    """A stream id as a pair that compares in time order."""
    ms, seq = stream_id.split("-")
    return int(ms), int(seq)


def _batches(ids: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of at most `size` ids."""
    rest = iter(ids)
    while some := list(islice(rest, size)):
        yield some
