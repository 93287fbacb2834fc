"""The entries of a cache: admitting, evicting, expiring, loading, sharing with other processes, administering.

Spec: "insert" (quota, eviction) and "Data"; pitfalls "TTL shortened by policy change must apply to existing entries"
    and "restart
rebuild gives identical lookups". How a cache decides on a hit is in `cache.py`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace

from elision.errors import StoreUnavailable
from elision.serving.semantic.catalog import Catalog, Meta
from elision.serving.semantic.classify import Classifier
from elision.serving.semantic.economics import Economics
from elision.serving.semantic.embed import Embedder
from elision.serving.semantic.health import GuardedStore
from elision.serving.semantic.keys import canonical, digest
from elision.serving.semantic.load import Clock
from elision.serving.semantic.policies import Policies, limit
from elision.serving.semantic.sqlite_store import SQLiteStore
from elision.serving.semantic.stats import Stats
from elision.serving.semantic.store import Answer, Record, Store
from elision.serving.semantic.types import CacheOptions
from elision.serving.semantic.verify import Verifier

_SWEEP = 1000


class Entries:
    """The state of a cache.

    Args:
        embedder: the encoder.
        policies: what each category allows; may be replaced live with `set_policies`.
        store: where documents are kept; by default in memory. Entries already in it are loaded.
        classifier: finds the category of queries that do not bring one; without it they take the default policy.
        verifier: a second look at similar pairs; `None` trusts the embedding alone.
        options: sizes.
        load: the load signal s in [0, 1] of a model.
        economics: measures break-even rates and may switch categories off.
        clock: seconds since the epoch, for ages.
        load_now: `False` leaves loading the store's entries to a later `load()`, until which every lookup is a miss
            ("warming"), and building the graphs of large cells to calls of `build`.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        policies: Policies | None = None,
        store: Store | None = None,
        classifier: Classifier | None = None,
        verifier: Verifier | None = None,
        options: CacheOptions | None = None,
        load: Callable[[str], float] = lambda model: 0.0,
        economics: Economics | None = None,
        clock: Clock = time.time,
        load_now: bool = True,
    ) -> None:
        self.embedder, self.classifier, self.verifier = embedder, classifier, verifier
        self.options = options or CacheOptions()
        self.policies = policies or Policies()
        self.store = GuardedStore(
            store if store is not None else SQLiteStore(":memory:"), time.monotonic, self.options.retry
        )
        self.economics = economics or Economics()
        self.stats = Stats()
        self._load_of, self._clock = load, clock
        self._lock = threading.RLock()  # guards the catalog; held for a millisecond at most
        self._write = threading.RLock()  # one writer at a time: put, evict and add belong together
        self._catalog = Catalog(embedder.dim, self.options.index)
        self._routes: OrderedDict[str, str] = OrderedDict()
        self._route_name = self._name_of_route()
        self._garbage: set[str] = set()
        self._cursor = ""
        self._not_ready: str | None = "warming"
        self._build_at_once = load_now
        if load_now:
            self.load()

    def __len__(self) -> int:
        """Number of entries."""
        with self._lock:
            return len(self._catalog)

    def _name_of_route(self) -> str:
        # The strictest candidate depends on the policies, so a category found under others must be found again.
        name = "" if self.classifier is None else self.classifier.name
        return f"{name}@{digest(canonical(self.policies.model_dump()))}"

    # ------------------------------------------------------------------ start, other processes, upkeep

    def load(self) -> int:
        """Builds the catalog from the store: at the start, and again when the journal cannot say what changed.

        Returns:
            Number of entries.

        Raises:
            StoreUnavailable: if the store fails; lookups are then misses ("store-unavailable") until a later call
                works.
        """
        with self._write:
            try:
                cursor = self.store.head()
                records = list(self.store.records())
            except StoreUnavailable:
                if self._not_ready is not None:
                    self._not_ready = "store-unavailable"
                raise
            catalog = Catalog(self.embedder.dim, self.options.index)
            newest: dict[str, Record] = {}
            for record in sorted(records, key=lambda r: (r.created_at, r.id)):
                newest[record.fingerprint] = record
            fit = [self._fitting(record) for record in newest.values() if self._alive(record)]
            # By age, so that the least recently stored entry is the first to go; recency of use is not kept over a
            # restart.
            catalog.add_many(sorted(fit, key=lambda r: (r.created_at, r.id)), build=self._build_at_once)
            with self._lock:
                self._catalog, self._cursor = catalog, cursor
                kept = {record.id for record in fit}
                self._garbage.update(r.id for r in records if r.id not in kept)
                for record in fit:
                    if record.route == self._route_name:
                        self._routes[digest(record.partition.tenant, record.text)] = record.category
                victims = self._make_room(None, None, spare=0)
                self._not_ready = None
            self._discard(victims)
        return len(self)

    def build(self, portion: int = 200) -> bool:
        """Builds the next portion of the graphs of large cells, which answer by scanning until then.

        Returns:
            Whether nothing is left to build.
        """
        with self._lock:
            indexes = self._catalog.indexes()
        return all(index.build(portion) for index in indexes)

    def _alive(self, record: Record) -> bool:
        """Whether a record may still be served under the present policies."""
        policy = self.policies.of(record.category)
        age = self._clock() - record.created_at
        longest = policy.longest_ttl if record.ttl is None else min(policy.longest_ttl, record.ttl)
        return record.revision == self.policies.revision and age <= longest

    def _fitting(self, record: Record) -> Record:
        """The record; without its vector if another encoder made it, since such vectors cannot be compared."""
        if record.encoder == self.embedder.name and (record.vector is None or len(record.vector) == self.embedder.dim):
            return record
        return replace(record, vector=None)

    def heal(self) -> None:
        """Asks a failing store whether it works again, so that `problem` does not outlive its cause.

        Raises:
            StoreUnavailable: if it still fails.
        """
        with self._lock:
            waiting = bool(self._garbage)
        self.store.heal()
        if waiting:
            self._discard()

    def sync(self) -> int:
        """Takes over what other processes put into or deleted from a shared store.

        Returns:
            Number of changes of others.

        Raises:
            StoreUnavailable: if the store fails.
        """
        if self._not_ready is not None:
            return self.load()
        news = self.store.changes(self._cursor)
        if news is None:
            return self.load()
        cursor, changes = news
        last = {change.id: change.op for change in changes}
        with self._lock:
            wanted = [
                id
                for id, op in last.items()
                if op == "put" and self._catalog.get(id) is None and id not in self._garbage
            ]
        # Read outside the locks: this waits for the store.
        records = (
            [self._fitting(record) for record in self.store.records(wanted) if self._alive(record)] if wanted else []
        )
        count = 0
        with self._write, self._lock:
            for id, op in last.items():
                if op == "del" and self._catalog.remove(id) is not None:
                    count += 1
            for record in records:
                count += self._adopt(record)
            self._cursor = cursor
        return count

    def _adopt(self, record: Record) -> int:
        """Adds another process's entry; of two for one question the newer stays, in every process."""
        old = self._catalog.exact(record.fingerprint)
        if self._catalog.get(record.id) is not None:
            return 0
        if old is not None:
            if (old.created_at, old.id) >= (record.created_at, record.id):
                self._garbage.add(record.id)
                return 0
            self._drop(old, "evicted")
        # Evicted here only: the process that stored the entry made room for it in the store.
        self._make_room(record.category, record.partition.tenant)
        self._catalog.add(record)
        return 1

    def sweep(self) -> int:
        """Drops all entries that no load could bring back and deletes their documents; call it now and then.

        Returns:
            Number of entries dropped.
        """
        with self._lock:
            entries = list(self._catalog)
        dropped, now = 0, self._clock()
        for start in range(0, len(entries), _SWEEP):
            # In portions, so that lookups get their turn.
            with self._lock:
                for meta in entries[start : start + _SWEEP]:
                    longest = self.policies.of(meta.category).longest_ttl
                    if now - meta.created_at > (longest if meta.ttl is None else min(longest, meta.ttl)):
                        self._drop(meta, "expired")
                        dropped += 1
        with self._lock:
            self._catalog.repair()
        self._discard()
        return dropped

    # ------------------------------------------------------------------ room

    def _limit(self, category: str) -> int:
        return limit(self.policies.of(category), self.options.capacity)

    def _make_room(self, category: str | None, tenant: str | None, spare: int = 1) -> list[str]:
        """Evicts until `spare` more entries fit into category, tenant's share and capacity; the evicted ids."""
        victims: list[str] = []

        def evict(meta: Meta | None) -> None:
            assert meta is not None, "a full category, tenant or cache has an oldest entry"
            self._catalog.remove(meta.id)
            self.stats.count(meta.category, "evicted")
            victims.append(meta.id)

        catalog = self._catalog
        for name in list(catalog.counts()) if category is None else [category]:
            while catalog.count(name) > self._limit(name) - spare:
                evict(catalog.oldest(name))
        share = max(1, int(self.options.tenant_quota * self.options.capacity))
        for owner in list(catalog.tenants()) if tenant is None else [tenant]:
            while len(catalog.of_tenant(owner)) > share - spare:
                evict(catalog.oldest_of_tenant(owner))
        while len(catalog) > self.options.capacity - spare:
            evict(catalog.oldest(catalog.most_over_quota(self._limit)))
        return victims

    def _drop(self, meta: Meta, event: str) -> None:
        """Forgets an entry now and leaves its document to the next `_discard`: a lookup never waits for a write."""
        if self._catalog.remove(meta.id) is not None:
            self.stats.count(meta.category, event)
            self._garbage.add(meta.id)

    def _discard(self, ids: Iterable[str] = ()) -> None:
        """Deletes documents that nothing points at; what fails is tried again next time."""
        with self._lock:
            self._garbage.update(ids)
            batch = list(self._garbage)
        if not batch:
            return
        try:
            self.store.delete(batch)
        except StoreUnavailable:
            # The guarded store remembers the failure for `problem`; the ids stay in the garbage for the next call.
            return
        with self._lock:
            self._garbage.difference_update(batch)

    # ------------------------------------------------------------------ administration

    def problem(self) -> str | None:
        """Why the cache does not work fully now ("warming", a failing store); `None` if it does."""
        return self.store.problem() or self._not_ready

    def set_policies(self, policies: Policies) -> None:
        """Replaces the policies at once, for stored entries too; a new `revision` drops all entries."""
        with self._write:
            with self._lock:
                renewed = policies.revision != self.policies.revision
                self.policies = policies
                self._routes.clear()
                self._route_name = self._name_of_route()
                if renewed:
                    for meta in self._catalog:
                        self._drop(meta, "evicted")
                victims = self._make_room(None, None, spare=0)
            self._discard(victims)

    def entries(
        self, *, tenant: str | None = None, category: str | None = None, limit: int = 100, after: str | None = None
    ) -> list[Meta]:
        """Entries in order of their ids, as a page.

        Args:
            tenant: only this tenant's; its table alone is touched, so neither result nor duration depends on others.
            category: only this category's.
            limit: length of the page.
            after: the id that ended the page before.
        """
        with self._lock:
            pool = self._catalog if tenant is None else self._catalog.of_tenant(tenant).values()
            found = [
                m for m in pool if (category is None or m.category == category) and (after is None or m.id > after)
            ]
        return sorted(found, key=lambda meta: meta.id)[:limit]

    def entry(self, id: str, *, tenant: str | None = None) -> Meta | None:
        """One entry; with a tenant, only if it is that tenant's. A foreign id and an unknown one take the same path."""
        with self._lock:
            return self._catalog.get(id) if tenant is None else self._catalog.of_tenant(tenant).get(id)

    def answer(self, id: str, *, tenant: str | None = None) -> Answer | None:
        """The answer of an entry, as `entry` finds it.

        Raises:
            StoreUnavailable: if the store fails.
        """
        meta = self.entry(id, tenant=tenant)
        return None if meta is None else self.store.get(meta.id)

    def delete(self, id: str, *, tenant: str | None = None) -> bool:
        """Deletes an entry, as `entry` finds it; `False` if there is none.

        Raises:
            StoreUnavailable: if the document could not be deleted; it is out of the index all the same.
        """
        return bool(self._delete([] if (meta := self.entry(id, tenant=tenant)) is None else [meta], "deleted"))

    def purge(self, tenant: str) -> int:
        """Deletes all entries of a tenant, also those that only the store knows.

        Returns:
            Number of entries deleted.

        Raises:
            StoreUnavailable: if the store fails: the index is purged, the documents may be there still. Call again.
        """
        with self._write:
            with self._lock:
                known = list(self._catalog.of_tenant(tenant).values())
                for key in list(self._routes):
                    # Digests do not say whose they are; forgetting all of them costs a few embeddings.
                    del self._routes[key]
            count = self._delete(known, "deleted")
            strays = [record.id for record in self.store.records() if record.partition.tenant == tenant]
            self.store.delete(strays)
        return count + len(strays)

    def report(self, id: str, *, tenant: str) -> bool:
        """A tenant reports that an entry of its own was a false hit: it is counted and deleted.

        Raises:
            StoreUnavailable: if the document could not be deleted; it is out of the index all the same.
        """
        meta = self.entry(id, tenant=tenant)
        if meta is None:
            return False
        self.stats.count(meta.category, "reported")
        return bool(self._delete([meta], "deleted"))

    def _delete(self, metas: list[Meta], event: str) -> int:
        with self._lock:
            gone = [meta for meta in metas if self._catalog.remove(meta.id) is not None]
            self._garbage.update(meta.id for meta in gone)
        for meta in gone:
            self.stats.count(meta.category, event)
        ids = [meta.id for meta in gone]
        if ids:
            self.store.delete(ids)
            with self._lock:
                self._garbage.difference_update(ids)
        return len(gone)

    def counts(self) -> dict[str, int]:
        """Number of entries by category."""
        with self._lock:
            return self._catalog.counts()

    def tenants(self) -> dict[str, int]:
        """Number of entries by tenant."""
        with self._lock:
            return self._catalog.tenants()

    def nbytes(self) -> int:
        """Bytes of vectors and graphs in memory."""
        with self._lock:
            return self._catalog.nbytes()

    def check(self) -> None:
        """Checks the catalog's tables against each other and against the store.

        Raises:
            AssertionError: naming the first disagreement, such as an index entry whose document is missing.
        """
        with self._write, self._lock:
            self._catalog.check()
            stored = {record.id for record in self.store.records()}
            missing = [meta.id for meta in self._catalog if meta.id not in stored]
            assert not missing, f"{len(missing)} index entries point at no document, such as {missing[0]}"

    def close(self) -> None:
        """Deletes what is left to delete and closes the store."""
        self._discard()
        self.store.close()
