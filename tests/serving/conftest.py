"""Shared fixtures: a clock, counting fakes, stores of both kinds."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from elision.serving.semantic import Partition, RedisStore, SQLiteStore, Store
from elision.serving.semantic.index import Vector


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


class TableEncoder:
    """Texts to vectors that the test chooses; counts its calls. Unknown texts get a random direction of their own."""

    def __init__(self, dim: int = 32, table: dict[str, Vector] | None = None) -> None:
        self.dim, self.name, self.table, self.calls = dim, f"table/{dim}", dict(table or {}), 0

    def __call__(self, texts: list[str]) -> Vector:
        self.calls += 1
        return np.stack([self.table.get(t, self._own(t)) for t in texts])

    def _own(self, text: str) -> Vector:
        seed = int.from_bytes(text.encode()[-8:].rjust(8, b"\0"), "little") ^ len(text)
        v = np.random.default_rng(seed).standard_normal(self.dim).astype(np.float32)
        return v / np.linalg.norm(v)

    def covers(self, text: str) -> bool:
        return len(text) <= 1000


class CountingStore:
    """A store that counts what is asked of it."""

    def __init__(self, store: Store) -> None:
        self.inner, self.gets, self.puts = store, 0, 0

    def get(self, id):
        self.gets += 1
        return self.inner.get(id)

    def put(self, record, answer):
        self.puts += 1
        self.inner.put(record, answer)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def at_angle(base: Vector, cosine: float, rng: np.random.Generator) -> Vector:
    """A unit vector with exactly this cosine to a unit vector [dim]."""
    other = rng.standard_normal(len(base)).astype(np.float32)
    other -= (other @ base) * base
    other /= np.linalg.norm(other)
    v = cosine * base + np.sqrt(1 - cosine**2) * other
    return (v / np.linalg.norm(v)).astype(np.float32)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_redis(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A Redis server on loopback that belongs to the test; ended by its pid."""
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), 0.1).close()
            return process
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise RuntimeError("redis-server did not start")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian package redis-server)")
    port = free_port()
    process = start_redis(tmp_path_factory.mktemp("redis"), port)
    yield f"redis://127.0.0.1:{port}/0"
    process.kill()
    process.wait()


@pytest.fixture(params=["sqlite", "redis"])
def store_factory(request: pytest.FixtureRequest, tmp_path: Path):
    """Opens the same store again and again, as several processes or restarts would."""
    opened: list[Store] = []
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        prefix = f"t{time.monotonic_ns()}"

        def make(**options) -> Store:
            opened.append(RedisStore(url, prefix=prefix, **options))
            return opened[-1]
    else:

        def make(**options) -> Store:
            opened.append(SQLiteStore(tmp_path / "cache.db", **options))
            return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def who() -> Partition:
    return Partition.of("acme", "gpt-x", system="Be brief.")
