"""Encoders and the index of the semantic cache."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import OptionError
from elision.serving.semantic import (
    Answer,
    EmbeddingError,
    EndpointEncoder,
    IndexOptions,
    Partition,
    Query,
    SemanticCache,
    SentenceEncoder,
    VectorIndex,
    unit,
)

from .conftest import TableEncoder


def test_packaged_minilm_sees_meaning_and_knows_its_window() -> None:
    encoder = SentenceEncoder()
    a, b, c = encoder(
        ["How do I reset my password?", "I forgot my password, how can I change it?", "Best pizza in Naples"]
    )
    assert encoder.dim == 384
    assert a @ b > 0.6 > 0.3 > a @ c
    assert encoder.covers("short")
    assert encoder.covers("word " * 200)
    assert not encoder.covers("word " * 300)
    assert not encoder.covers("x" * 10_000_000)


def test_texts_beyond_the_window_hit_only_exactly(who: Partition) -> None:
    """Two long prompts with one beginning have one embedding; they must not share an answer."""
    cache = SemanticCache(TableEncoder())
    start = "same beginning " * 100
    first = cache.lookup(Query(start + "question one", who))
    assert first.reason == "too-long"
    cache.insert(first, Answer("one"))
    assert cache.lookup(Query(start + "question two", who)).status == "miss"
    assert cache.lookup(Query(start + "question one", who)).answer == Answer("one")


def test_endpoint_encoder() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["input"]
        assert request.headers["authorization"] == "Bearer k"
        if texts[0] == "fail":
            return httpx.Response(500)
        size = 3 if texts[0] == "short" else 4
        rows = [{"index": i, "embedding": [float(len(t)) + 1, 1.0, 0, 0][:size]} for i, t in enumerate(texts)]
        return httpx.Response(200, json={"data": rows[::-1]})

    encoder = EndpointEncoder("http://x/v1", "e", 4, api_key="k", transport=httpx.MockTransport(answer))
    got = encoder(["a", "bbb"])
    np.testing.assert_allclose(got, unit([[2, 1, 0, 0], [4, 1, 0, 0]]), atol=1e-6)
    for bad in ("fail", "short"):
        with pytest.raises(EmbeddingError):
            encoder([bad])
    cache = SemanticCache(encoder)
    assert cache.lookup(Query("fail", Partition("t", "m"))).reason == "embedding-failed"
    assert cache.insert(Query("fail", Partition("t", "m")), Answer("x")).reason == "embedding-failed"


def test_index_refuses_what_has_no_cosine() -> None:
    index = VectorIndex(3)
    for bad in ([2, 0, 0], [0, 0, 0], [np.nan, 0, 0]):
        with pytest.raises(OptionError, match="norm"):
            index.add(0, np.asarray(bad, np.float32))
    with pytest.raises(OptionError, match="shape"):
        index.add(0, np.ones(4, np.float32) / 2)
    index.add(0, unit([1, 0, 0]))
    with pytest.raises(OptionError, match="in use"):
        index.add(0, unit([1, 0, 0]))
    with pytest.raises(OptionError, match="zero or non-finite"):
        unit([0.0, 0.0])


@given(
    st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.integers(0, 30)), max_size=120),
    st.sampled_from([3, 1000]),
)
def test_index_equals_brute_force_after_any_changes(changes, promote) -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal((31, 8)))
    index, live = VectorIndex(8, IndexOptions(promote=promote)), set()
    for op, slot in changes:
        if op == "add" and slot not in live:
            index.add(slot, vectors[slot])
            live.add(slot)
        elif op == "remove":
            assert index.remove(slot) == (slot in live)
            live.discard(slot)
    assert len(index) == len(live)
    query = unit(rng.standard_normal(8))
    true = sorted(live, key=lambda s: -float(vectors[s] @ query))[:5]
    assert [slot for slot, _ in index.search(query, 5)] == true == [slot for slot, _ in index.exhaustive(query, 5)]
    for slot in live:
        assert index.search(vectors[slot], 1)[0][0] == slot


def test_a_growing_index_answers_throughout_and_never_stalls() -> None:
    """While the graph is built in portions, searches are exact scans; afterwards nothing is lost or comes back."""
    rng = np.random.default_rng(5)
    vectors = unit(rng.standard_normal((900, 16)))
    index, live = VectorIndex(16, IndexOptions(promote=100)), set()
    flat_seen = graph_seen = False
    for slot in range(800):
        index.add(slot, vectors[slot])
        live.add(slot)
        if slot % 3 == 0 and slot:
            gone = int(rng.choice(sorted(live)))
            assert index.remove(gone)
            live.discard(gone)
        flat_seen |= index._next is not None
        graph_seen |= index._graph is not None
        if slot % 20 == 0:
            assert index.search(vectors[slot], 1)[0][0] in live
            assert len(index) == len(live)
    assert flat_seen
    assert graph_seen
    assert index.build()
    assert {slot for slot, _ in index.search(vectors[0], len(live))} == live
    late = VectorIndex(16, IndexOptions(promote=100))
    late.add_many(range(600), vectors[:600])
    assert late._graph is None, "many at once are built in portions too"
    assert late.remove(5)
    assert late.search(vectors[7], 1)[0][0] == 7
    late.add(5, vectors[899])
    while not late.build(50):
        assert late.search(vectors[9], 1)[0][0] == 9
    assert late._graph is not None
    assert late.search(vectors[899], 1)[0][0] == 5
    assert len(late) == 600
