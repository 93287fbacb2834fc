"""Partition keys and fingerprints: who may share an answer with whom, decided before any similarity.

Spec: `papers/category-semantic-cache.md`, "lookup" (exact table over hash[model, scope, normalised request]) and
    "Pitfalls"
(system prompt, retrieved context and user memory must be part of the scope).
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass

from elision.errors import OptionError


def digest(*parts: str) -> str:
    """A 128-bit hex digest of several strings; lengths are hashed too, so ("ab", "c") differs from ("a", "bc")."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def canonical(value: object) -> str:
    """JSON with sorted keys: one text for equal requests, whatever the order of their fields.

    Raises:
        OptionError: for a value that JSON cannot express.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"a scope must be plain JSON data, not {type(value).__name__}: {error}") from error


def normalise(text: str) -> str:
    """The form in which questions are compared exactly: one Unicode composition, one line ending, no outer white space.

    Inner white space and letter case are kept: both carry meaning in code. NFC, not NFKC: the latter turns x² into x2.
    """
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip()


@dataclass(frozen=True, slots=True)
class Partition:
    """Everything that must be equal before two questions may share an answer.

    Attributes:
        tenant: whose entry it is.
        model: the model asked for.
        scope: everything else that shapes the answer (endpoint, system prompt, earlier turns, tools, parameters) as a
            digest.
    """

    tenant: str
    model: str
    scope: str = ""

    @classmethod
    def of(cls, tenant: str, model: str, **scope: object) -> Partition:
        """A partition whose scope is the digest of JSON data, such as `system=..., tools=[...], temperature=0.2`."""
        return cls(tenant, model, digest(canonical(scope)) if scope else "")

    @property
    def key(self) -> str:
        """The partition as one digest."""
        return digest(self.tenant, self.model, self.scope)


@dataclass(frozen=True, slots=True)
class Query:
    """One question to the cache.

    Attributes:
        text: what is compared: the last user message or the prompt.
        partition: where it may look.
        category: the caller's category; `None` leaves it to the classifier.
        lookup: `False` forbids a hit (`Cache-Control: no-cache`), so that the entry is refreshed.
        store: `False` forbids storing the answer (`no-store`).
        max_age: oldest answer accepted, in seconds.
        ttl: seconds this answer may live; only shortens the category's TTL.
    """

    text: str
    partition: Partition
    category: str | None = None
    lookup: bool = True
    store: bool = True
    max_age: float | None = None
    ttl: float | None = None
