"""The cache's memory of its entries: metadata, exact table, one vector index per partition and category, recency.

Spec: "Data" (in memory: category, scope, created_at, ttl; node -> id map) and "insert" (eviction inside the category,
    then from the
category most over quota). Whether the paper keeps one index or several is not stated. Here every (partition,
category) has its own,
so that a search cannot even see another tenant's vectors: neither its result nor its duration depends on them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from elision.serving.semantic.index import IndexOptions, Vector, VectorIndex
from elision.serving.semantic.store import Record


@dataclass(slots=True, eq=False)
class Meta:
    """An entry as the cache remembers it; the answer is in the store, the vector in the index."""

    id: str
    fingerprint: str
    cell: tuple[str, str]
    tenant: str
    model: str
    text: str
    created_at: float
    ttl: float | None
    cost: float
    slot: int | None
    hits: int = 0

    @property
    def category(self) -> str:
        """The category it was stored under."""
        return self.cell[1]


class Catalog:
    """All entries of one process. Not thread-safe: the cache holds its lock around every call.

    Args:
        dim: length of the vectors.
        options: shape of the indexes.
    """

    def __init__(self, dim: int, options: IndexOptions) -> None:
        self._dim, self._options = dim, options
        self._by_id: dict[str, Meta] = {}
        self._by_fingerprint: dict[str, Meta] = {}
        self._by_slot: dict[int, Meta] = {}
        self._by_category: dict[str, OrderedDict[str, Meta]] = {}  # least recently used first
        self._by_tenant: dict[str, OrderedDict[str, Meta]] = {}
        self._cells: dict[tuple[str, str], VectorIndex] = {}
        self._next_slot = 0
        self._repair_at = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Meta]:
        return iter(list(self._by_id.values()))

    def get(self, id: str) -> Meta | None:
        """The entry with this id."""
        return self._by_id.get(id)

    def exact(self, fingerprint: str) -> Meta | None:
        """The entry stored for exactly this question in this partition and category."""
        return self._by_fingerprint.get(fingerprint)

    def of_tenant(self, tenant: str) -> OrderedDict[str, Meta]:
        """One tenant's entries by id; nothing else is touched, so that others' entries cannot be timed."""
        return self._by_tenant.get(tenant, OrderedDict())

    def count(self, category: str) -> int:
        """Number of entries of a category."""
        return len(self._by_category.get(category, ()))

    def counts(self) -> dict[str, int]:
        """Number of entries by category; categories without entries are left out."""
        return {category: len(entries) for category, entries in self._by_category.items()}

    def tenants(self) -> dict[str, int]:
        """Number of entries by tenant."""
        return {tenant: len(entries) for tenant, entries in self._by_tenant.items()}

    def neighbours(self, cell: tuple[str, str], vector: Vector, k: int) -> list[tuple[Meta, float]]:
        """Up to k (entry, cosine) pairs of one cell, best first."""
        index = self._cells.get(cell)
        if index is None:
            return []
        return [(self._by_slot[slot], score) for slot, score in index.search(vector, k)]

    def add(self, record: Record) -> Meta:
        """Adds an entry whose id and fingerprint are not in use."""
        meta = self._remember(record)
        if meta.slot is not None and record.vector is not None:
            self._cell(meta.cell).add(meta.slot, record.vector)
        return meta

    def add_many(self, records: Iterable[Record], *, build: bool = True) -> None:
        """Adds many entries, cell by cell; without `build` large cells stay flat until their `build` is called."""
        groups: dict[tuple[str, str], tuple[list[int], list[Vector]]] = {}
        for record in records:
            meta = self._remember(record)
            if meta.slot is not None and record.vector is not None:
                slots, vectors = groups.setdefault(meta.cell, ([], []))
                slots.append(meta.slot)
                vectors.append(record.vector)
        for cell, (slots, vectors) in groups.items():
            index = self._cell(cell)
            index.add_many(slots, np.stack(vectors))
            if build:
                index.build()

    def indexes(self) -> list[VectorIndex]:
        """All indexes."""
        return list(self._cells.values())

    def remove(self, id: str) -> Meta | None:
        """Forgets an entry everywhere; `None` if it was not there."""
        meta = self._by_id.pop(id, None)
        if meta is None:
            return None
        if self._by_fingerprint.get(meta.fingerprint) is meta:
            del self._by_fingerprint[meta.fingerprint]
        for table, key in ((self._by_category, meta.category), (self._by_tenant, meta.tenant)):
            del table[key][id]
            if not table[key]:
                del table[key]
        if meta.slot is not None:
            del self._by_slot[meta.slot]
            index = self._cells[meta.cell]
            index.remove(meta.slot)
            if not len(index):
                del self._cells[meta.cell]
        return meta

    def touch(self, meta: Meta) -> None:
        """Counts a hit and makes the entry the most recently used one."""
        if self._by_id.get(meta.id) is not meta:
            return
        meta.hits += 1
        self._by_category[meta.category].move_to_end(meta.id)
        self._by_tenant[meta.tenant].move_to_end(meta.id)

    def oldest(self, category: str) -> Meta | None:
        """The least recently used entry of a category."""
        entries = self._by_category.get(category)
        return next(iter(entries.values())) if entries else None

    def oldest_of_tenant(self, tenant: str) -> Meta | None:
        """The least recently used entry of a tenant."""
        return next(iter(self.of_tenant(tenant).values()), None)

    def most_over_quota(self, limit: Callable[[str], int]) -> str:
        """The category whose count is the largest share of its limit."""
        return max(self._by_category, key=lambda category: len(self._by_category[category]) / limit(category))

    def repair(self, portion: int = 200) -> int:
        """Makes the next `portion` entries findable again if evictions cut them off; goes round all of them.

        Returns:
            Number of entries repaired.
        """
        slots = list(islice(self._by_slot, self._repair_at, self._repair_at + portion))
        self._repair_at = self._repair_at + portion if slots else 0
        repaired = 0
        for slot in slots:
            repaired += self._cells[self._by_slot[slot].cell].repair([slot])
        return repaired

    def nbytes(self) -> int:
        """Bytes of vectors and graphs."""
        return sum(index.nbytes() for index in self._cells.values())

    def check(self) -> None:
        """Checks that all tables agree.

        Raises:
            AssertionError: naming the first disagreement.
        """
        for meta in self._by_id.values():
            assert self._by_fingerprint.get(meta.fingerprint) is meta, f"{meta.id} is not in the exact table"
            assert meta.id in self._by_category[meta.category], f"{meta.id} is not in its category"
            assert meta.id in self._by_tenant[meta.tenant], f"{meta.id} is not in its tenant's table"
            assert meta.slot is None or meta.slot in self._cells[meta.cell], f"{meta.id} is not in its index"
        in_cells = sum(len(index) for index in self._cells.values())
        assert in_cells == len(self._by_slot), f"{in_cells} vectors for {len(self._by_slot)} slots"
        for table in (self._by_category, self._by_tenant):
            assert sum(map(len, table.values())) == len(self._by_id) == len(self._by_fingerprint), "a table has strays"

    def _cell(self, cell: tuple[str, str]) -> VectorIndex:
        index = self._cells.get(cell)
        if index is None:
            index = self._cells[cell] = VectorIndex(self._dim, self._options)
        return index

    def _remember(self, record: Record) -> Meta:
        slot = None
        if record.vector is not None:
            slot, self._next_slot = self._next_slot, self._next_slot + 1
        p = record.partition
        cell = (p.key, record.category)
        meta = Meta(
            record.id,
            record.fingerprint,
            cell,
            p.tenant,
            p.model,
            record.text,
            record.created_at,
            record.ttl,
            record.cost,
            slot,
        )
        self._by_id[meta.id] = self._by_fingerprint[meta.fingerprint] = meta
        self._by_category.setdefault(meta.category, OrderedDict())[meta.id] = meta
        self._by_tenant.setdefault(meta.tenant, OrderedDict())[meta.id] = meta
        if slot is not None:
            self._by_slot[slot] = meta
        return meta
