"""A store behind a circuit breaker: after a failure it is left alone, so that requests do not wait for time-outs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

from elision.errors import StoreUnavailable
from elision.serving.semantic.load import Clock
from elision.serving.semantic.store import Answer, Change, Record, Store

T = TypeVar("T")
Side = Literal["read", "write"]


class GuardedStore:
    """A `Store` whose reads and writes each have a breaker: a full disk stops writes, not reads.

    Args:
        store: the store proper.
        clock: seconds; monotonic.
        retry: seconds after a failure in which calls fail at once.
    """

    def __init__(self, store: Store, clock: Clock, retry: float = 2.0) -> None:
        self.store = store
        self._clock, self._retry = clock, retry
        self._lock = threading.Lock()
        self._failed: dict[Side, tuple[float, str]] = {}
        self.failures = 0

    def problem(self) -> str | None:
        """What last failed and has not worked since; `None` in good health."""
        with self._lock:
            return "; ".join(text for _, text in self._failed.values()) or None

    def heal(self) -> None:
        """Tries the failing sides again if their pause is over.

        Raises:
            StoreUnavailable: if the store still fails.
        """
        with self._lock:
            sides = list(self._failed)
        for side in sides:
            # A delete of nothing that exists is the mildest write.
            self._run(side, self.store.ping if side == "read" else lambda: self.store.delete(["-"]))

    def _run(self, side: Side, action: Callable[[], T]) -> T:
        with self._lock:
            failed = self._failed.get(side)
        if failed is not None and self._clock() - failed[0] < self._retry:
            raise StoreUnavailable(failed[1])
        try:
            result = action()
        except StoreUnavailable as error:
            with self._lock:
                self.failures += 1
                self._failed[side] = (self._clock(), str(error))
            raise
        if failed is not None:
            with self._lock:
                self._failed.pop(side, None)
        return result

    def put(self, record: Record, answer: Answer) -> None:
        """See `Store.put`."""
        self._run("write", lambda: self.store.put(record, answer))

    def get(self, id: str) -> Answer | None:
        """See `Store.get`."""
        return self._run("read", lambda: self.store.get(id))

    def delete(self, ids: Iterable[str]) -> None:
        """See `Store.delete`."""
        self._run("write", lambda: self.store.delete(ids))

    def records(self, ids: Iterable[str] | None = None) -> Iterator[Record]:
        """See `Store.records`; read whole, so that a failure half-way is a failure of the call."""
        return iter(self._run("read", lambda: list(self.store.records(ids))))

    def head(self) -> str:
        """See `Store.head`."""
        return self._run("read", self.store.head)

    def changes(self, cursor: str) -> tuple[str, list[Change]] | None:
        """See `Store.changes`."""
        return self._run("read", lambda: self.store.changes(cursor))

    def ping(self) -> None:
        """See `Store.ping`; asks even while the breaker is open."""
        self.store.ping()

    def close(self) -> None:
        """See `Store.close`."""
        self.store.close()
