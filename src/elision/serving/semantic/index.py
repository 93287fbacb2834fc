"""Nearest neighbours in one partition: a flat scan while it is small, HNSW when it has grown.

The graph is built in portions beside the flat form, which answers until the graph is complete: no insertion and no
lookup waits for the whole of it, and after a restart the first lookups are slow (a scan) rather than impossible.

Spec: "Data" (in-memory HNSW over unit vectors, similarity = dot product), hyper-parameters M = 16, efConstruction =
    200, and
"Pitfalls" (re-rank the beam, test against brute force). The spec's early stop at the first similarity >= τ is
replaced by ranking the whole beam, because the first neighbour above the threshold need not be the best.

The router searches with efSearch = 20; the default here is 64, which costs some tens of microseconds and finds more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from usearch.index import Index as Graph

from elision.errors import OptionError

Vector = npt.NDArray[np.float32]
# Vectors moved into a growing graph per insertion: it catches up, and no insertion waits for all of it.
_STEP = 8


@dataclass(frozen=True)
class IndexOptions:
    """Shape of the graph.

    Attributes:
        m: links per node and layer (M).
        ef_construction: beam width while inserting.
        ef_search: beam width while searching; at least the number of entries makes the search exhaustive.
        promote: entries from which a partition gets a graph; below it, scanning all vectors is exact and as fast.
        dtype: storage of vectors inside the graph: "f32", or "f16" for half the memory and scores good to about 1e-3.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # a misspelt option in YAML is an error

    m: int = 16
    ef_construction: int = 200
    ef_search: int = 64
    promote: int = 1024
    dtype: str = "f32"

    def __post_init__(self) -> None:
        if min(self.m, self.ef_construction, self.ef_search) < 2 or self.promote < 1:
            raise OptionError(
                f"m {self.m}, ef_construction {self.ef_construction}, ef_search {self.ef_search}: all must be >= 2"
            )
        if self.dtype not in ("f32", "f16"):
            raise OptionError(f"dtype {self.dtype!r} is not 'f32' or 'f16'")


class VectorIndex:
    """Slots (non-negative integers) by unit vector. Thread-safe.

    Example:
        >>> index = VectorIndex(2)
        >>> index.add(7, np.array([1, 0], np.float32)); index.search(np.array([0.8, 0.6], np.float32), 1)
        [(7, 0.8...)]
    """

    def __init__(self, dim: int, options: IndexOptions | None = None) -> None:
        if dim < 1:
            raise OptionError(f"dim {dim} must be at least 1")
        self.dim = dim
        self.options = options or IndexOptions()
        self._lock = threading.RLock()
        self._graph: Graph | None = None
        self._rows: Vector = np.empty(
            (0, dim), np.float32
        )  # flat form: [capacity, dim], of which the first len(_slots) are used
        self._slots: list[int] = []
        self._row_of: dict[int, int] = {}
        # While a graph is being built, the flat form goes on answering; these say what the graph still has to learn.
        self._build_lock = threading.Lock()
        self._next: Graph | None = None
        self._pending: list[int] = []
        self._gone: set[int] = set()

    def __len__(self) -> int:
        """Number of live vectors."""
        with self._lock:
            return len(self._graph) if self._graph is not None else len(self._slots)

    def __contains__(self, slot: int) -> bool:
        with self._lock:
            return slot in self._graph if self._graph is not None else slot in self._row_of

    def add(self, slot: int, vector: Vector) -> None:
        """Adds one unit vector [dim] under a slot that is not in use.

        Raises:
            OptionError: for a wrong length, a vector that is not of unit norm, or a slot in use.
        """
        self.add_many([slot], np.asarray(vector, np.float32)[None])

    def add_many(self, slots: Iterable[int], vectors: Vector) -> None:
        """Adds unit vectors [n, dim] under n unused slots; after many at once, call `build` to have the graph."""
        slots = list(slots)
        vectors = np.ascontiguousarray(vectors, np.float32)
        self._check(slots, vectors)
        with self._lock:
            taken = [slot for slot in slots if slot in self]
            if taken or len(set(slots)) < len(slots):
                raise OptionError(f"slots {taken[:3] or slots[:3]} are in use or given twice: a slot names one vector")
            if self._graph is not None:
                # One thread: parallel insertion left up to 3 of 2,000 nodes unreachable, and differs from run to run.
                self._graph.add(np.asarray(slots, np.uint64), vectors, threads=1, copy=True)
                return
            self._append(slots, vectors)
            if self._next is not None:
                self._pending += slots
                self._gone.difference_update(slots)
            elif len(self._slots) > self.options.promote:
                self._next, self._pending = self._new_graph(), list(self._slots)
        # Whoever builds in the background goes on by itself; the cache's lock is held here, so nobody may wait.
        if self._build_lock.acquire(blocking=False):
            try:
                self._build(_STEP + 1)
            finally:
                self._build_lock.release()

    def build(self, most: int | None = None) -> bool:
        """Moves vectors into the graph that is being built; searches go on meanwhile, in the flat form.

        Args:
            most: at most so many (about a millisecond each); `None` for all.

        Returns:
            Whether nothing is left to build.
        """
        with self._build_lock:
            return self._build(most)

    def _build(self, most: int | None) -> bool:
        """See `build`; the build lock is held."""
        with self._lock:
            graph = self._next
            if graph is None:
                return True
            batch, self._pending = self._pending[:most], self._pending[most:] if most is not None else []
            batch = [slot for slot in dict.fromkeys(batch) if slot in self._row_of]
            vectors = self._rows[[self._row_of[slot] for slot in batch]]  # [n, dim], a copy
        # Nobody else touches the new graph, so nobody waits here.
        for slot in batch:
            if slot in graph:
                graph.remove(slot)
        if batch:
            graph.add(np.asarray(batch, np.uint64), vectors, threads=1, copy=True)
        with self._lock:
            if self._pending:
                return False
            for slot in self._gone:
                if slot in graph:
                    graph.remove(slot)
            self._graph, self._next, self._gone = graph, None, set()
            self._rows, self._slots, self._row_of = np.empty((0, self.dim), np.float32), [], {}
            return True

    def remove(self, slot: int) -> bool:
        """Removes a slot; `False` if it was not there."""
        with self._lock:
            if slot not in self:
                return False
            if self._graph is not None:
                self._graph.remove(slot)
                return True
            if self._next is not None:
                self._gone.add(slot)
            row, last = self._row_of.pop(slot), self._slots.pop()
            if last != slot:
                self._slots[row], self._row_of[last] = last, row
                self._rows[row] = self._rows[len(self._slots)]
            return True

    def search(self, vector: Vector, k: int) -> list[tuple[int, float]]:
        """Up to k (slot, cosine) pairs, best first.

        Args:
            vector: a unit vector [dim].
            k: number of neighbours wanted, at least 1.
        """
        if k < 1:
            raise OptionError(f"k {k} must be at least 1")
        vector = np.ascontiguousarray(vector, np.float32)
        with self._lock:
            if self._graph is None:
                return self._scan(vector, k)
            self._graph.expansion_search = max(self.options.ef_search, k)
            found = self._graph.search(vector, min(k, len(self._graph)), threads=1)
            # Scores of the beam, best first; usearch returns the inner-product *distance* 1 - cos.
            return [(int(slot), 1.0 - float(d)) for slot, d in zip(found.keys, found.distances, strict=True)]

    def exhaustive(self, vector: Vector, k: int) -> list[tuple[int, float]]:
        """The true k nearest by scanning everything: the reference for `search`."""
        vector = np.ascontiguousarray(vector, np.float32)
        with self._lock:
            if self._graph is None:
                return self._scan(vector, k)
            found = self._graph.search(vector, min(k, len(self._graph)), exact=True, threads=1)
            return [(int(slot), 1.0 - float(d)) for slot, d in zip(found.keys, found.distances, strict=True)]

    def repair(self, slots: Iterable[int]) -> int:
        """Links those of the given slots again that a search for their own vector no longer reaches.

        Removals may cut a node off from the graph's entry point (a pitfall in the spec): seen for 5 in 10,000 entries
        after every entry had been replaced twice.

        Returns:
            Number of slots repaired.
        """
        repaired = 0
        for slot in slots:
            with self._lock:
                if self._graph is None or slot not in self._graph:
                    continue
                vector = np.asarray(self._graph.get(slot), np.float32).reshape(self.dim)
                found = self.search(vector, 4)
                # Equal vectors may fill the beam: then the slot's neighbours are as good as itself.
                if any(key == slot for key, _ in found) or found[-1][1] > 1.0 - 1e-4:
                    continue
                self._graph.remove(slot)
                self._graph.add(slot, vector, threads=1, copy=True)
                repaired += 1
        return repaired

    def nbytes(self) -> int:
        """Bytes held by vectors and graph, as reported by their owners."""
        with self._lock:
            graphs = (graph for graph in (self._graph, self._next) if graph is not None)
            return int(self._rows.nbytes) + sum(int(graph.memory_usage) for graph in graphs)

    def _check(self, slots: list[int], vectors: Vector) -> None:
        if vectors.shape != (len(slots), self.dim):
            raise OptionError(
                f"vectors of shape {vectors.shape} for {len(slots)} slots: need [{len(slots)}, {self.dim}]"
            )
        norms = np.linalg.norm(vectors, axis=1)
        # Un-normalised vectors would turn the dot product into something that no threshold means.
        if not np.all(np.abs(norms - 1.0) < 1e-3):
            worst = float(norms[int(np.argmax(np.abs(norms - 1.0)))])
            raise OptionError(f"a vector of norm {worst:.4g}: need unit norm (divide by it first)")

    def _scan(self, vector: Vector, k: int) -> list[tuple[int, float]]:
        n = len(self._slots)
        if not n:
            return []
        scores = self._rows[:n] @ vector  # [n]
        top = np.argpartition(-scores, k - 1)[:k] if k < n else np.arange(n)
        top = top[np.argsort(-scores[top], kind="stable")]
        return [(self._slots[row], float(scores[row])) for row in top]

    def _append(self, slots: list[int], vectors: Vector) -> None:
        n, need = len(self._slots), len(self._slots) + len(slots)
        if need > len(self._rows):
            grown = np.empty((max(8, need, 2 * len(self._rows)), self.dim), np.float32)
            grown[:n] = self._rows[:n]
            self._rows = grown
        self._rows[n:need] = vectors
        for offset, slot in enumerate(slots):
            self._row_of[slot] = n + offset
        self._slots += slots

    def _new_graph(self) -> Graph:
        o = self.options
        return Graph(
            ndim=self.dim,
            metric="ip",
            dtype=o.dtype,
            connectivity=o.m,
            expansion_add=o.ef_construction,
            expansion_search=o.ef_search,
        )
