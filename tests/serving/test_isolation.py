"""No answer crosses a partition: over 100,000 random operations on similar texts, under eviction and expiry."""

from __future__ import annotations

import numpy as np
import pytest

from elision.serving.semantic import Answer, CacheOptions, IndexOptions, Partition, Policies, Query, SemanticCache, unit
from elision.serving.semantic.proxy.requests import CHAT, Asked, Rules, read

from .conftest import FakeClock, TableEncoder, at_angle

OPERATIONS = 105_000


@pytest.mark.slow
def test_no_answer_crosses_a_partition_in_105_000_operations() -> None:
    """Requests differ in key, tenant header, model, tools, system prompt, temperature or history."""
    rng = np.random.default_rng(12)
    encoder = TableEncoder(24)
    centre = unit(rng.standard_normal(24))
    words = [f"question {i}" for i in range(60)]
    for word in words:
        encoder.table[word] = at_angle(centre, 0.97, rng)
    requests = [_request(rng) for _ in range(150)]
    expected = [_who(r) for r in requests]
    rules = Rules(tools="partition")
    clock = FakeClock()
    cache = SemanticCache(
        encoder,
        policies=Policies.parse(
            {"default": {"threshold": 0.8, "ttl": 500}, "categories": {"x": {"threshold": 0.9, "quota": 0.4}}}
        ),
        options=CacheOptions(capacity=600, tenant_quota=0.5, index=IndexOptions(promote=8)),
        clock=clock,
    )
    owner: dict[str, tuple[object, ...]] = {}
    hits, semantic = 0, 0
    for step in range(OPERATIONS):
        which = int(rng.integers(len(requests)))
        word = words[int(rng.integers(len(words)))]
        asked = _asked(requests[which], word, rules)
        dice = rng.random()
        if dice < 0.004:
            cache.purge(asked.query.partition.tenant)
            assert not cache.entries(tenant=asked.query.partition.tenant)
            continue
        if dice < 0.006:
            clock.tick(50)
        found = cache.lookup(asked.query)
        if found.answer is None:
            if rng.random() < 0.5:
                cache.insert(found, Answer(str(step)))
                owner[str(step)] = expected[which]
            continue
        hits += 1
        semantic += found.reason == "semantic"
        assert owner[found.answer.text] == expected[which], (requests[which], found)
    assert hits > 15_000
    assert semantic > 5_000


def _request(rng: np.random.Generator) -> tuple[dict[str, str], dict[str, object]]:
    headers = {"authorization": f"Bearer key-{rng.integers(3)}"}
    if rng.random() < 0.3:
        headers["x-elision-tenant"] = f"team-{rng.integers(2)}"
    body: dict[str, object] = {"model": f"model-{rng.integers(2)}"}
    if rng.random() < 0.5:
        body["tools"] = [{"type": "function", "function": {"name": f"tool-{rng.integers(2)}"}}]
    if rng.random() < 0.3:
        body["temperature"] = float(rng.choice([0.0, 0.5]))
    body["system"] = f"prompt {rng.integers(2)}"
    body["turns"] = int(rng.integers(2))
    return headers, body


def _who(request: tuple[dict[str, str], dict[str, object]]) -> tuple[object, ...]:
    headers, body = request
    return (tuple(sorted(headers.items())), repr(sorted(body.items())))


def _asked(request: tuple[dict[str, str], dict[str, object]], word: str, rules: Rules) -> Asked:
    import json

    headers, shape = request
    body = {name: value for name, value in shape.items() if name not in ("system", "turns")}
    messages = [{"role": "system", "content": shape["system"]}]
    messages += [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}] * int(str(shape["turns"]))
    body["messages"] = [*messages, {"role": "user", "content": word}]
    asked = read(CHAT, "", headers, json.dumps(body).encode(), rules)
    assert isinstance(asked, Asked), asked
    return asked


def test_digest_boundaries_do_not_run_together() -> None:
    assert Partition("ab", "c").key != Partition("a", "bc").key
    assert Partition("a", "b", "c").key != Partition("a", "bc", "").key


def test_one_tenant_cannot_push_out_another() -> None:
    cache = SemanticCache(TableEncoder(), options=CacheOptions(capacity=100, tenant_quota=0.5))
    small, greedy = Partition("small", "m"), Partition("greedy", "m")
    for i in range(40):
        cache.insert(Query(f"s{i}", small), Answer("x"))
    for i in range(500):
        cache.insert(Query(f"g{i}", greedy), Answer("x"))
    assert cache.tenants() == {"small": 40, "greedy": 50}


def test_classifying_for_one_tenant_leaves_no_trace_for_another() -> None:
    """Whether a text was embedded before must not show in another tenant's number of embeddings (its latency)."""
    from elision.serving.semantic import PrototypeClassifier

    encoder = TableEncoder()
    policies = Policies.parse({"categories": {"a": {}, "b": {}}})
    classifier = PrototypeClassifier(encoder, {"a": ["one"], "b": ["two"]})
    cache = SemanticCache(encoder, policies=policies, classifier=classifier)
    asked = []
    for tenant in ("first", "second"):
        before = encoder.calls
        cache.lookup(Query("is this new", Partition(tenant, "m")))
        asked.append(encoder.calls - before)
    assert asked == [1, 1]


def test_model_text_is_kept_apart_from_control_of_the_partition(who: Partition) -> None:
    cache = SemanticCache(TableEncoder())
    cache.insert(Query("q", who), Answer("x"))
    assert cache.lookup(Query("q", Partition(who.tenant, who.model + "\0", who.scope))).status == "miss"
