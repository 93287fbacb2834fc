"""What a document store must do, and what it holds.

Spec: "Document store: key-value by id, outside the process; only hits touch it", "store.put(id, doc) first, then
    hnsw.add".
A store also keeps what is needed to build the index again (vector, category, partition, creation time), and a journal
by which several processes that share it learn of each other's entries.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from elision.serving.semantic.index import Vector
from elision.serving.semantic.keys import Partition

log = logging.getLogger("elision.serve")


def new_id() -> str:
    """A random 128-bit id: nobody guesses another tenant's."""
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete, successful answer.

    Attributes:
        text: the answer.
        model: the model name in the upstream's reply.
        usage: the upstream's token counts, if it sent any.
        extra: further text fields of the message that were collected whole, such as `reasoning_content`.
    """

    text: str
    model: str = ""
    usage: dict[str, Any] | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def dump(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self))  # ASCII: lone surrogates from a model survive

    @classmethod
    def read(cls, text: str) -> Answer | None:
        """As `parse`; `None` for a text that is no answer, which is then as good as gone."""
        try:
            return cls.parse(text)
        except (ValueError, TypeError):
            log.warning("a stored answer cannot be read and counts as gone")
            return None

    @classmethod
    def parse(cls, text: str) -> Answer:
        """From `dump()`'s text."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Record:
    """What the index needs to know of an entry; everything but the answer.

    Attributes:
        id: random, also the key of the document.
        fingerprint: digest of partition, category and normalised text.
        partition: who may be served it.
        category: the category it was stored under.
        text: the question.
        created_at: seconds since the epoch; expiry is never stored, so that a changed TTL applies to old entries.
        ttl: the caller's own, shorter TTL in seconds, or `None`.
        route: how the category was found: "caller", or the classifier's name.
        encoder: name of the encoder that made the vector; vectors of different encoders are never compared.
        revision: the policies' revision under which it was stored.
        cost: seconds the model took.
        vector: unit vector [dim], or `None` for an entry that only exact repetition may hit.
    """

    id: str
    fingerprint: str
    partition: Partition
    category: str
    text: str
    created_at: float
    ttl: float | None
    route: str
    encoder: str
    revision: str
    cost: float
    vector: Vector | None

    def header(self) -> str:
        """All fields but id and vector, as JSON text."""
        p = self.partition
        who = (self.fingerprint, p.tenant, p.model, p.scope, self.category, self.text)
        return json.dumps([*who, self.created_at, self.ttl, self.route, self.encoder, self.revision, self.cost])

    @classmethod
    def parse(cls, id: str, header: str, vector: bytes | None) -> Record:
        """From `header()`'s text and the vector's float32 bytes."""
        fp, tenant, model, scope, category, text, created_at, ttl, route, encoder, revision, cost = json.loads(header)
        array = None if not vector else np.frombuffer(vector, np.float32)
        partition = Partition(tenant, model, scope)
        return cls(id, fp, partition, category, text, created_at, ttl, route, encoder, revision, cost, array)

    @classmethod
    def read(cls, id: str, header: str, vector: bytes | None) -> Record | None:
        """As `parse`; `None` for a row that is damaged or of another version, which must not keep out the others."""
        try:
            return cls.parse(id, header, vector)
        except (ValueError, TypeError):
            log.warning("entry %s cannot be read and is left out", id)
            return None

    def vector_bytes(self) -> bytes:
        """The vector as float32 bytes; empty for none."""
        return b"" if self.vector is None else np.ascontiguousarray(self.vector, np.float32).tobytes()


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a store's journal: an entry was put or deleted."""

    op: Literal["put", "del"]
    id: str


class Store(Protocol):
    """A document store. Every method raises `StoreUnavailable` when the store cannot be reached, read or written."""

    def put(self, record: Record, answer: Answer) -> None:
        """Stores an entry; it is durable and visible to other processes when this returns."""
        ...

    def get(self, id: str) -> Answer | None:
        """The answer of an entry, or `None` if there is none (any more)."""
        ...

    def delete(self, ids: Iterable[str]) -> None:
        """Deletes entries; unknown ids are ignored."""
        ...

    def records(self, ids: Iterable[str] | None = None) -> Iterator[Record]:
        """The records of some entries, or of all, without their answers; unknown ids are left out."""
        ...

    def head(self) -> str:
        """The journal's present end, as a cursor for `changes`."""
        ...

    def changes(self, cursor: str) -> tuple[str, list[Change]] | None:
        """What happened since a cursor, with the next cursor; `None` if the journal no longer reaches back so far."""
        ...

    def ping(self) -> None:
        """Returns if the store works."""
        ...

    def close(self) -> None:
        """Releases connections and files."""
        ...
