"""Single flight: identical questions that miss at the same time share one upstream request.

The upstream is read by a task of its own, which keeps what it reads; every caller, the first one too, reads from
there. So a slow
caller delays nobody, a caller that leaves takes nothing with it, and the request is given up when all have left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

Head = tuple[int, list[tuple[bytes, bytes]]]
"""Status and headers of a reply."""


@dataclass
class Flight:
    """One upstream request and its readers.

    Attributes:
        keep: bytes up to which the whole reply is kept, so that others may join late; beyond, reading keeps pace with
            the slowest.
    """

    keep: int = 4_000_000
    _chunks: list[bytes] = field(default_factory=list)
    _first: int = 0  # number of chunks that were dropped from the front
    _size: int = 0  # bytes kept
    _head: Head | None = None
    _error: BaseException | None = None
    _ended: bool = False
    _readers: dict[int, int] = field(default_factory=dict)  # reader -> next chunk
    _number: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _task: asyncio.Task[None] | None = None

    @property
    def joinable(self) -> bool:
        """Whether a new caller can still get all of the reply."""
        return self._first == 0 and self._error is None

    @property
    def readers(self) -> int:
        """Number of callers that are reading."""
        return len(self._readers)

    def start(self, run: Callable[[Flight], Awaitable[None]]) -> None:
        """Starts the task that reads the upstream; it is cancelled when all readers have left."""

        async def task() -> None:
            try:
                await run(self)
            except BaseException as error:
                # Handed to every reader, who raises it; a cancelled task has no readers.
                await self._end(error)
                if isinstance(error, asyncio.CancelledError):
                    raise
            else:
                await self._end(None)

        self._task = asyncio.create_task(task())

    async def began(self, head: Head) -> None:
        """Status and headers are here."""
        async with self._changed:
            self._head = head
            self._changed.notify_all()

    async def push(self, chunk: bytes) -> None:
        """The next bytes are here; waits for the slowest reader when more than `keep` bytes would be held."""
        async with self._changed:
            self._chunks.append(chunk)
            self._size += len(chunk)
            self._changed.notify_all()
            while self._size > self.keep:
                self._trim()
                if self._size <= self.keep:
                    return
                await self._changed.wait()

    def _trim(self) -> None:
        slowest = min(self._readers.values(), default=self._first + len(self._chunks))
        while self._first < slowest and self._chunks:
            self._size -= len(self._chunks.pop(0))
            self._first += 1

    async def _end(self, error: BaseException | None) -> None:
        async with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def join(self) -> Reader:
        """A reader of the whole reply."""
        self._number += 1
        self._readers[self._number] = 0
        return Reader(self, self._number)


class Reader:
    """One caller's view of a flight; must be closed."""

    def __init__(self, flight: Flight, number: int) -> None:
        self._flight, self._number = flight, number

    async def head(self) -> Head:
        """Status and headers.

        Raises:
            BaseException: whatever ended the flight before it had a head.
        """
        f = self._flight
        async with f._changed:
            await f._changed.wait_for(lambda: f._head is not None or f._ended)
        if f._head is None:
            raise f._error or ConnectionError("the upstream's reply had no head")
        return f._head

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body.

        Raises:
            BaseException: whatever ended the flight before the body was whole.
        """
        f = self._flight
        while True:
            async with f._changed:
                at = f._readers[self._number]
                await f._changed.wait_for(lambda at=at: at < f._first + len(f._chunks) or f._ended)  # type: ignore[misc]
                if at >= f._first + len(f._chunks):
                    if f._error is not None:
                        raise f._error
                    return
                chunk = f._chunks[at - f._first]
                f._readers[self._number] = at + 1
                if f._size > f.keep:
                    f._changed.notify_all()
            yield chunk

    async def close(self) -> None:
        """Leaves; the last one to leave an unfinished flight ends it."""
        f = self._flight
        f._readers.pop(self._number, None)
        if not f._readers and not f._ended and f._task is not None:
            f._task.cancel()
        async with f._changed:
            f._changed.notify_all()


class Flights:
    """The flights now in the air, by fingerprint. For one event loop."""

    def __init__(self, keep: int = 4_000_000) -> None:
        self._flights: dict[str, Flight] = {}
        self._keep = keep

    def __len__(self) -> int:
        return len(self._flights)

    def board(self, key: str | None, run: Callable[[Flight], Awaitable[None]]) -> tuple[Reader, bool]:
        """Joins the flight for a fingerprint, or starts one; `None` always flies alone.

        Returns:
            A reader, and whether it joined somebody else's flight.
        """
        flight = self._flights.get(key) if key is not None else None
        if flight is not None and flight.joinable and flight.readers:
            return flight.join(), True
        flight = Flight(self._keep)
        reader = flight.join()
        if key is None:
            flight.start(run)
            return reader, False
        self._flights[key] = flight

        async def landing(flight: Flight) -> None:
            try:
                await run(flight)
            finally:
                if self._flights.get(key) is flight:
                    del self._flights[key]

        flight.start(landing)
        return reader, False
