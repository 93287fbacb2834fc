"""A category-aware semantic cache: stored answers for questions that mean the same, under rules by category.

Example:
    >>> from elision.serving.semantic import Answer, HashEncoder, Partition, Policies, Query, SemanticCache
    >>> policies = Policies.parse({"categories": {"code": {"threshold": 0.9, "ttl": "30d"}}})
    >>> cache = SemanticCache(HashEncoder(), policies=policies)
    >>> query = Query("How do I reverse a list in Python?", Partition.of("acme", "gpt-x"), category="code")
    >>> found = cache.lookup(query)
    >>> found.status, found.reason
    ('miss', 'no-entry')
    >>> _ = cache.insert(found, Answer("xs[::-1]"), cost=0.8)
    >>> cache.lookup(query).answer.text
    'xs[::-1]'
"""

from elision.serving.semantic.cache import SemanticCache
from elision.serving.semantic.classify import Classification, Classifier, PrototypeClassifier
from elision.serving.semantic.economics import ControllerOptions, Economics, break_even
from elision.serving.semantic.embed import (
    Embedder,
    EmbeddingError,
    EndpointEncoder,
    HashEncoder,
    SentenceEncoder,
    unit,
)
from elision.serving.semantic.index import IndexOptions, VectorIndex
from elision.serving.semantic.keys import Partition, Query, normalise
from elision.serving.semantic.load import LoadMeter, LoadOptions
from elision.serving.semantic.policies import Policies, Policy, effective_threshold, effective_ttl
from elision.serving.semantic.redis_store import RedisStore
from elision.serving.semantic.sqlite_store import SQLiteStore
from elision.serving.semantic.store import Answer, Record, Store
from elision.serving.semantic.types import CacheOptions, Lookup, Question, Stored
from elision.serving.semantic.verify import LexicalVerifier, Verifier

__all__ = [
    "Answer",
    "CacheOptions",
    "Classification",
    "Classifier",
    "ControllerOptions",
    "Economics",
    "Embedder",
    "EmbeddingError",
    "EndpointEncoder",
    "HashEncoder",
    "IndexOptions",
    "LexicalVerifier",
    "LoadMeter",
    "LoadOptions",
    "Lookup",
    "Partition",
    "Policies",
    "Policy",
    "PrototypeClassifier",
    "Query",
    "Question",
    "Record",
    "RedisStore",
    "SQLiteStore",
    "SemanticCache",
    "SentenceEncoder",
    "Store",
    "Stored",
    "VectorIndex",
    "Verifier",
    "break_even",
    "effective_threshold",
    "effective_ttl",
    "normalise",
    "unit",
]
