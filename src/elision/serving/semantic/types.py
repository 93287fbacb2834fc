"""What goes into a cache and what comes out: questions, lookups, verdicts on storing, sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from elision.errors import OptionError
from elision.serving.semantic.index import IndexOptions, Vector
from elision.serving.semantic.keys import Query, digest
from elision.serving.semantic.policies import DEFAULT_CATEGORY
from elision.serving.semantic.store import Answer


@dataclass(frozen=True, slots=True)
class Question:
    """A query on its way through the cache.

    Attributes:
        query: as asked.
        text: normalised.
        category: `None` until the classifier has seen the vector.
        route: how the category was found.
    """

    query: Query
    text: str
    category: str | None
    route: str

    @property
    def fingerprint(self) -> str:
        """Digest of partition, category and text: the key of the exact table."""
        return digest(self.query.partition.key, self.category or "", self.text)

    @property
    def cell(self) -> tuple[str, str]:
        """Where its neighbours are: partition and category."""
        return (self.query.partition.key, self.category or "")


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a lookup found, and why.

    Attributes:
        status: "hit", "miss" (looked and found nothing), or "skip" (did not look).
        reason: "exact", "semantic", "below-threshold", "no-entry", "expired", "verifier:<rule>", "too-old", "too-long",
            "clock-skew", "category-off", "no-cache", "does-not-pay", "warming", "store-unavailable",
            "embedding-failed".
        question: the question, with its category.
        score: best cosine similarity seen; 1 for an exact hit; `None` without a search.
        threshold: τ_eff of this lookup, or `None`.
        age: seconds since the answer was stored.
        answer: the answer of a hit.
        entry: id of the entry of a hit.
        saved: seconds the model took for this answer when it was stored.
        vector: the embedding, if one was made; used again when the answer is stored.
        admissible: whether an answer to this question may be stored.
    """

    status: Literal["hit", "miss", "skip"]
    reason: str
    question: Question
    score: float | None = None
    threshold: float | None = None
    age: float | None = None
    answer: Answer | None = None
    entry: str | None = None
    saved: float = 0.0
    vector: Vector | None = None
    admissible: bool = True

    @property
    def category(self) -> str:
        """The category that was used."""
        return self.question.category or DEFAULT_CATEGORY


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of an answer: `entry` is its id, or `None` and `reason` says why it was not stored."""

    entry: str | None
    reason: str

    @property
    def stored(self) -> bool:
        """Whether it was stored."""
        return self.entry is not None


@dataclass(frozen=True)
class CacheOptions:
    """Sizes.

    Attributes:
        capacity: most entries in all.
        tenant_quota: largest share of the capacity for one tenant, in (0, 1], so that none can push out the others.
            (inferred)
        index: shape of the vector indexes.
        retry: seconds for which a failing store is left alone.
    """

    capacity: int = 100_000
    tenant_quota: float = 1.0
    index: IndexOptions = field(default_factory=IndexOptions)
    retry: float = 2.0

    def __post_init__(self) -> None:
        if self.capacity < 1 or not 0 < self.tenant_quota <= 1 or self.retry < 0:
            raise OptionError(
                f"need capacity {self.capacity} >= 1, tenant_quota {self.tenant_quota} in (0, 1], retry >= 0"
            )
