"""The category-aware semantic cache: partition, exact, nearest neighbours, threshold, fetch.

Paper: "Category-Aware Semantic Caching for Heterogeneous LLM Workloads", arXiv 2510.26835. Spec:
    `papers/category-semantic-cache.md`,
"lookup" and "insert"; the names of the steps below are the spec's.

What differs from the spec's algorithm box, and why
- One index per (partition, category) instead of one index with filtered results (`catalog.py`).
- The whole beam is ranked instead of stopping at the first neighbour above the threshold (`index.py`).
- The document is put first, then victims are evicted and the index entry is added in one step: the counts in memory
  never exceed a quota, and a failed write costs no entry.

Example:
    >>> cache = SemanticCache(HashEncoder(), policies=Policies.parse({"default": {"threshold": 0.9}}))
    >>> who = Partition.of("acme", "gpt-x", system="Be brief.")
    >>> cache.insert(Query("What is the capital of France?", who), Answer("Paris."), cost=1.2).stored
    True
    >>> cache.lookup(Query("what is the capital of France", who)).answer.text
    'Paris.'
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

from elision.errors import StoreUnavailable
from elision.serving.semantic.catalog import Meta
from elision.serving.semantic.embed import EmbeddingError
from elision.serving.semantic.entries import Entries
from elision.serving.semantic.index import Vector
from elision.serving.semantic.keys import Query, digest, normalise
from elision.serving.semantic.policies import DEFAULT_CATEGORY, Policy, effective_threshold, effective_ttl
from elision.serving.semantic.store import Answer, Record, new_id
from elision.serving.semantic.types import Lookup, Question, Stored

BEAM = 4
MOST_CANDIDATES = 256
# Seconds that clocks of proxies on one store may differ; beyond, an entry "from the future" has no age to judge.
_SKEW = 60.0


class SemanticCache(Entries):
    """Stored answers for questions that mean the same; thread-safe. Arguments: see `Entries`."""

    def lookup(self, query: Query) -> Lookup:
        """Looks a question up: policy, exact table, embedding, neighbours, threshold, fetch.

        A store or an encoder that fails makes a miss whose reason says so; it never raises.
        """
        found = self.begin(query)
        if isinstance(found, Lookup):
            return found
        start = time.perf_counter()
        try:
            vector = self.embedder([found.text])[0]
        except EmbeddingError:
            return self.give_up(found)
        return self.finish(found, vector, time.perf_counter() - start)

    def begin(self, query: Query) -> Lookup | Question:
        """The part of a lookup that needs no embedding; a `Question` must go on to `finish`, or to `give_up`."""
        text = normalise(query.text)
        category, route = self._route(query, text)
        question = Question(query, text, category, route)
        if category is not None:
            return self._screen(question)
        if any(self.policies.of(name).caches for name in self.policies.names()):
            return question
        return self._done(Lookup("skip", "category-off", question, admissible=False))

    def finish(self, question: Question, vector: Vector, embed_seconds: float = 0.0) -> Lookup:
        """The rest of a lookup, with the unit vector [dim] of the question's text."""
        if question.category is None:
            question = self._classified(question, vector)
            screened = self._screen(question)
            if isinstance(screened, Lookup):
                return replace(screened, vector=vector)
        return self._semantic(question, vector, embed_seconds)

    def give_up(self, question: Question) -> Lookup:
        """The lookup of a question whose embedding could not be made; its answer is not stored either."""
        return self._done(Lookup("miss", "embedding-failed", question, admissible=False))

    def _route(self, query: Query, text: str) -> tuple[str | None, str]:
        """The category as far as it is known without an embedding, and how it was found."""
        if query.category is not None:
            return self.policies.name(query.category), "caller"
        if self.classifier is None:
            return DEFAULT_CATEGORY, "default"
        # Per tenant: whether a text was classified before must not show in another tenant's latency.
        with self._lock:
            return self._routes.get(digest(query.partition.tenant, text)), self._route_name

    def _classified(self, question: Question, vector: Vector) -> Question:
        assert self.classifier is not None
        category = self.classifier(vector).settle(self.policies)
        self._remember_route(question.query.partition.tenant, question.text, category)
        return replace(question, category=category)

    def _remember_route(self, tenant: str, text: str, category: str) -> None:
        with self._lock:
            self._routes[digest(tenant, text)] = category
            if len(self._routes) > 2 * self.options.capacity:
                self._routes.popitem(last=False)

    def _screen(self, question: Question) -> Lookup | Question:
        """Policy and exact table; a `Question` if the neighbours must be searched."""
        category, query = question.category or DEFAULT_CATEGORY, question.query
        policy = self.policies.of(category)
        if not policy.caches:
            return self._done(Lookup("skip", "category-off", question, admissible=False))
        if self._not_ready is not None:
            return self._done(Lookup("miss", self._not_ready, question))
        if not self.economics.pays(category, query.partition.model):
            return self._done(Lookup("skip", "does-not-pay", question, admissible=False))
        if not query.lookup:
            return self._done(Lookup("skip", "no-cache", question))
        start = time.perf_counter()
        with self._lock:
            meta = self._catalog.exact(question.fingerprint)
            state = "no-entry" if meta is None else self._usable(meta, question, policy)
        if meta is not None and state == "":
            hit = self._fetched(question, meta, "exact", 1.0, None, start)
            if hit is not None:
                return hit
        # Asked late: an exact hit needs no tokenizer.
        if not self.embedder.covers(question.text):
            return self._missed(Lookup("miss", "too-long", question), None, time.perf_counter() - start)
        return question

    def _semantic(self, question: Question, vector: Vector, embed_seconds: float) -> Lookup:
        """Neighbours of the same cell, best first, until one may be served or the similarity is below τ."""
        start = time.perf_counter()
        policy = self.policies.of(question.category)
        tau = effective_threshold(policy, self._load_of(question.query.partition.model))
        seen: set[str] = set()
        while True:
            meta, score, reason = self._candidate(question, vector, policy, tau, seen)
            if meta is None:
                miss = Lookup("miss", reason, question, score=score, threshold=tau, vector=vector)
                return self._missed(miss, embed_seconds, time.perf_counter() - start)
            found = self._fetched(question, meta, "semantic", score or 0.0, tau, start, embed_seconds, vector)
            if found is not None:
                return found
            seen.add(meta.id)

    def _candidate(
        self, question: Question, vector: Vector, policy: Policy, tau: float, seen: set[str]
    ) -> tuple[Meta | None, float | None, str]:
        """The nearest entry that may be served, or the best score seen and the reason why there is none."""
        k, best, reason = BEAM, None, "no-entry"
        checked: set[str] = set(seen)
        while True:
            with self._lock:
                near = self._catalog.neighbours(question.cell, vector, k)
                for meta, score in near:
                    best = score if best is None else max(best, score)
                    if score < tau:
                        return None, best, reason if reason != "no-entry" else "below-threshold"
                    if meta.id in checked:
                        continue
                    checked.add(meta.id)
                    reason = self._usable(meta, question, policy) or self._verified(meta, question, score, tau)
                    if not reason:
                        return meta, score, ""
            # Over-fetch: all of the beam was above τ and refused, so the next ones may still do.
            if len(near) < k or k >= MOST_CANDIDATES:
                return None, best, reason
            k *= 4

    def _usable(self, meta: Meta, question: Question, policy: Policy) -> str:
        """Empty if the entry is fresh enough, else the reason; an expired entry is dropped here, before any fetch."""
        age = self._clock() - meta.created_at
        ttl = effective_ttl(policy, self._load_of(meta.model))
        if age > (ttl if meta.ttl is None else min(ttl, meta.ttl)):
            self._drop(meta, "expired")
            return "expired"
        if age < -_SKEW:
            return "clock-skew"  # not dropped: it may be this clock that is wrong
        if question.query.max_age is not None and age > question.query.max_age:
            return "too-old"
        # Equal digests of different questions would be a collision; the texts settle it for the exact table.
        if meta.cell != question.cell:
            return "no-entry"
        return ""

    def _verified(self, meta: Meta, question: Question, score: float, tau: float) -> str:
        if self.verifier is None:
            return ""
        verdict = self.verifier(question.text, meta.text, score, tau)
        return "" if verdict is None else f"verifier:{verdict}"

    def _fetched(
        self,
        question: Question,
        meta: Meta,
        kind: Literal["exact", "semantic"],
        score: float,
        tau: float | None,
        start: float,
        embed_seconds: float | None = None,
        vector: Vector | None = None,
    ) -> Lookup | None:
        """The hit for an entry, or `None` if its document is gone from the store; a failing store makes a miss."""
        searched = time.perf_counter()
        try:
            answer = self.store.get(meta.id)
        except StoreUnavailable:
            return self._missed(
                Lookup("miss", "store-unavailable", question, score=score, threshold=tau, vector=vector),
                embed_seconds,
                searched - start,
            )
        with self._lock:
            if answer is None:
                self._catalog.remove(meta.id)
                return None
            self._catalog.touch(meta)
        age = max(0.0, self._clock() - meta.created_at)
        fetch = time.perf_counter() - searched
        category, model = question.category or DEFAULT_CATEGORY, question.query.partition.model
        self.economics.looked_up(category, model, hit=True, embed=embed_seconds, search=searched - start, fetch=fetch)
        self.stats.saved(category, meta.cost)
        return self._done(Lookup("hit", kind, question, score, tau, age, answer, meta.id, meta.cost, vector))

    def _missed(self, lookup: Lookup, embed_seconds: float | None, search: float) -> Lookup:
        model = lookup.question.query.partition.model
        self.economics.looked_up(lookup.category, model, hit=False, embed=embed_seconds, search=search, fetch=None)
        return self._done(lookup)

    def _done(self, lookup: Lookup) -> Lookup:
        event = lookup.reason if lookup.status == "hit" else lookup.status
        self.stats.looked_up(lookup.category, event, lookup.reason)
        return lookup

    def insert(self, asked: Query | Lookup, answer: Answer, *, cost: float = 0.0) -> Stored:
        """Stores a complete, successful answer.

        Args:
            asked: the lookup that missed (its category and embedding are used again), or a query.
            answer: the whole answer.
            cost: seconds the model took; what a later hit saves.
        """
        if cost > 0 and isinstance(asked, Lookup):
            self.economics.answered(asked.category, asked.question.query.partition.model, cost)
        query = asked if isinstance(asked, Query) else asked.question.query
        if isinstance(asked, Lookup) and not asked.admissible:
            return self._refused(asked, asked.reason)
        if not query.store:
            return self._refused(asked, "no-store")
        if not answer.text:
            return self._refused(asked, "empty-answer")
        if self._not_ready is not None:
            return self._refused(asked, self._not_ready)
        try:
            question, vector = self._prepared(asked)
        except EmbeddingError:
            return self._refused(asked, "embedding-failed")
        category = question.category or DEFAULT_CATEGORY
        with self._write:
            # Read here, since the policy may have changed while the model was at work.
            if not self.policies.of(category).caches:
                return self._refused(asked, "category-off")
            record = self._record(question, vector, cost)
            try:
                self.store.put(record, answer)  # the document first: the index never points at a missing one
            except StoreUnavailable:
                return self._refused(asked, "store-unavailable")
            with self._lock:
                old = self._catalog.exact(record.fingerprint)
                victims = [old.id] if old is not None and self._catalog.remove(old.id) is not None else []
                victims += self._make_room(category, query.partition.tenant)
                self._catalog.add(record)
            self._discard(victims)
        self.stats.count(category, "stored")
        return Stored(record.id, "stored")

    def _prepared(self, asked: Query | Lookup) -> tuple[Question, Vector | None]:
        """The question with its category, and its vector if it may be compared by similarity."""
        if isinstance(asked, Lookup):
            question, vector = asked.question, asked.vector
        else:
            text = normalise(asked.text)
            category, route = self._route(asked, text)
            question, vector = Question(asked, text, category, route), None
        covered = self.embedder.covers(question.text)
        if vector is None and (covered or question.category is None):
            vector = self.embedder([question.text])[0]
        if question.category is None and vector is not None:
            question = self._classified(question, vector)
        return question, vector if covered else None

    def _record(self, question: Question, vector: Vector | None, cost: float) -> Record:
        q = question.query
        return Record(
            id=new_id(),
            fingerprint=question.fingerprint,
            partition=q.partition,
            category=question.category or DEFAULT_CATEGORY,
            text=question.text,
            created_at=self._clock(),
            ttl=q.ttl,
            route=question.route,
            encoder=self.embedder.name,
            revision=self.policies.revision,
            cost=cost,
            vector=vector,
        )

    def _refused(self, asked: Query | Lookup, reason: str) -> Stored:
        category = asked.category if isinstance(asked, Lookup) else self.policies.name(asked.category)
        self.stats.count(category, "refused")
        return Stored(None, reason)
