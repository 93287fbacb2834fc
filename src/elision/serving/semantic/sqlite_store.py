"""Documents in one SQLite file (write-ahead log): the default store, nothing to install or start."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from elision.errors import OptionError, StoreUnavailable
from elision.serving.semantic.store import Answer, Change, Record

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries
    (id TEXT PRIMARY KEY, header TEXT NOT NULL, vector BLOB NOT NULL, answer TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS journal (seq INTEGER PRIMARY KEY AUTOINCREMENT, op TEXT NOT NULL, id TEXT NOT NULL);
"""
_BATCH = 500


class SQLiteStore:
    """A store in a file that several threads, and several processes of one machine, may use at once.

    Args:
        path: the file; its folder is made. ":memory:" keeps everything in this process.
        synchronous: "NORMAL" survives the death of the process at any moment; "FULL" also survives loss of power, at
            one disk flush per entry.
        timeout: seconds to wait for another process's write.
        journal: lines of the change journal that are kept for other processes.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        synchronous: Literal["NORMAL", "FULL"] = "NORMAL",
        timeout: float = 5.0,
        journal: int = 10_000,
    ) -> None:
        if synchronous not in ("NORMAL", "FULL"):
            raise OptionError(f"synchronous {synchronous!r} is not 'NORMAL' or 'FULL'")
        self.path = str(path)
        self._journal = journal
        self._writes = 0
        self._lock = threading.Lock()
        self._read_lock = threading.Lock()
        if self.path != ":memory:":
            self._prepare(Path(self.path))
        self._db = self._open(synchronous, timeout)
        self._run(self._lock, lambda: self._db.executescript(_SCHEMA))
        # A second connection: in WAL mode a read never waits for a write. A memory database has only the one.
        self._reader = self._db if self.path == ":memory:" else self._open(synchronous, timeout)
        if self._reader is self._db:
            self._read_lock = self._lock

    def _prepare(self, path: Path) -> None:
        """Makes folder and file; only their owner may read what people asked."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.touch(mode=0o600)
        except OSError as error:
            raise StoreUnavailable(
                f"cannot open {path}: {error}; check the path, its rights and the free space"
            ) from error

    def _open(self, synchronous: str, timeout: float) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self.path, timeout=timeout, check_same_thread=False, isolation_level=None)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(f"PRAGMA synchronous={synchronous}")
            return db
        except sqlite3.Error as error:
            raise StoreUnavailable(
                f"cannot open {self.path}: {error}; check the path, its rights and the free space"
            ) from error

    def _run(self, lock: threading.Lock, action: Callable[[], T]) -> T:
        with lock:
            try:
                return action()
            except sqlite3.Error as error:
                raise StoreUnavailable(
                    f"SQLite store {Path(self.path).name}: {error}; check free space, rights and locks"
                ) from error

    def _write(self, action: Callable[[sqlite3.Connection], None]) -> None:
        def transaction() -> None:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                action(self._db)
                self._writes += 1
                if self._writes % 1000 == 0:
                    self._db.execute(
                        "DELETE FROM journal WHERE seq <= (SELECT MAX(seq) FROM journal) - ?", (self._journal,)
                    )
                self._db.execute("COMMIT")
            finally:
                # After a full disk SQLite may have rolled back by itself already.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

        self._run(self._lock, transaction)

    def put(self, record: Record, answer: Answer) -> None:
        """See `Store.put`."""
        row = (record.id, record.header(), record.vector_bytes(), answer.dump())

        def action(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", row)
            db.execute("INSERT INTO journal (op, id) VALUES ('put', ?)", (record.id,))

        self._write(action)

    def put_many(self, items: Iterable[tuple[Record, Answer]]) -> None:
        """Stores many entries in one transaction: all of them or none."""
        rows = [(r.id, r.header(), r.vector_bytes(), a.dump()) for r, a in items]

        def action(db: sqlite3.Connection) -> None:
            db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", rows)
            db.executemany("INSERT INTO journal (op, id) VALUES ('put', ?)", [(row[0],) for row in rows])

        self._write(action)

    def get(self, id: str) -> Answer | None:
        """See `Store.get`."""
        row = self._run(
            self._read_lock, lambda: self._reader.execute("SELECT answer FROM entries WHERE id = ?", (id,)).fetchone()
        )
        return None if row is None else Answer.read(row[0])

    def delete(self, ids: Iterable[str]) -> None:
        """See `Store.delete`."""
        keys = [(id,) for id in ids]
        if not keys:
            return

        def action(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM entries WHERE id = ?", keys)
            db.executemany("INSERT INTO journal (op, id) VALUES ('del', ?)", keys)

        self._write(action)

    def records(self, ids: Iterable[str] | None = None) -> Iterator[Record]:
        """See `Store.records`; all entries come in order of their id."""
        if ids is None:
            yield from self._all()
            return
        for id in ids:
            row = self._run(self._read_lock, lambda key=id: self._row(key))  # type: ignore[misc]
            if row is not None and (record := Record.read(*row)) is not None:
                yield record

    def _row(self, id: str) -> tuple[str, str, bytes] | None:
        row: tuple[str, str, bytes] | None = self._reader.execute(
            "SELECT id, header, vector FROM entries WHERE id = ?", (id,)
        ).fetchone()
        return row

    def _all(self) -> Iterator[Record]:
        after = ""
        while True:
            rows = self._run(self._read_lock, lambda start=after: self._page(start))  # type: ignore[misc]
            yield from (record for row in rows if (record := Record.read(*row)) is not None)
            if len(rows) < _BATCH:
                return
            after = rows[-1][0]

    def _page(self, after: str) -> list[tuple[str, str, bytes]]:
        return self._reader.execute(
            "SELECT id, header, vector FROM entries WHERE id > ? ORDER BY id LIMIT ?", (after, _BATCH)
        ).fetchall()

    def head(self) -> str:
        """See `Store.head`."""
        row = self._run(
            self._read_lock, lambda: self._reader.execute("SELECT COALESCE(MAX(seq), 0) FROM journal").fetchone()
        )
        return str(row[0])

    def changes(self, cursor: str) -> tuple[str, list[Change]] | None:
        """See `Store.changes`."""
        seq = int(cursor)

        def action() -> tuple[int, list[tuple[int, Literal["put", "del"], str]]]:
            low = self._reader.execute("SELECT COALESCE(MIN(seq), 0) FROM journal").fetchone()[0]
            rows = self._reader.execute("SELECT seq, op, id FROM journal WHERE seq > ? ORDER BY seq", (seq,)).fetchall()
            return low, rows

        low, rows = self._run(self._read_lock, action)
        if low > seq + 1:
            return None
        return (str(rows[-1][0]) if rows else cursor), [Change(op, id) for _, op, id in rows]

    def ping(self) -> None:
        """See `Store.ping`."""
        self._run(self._read_lock, lambda: self._reader.execute("SELECT 1 FROM entries LIMIT 1").fetchone())

    def close(self) -> None:
        """See `Store.close`."""
        with self._lock:
            self._db.close()
        self._reader.close()
