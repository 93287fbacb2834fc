"""Streams of questions with known truth: which questions mean the same, and when their answers change.

Spec, "Faithful small-scale test": dense categories (many distinct intents close together), sparse ones (paraphrases
far apart), Zipf and
uniform repetition, answers that change at each category's rate; plus adversarial neighbours: negations, exchanged
order, changed
numbers and names. `text_workload` makes English questions out of phrasings and slots, `vector_workload` unit vectors
of controlled density. A category's slots are chosen so that its neighbours differ in one word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from elision.errors import OptionError
from elision.serving.semantic.embed import unit
from elision.serving.semantic.index import Vector


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        at: seconds since the start.
        category: its true category.
        intent: what it means; two requests may share an answer iff their intents and versions are equal.
        text: how it is asked.
        version: which answer is true now; it changes with the category's period.
    """

    at: float
    category: str
    intent: str
    text: str
    version: int

    @property
    def answer(self) -> str:
        """The true answer."""
        return f"{self.intent}|{self.version}"


@dataclass(frozen=True)
class Family:
    """Questions of one form: every combination of slots is an intent, every phrasing a paraphrase."""

    phrasings: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]

    def intents(self) -> list[dict[str, str]]:
        """All combinations of slots; those that repeat a value (from X to X) are left out."""
        combined = (dict(zip(self.slots, values, strict=True)) for values in product(*self.slots.values()))
        return [slots for slots in combined if len(set(slots.values())) == len(slots)]


@dataclass(frozen=True)
class Kind:
    """A category of traffic.

    Attributes:
        share: share of all requests.
        zipf: exponent of the repetition law; 0 is uniform.
        period: seconds after which an answer changes; `inf` for never.
        model_seconds: what the model takes for an answer.
        families: its questions; empty in vector workloads.
    """

    share: float
    zipf: float
    period: float
    model_seconds: float
    families: tuple[Family, ...] = ()


_CODE = (
    Family(
        (
            "How do I sort {thing} in {order} order in {language}?",
            "sort {thing} {order} {language}",
            "{language}: sorting {thing} in {order} order",
            "What is the best way to sort {thing} in {order} order using {language}?",
            "show me {language} code that sorts {thing} in {order} order",
        ),
        {
            "thing": ("a list of integers", "a list of strings", "a list of tuples", "a dictionary by value"),
            "order": ("ascending", "descending"),
            "language": ("Python", "JavaScript", "Rust", "Go", "Java"),
        },
    ),
    Family(
        (
            "How do I convert {a} to {b} in {language}?",
            "convert {a} to {b} {language}",
            "{language} code for turning {a} into {b}",
            "What is the easiest way in {language} to convert {a} to {b}?",
        ),
        {
            "a": ("JSON", "CSV", "XML", "YAML"),
            "b": ("JSON", "CSV", "XML", "YAML"),
            "language": ("Python", "JavaScript", "Go"),
        },
    ),
    Family(
        (
            "How can I {verb} a git {object}?",
            "git: {verb} a {object}",
            "What is the git command to {verb} a {object}?",
            "which git command do I use to {verb} a {object}",
        ),
        {
            "verb": ("create", "delete", "rename", "list", "restore"),
            "object": ("branch", "tag", "stash", "remote"),
        },
    ),
)
_CHAT = (
    Family(
        (
            "Tell me a joke about {topic}",
            "Do you know any good jokes about {topic}?",
            "make me laugh with something about {topic}",
            "I'd like to hear a funny joke on {topic} please",
            "got a joke about {topic}?",
            "Can you tell me something funny about {topic}?",
        ),
        {"topic": ("cats", "programmers", "airports", "vegetarians", "dentists", "penguins", "winter", "my boss")},
    ),
    Family(
        (
            "I feel {mood} today, what should I do?",
            "feeling {mood}, any advice?",
            "What helps when you are {mood}?",
            "Please give me tips for when I am {mood}",
            "I've been {mood} all day. Suggestions?",
        ),
        {"mood": ("lonely", "stressed", "bored", "tired", "anxious", "unmotivated")},
    ),
    Family(
        (
            "Give me ideas for a {event}",
            "What could I do for a {event}?",
            "I need some inspiration for a {event}",
            "any suggestions for a {event}?",
            "help me plan a {event}",
        ),
        {"event": ("birthday party", "rainy weekend", "first date", "road trip", "housewarming", "family picnic")},
    ),
)
_FACTS = (
    Family(
        (
            "What is the capital of {country}?",
            "capital of {country}",
            "Which city is the capital of {country}?",
            "can you tell me {country}'s capital city",
            "name the capital of {country}",
        ),
        {"country": ("France", "Norway", "Austria", "Australia", "Kenya", "Peru", "Niger", "Nigeria", "Chad", "Chile")},
    ),
    Family(
        (
            "Who {verb} {work}?",
            "{work} was {verb} by whom?",
            "tell me who {verb} {work}",
            "which person {verb} {work}",
        ),
        {"verb": ("wrote", "translated", "illustrated"), "work": ("Hamlet", "Faust", "Ulysses", "Don Quixote", "Emma")},
    ),
    Family(
        (
            "How far is it from {a} to {b} by train?",
            "distance {a} to {b} by train",
            "by train, how many kilometres from {a} to {b}",
        ),
        {"a": ("Rome", "Paris", "Oslo", "Berlin"), "b": ("Rome", "Paris", "Oslo", "Berlin")},
    ),
)
_MARKETS = (
    Family(
        (
            "What is the price of {asset} right now?",
            "current {asset} price",
            "how much does {asset} cost today",
            "price of {asset} now?",
            "where is {asset} trading at the moment?",
        ),
        {"asset": ("gold", "silver", "crude oil", "natural gas", "copper", "wheat", "bitcoin", "platinum")},
    ),
)
_MEDICAL = (
    Family(
        (
            "What is the maximum daily dose of {drug} for a child of {age} years?",
            "max dose per day of {drug} for a {age} year old",
            "how much {drug} may a {age} year old child take in a day",
        ),
        {
            "drug": ("ibuprofen", "paracetamol", "amoxicillin", "cetirizine", "loratadine"),
            "age": ("2", "3", "4", "6", "8", "10", "12"),
        },
    ),
    Family(
        (
            "Is it {safe} to take {drug} {when} alcohol?",
            "{drug} {when} alcohol, is that {safe}?",
            "would it be {safe} if I take {drug} {when} alcohol",
        ),
        {
            "safe": ("safe", "not safe"),
            "drug": ("ibuprofen", "paracetamol", "amoxicillin", "cetirizine"),
            "when": ("before", "after", "without"),
        },
    ),
)

DAY = 86_400.0
KINDS = {
    "code": Kind(0.30, 1.0, float("inf"), 4.0, _CODE),
    "chat": Kind(0.25, 0.8, float("inf"), 2.0, _CHAT),
    "facts": Kind(0.20, 0.8, 30 * DAY, 1.0, _FACTS),
    "markets": Kind(0.15, 1.0, 600.0, 1.0, _MARKETS),
    "medical": Kind(0.10, 0.0, float("inf"), 3.0, _MEDICAL),
}
"""The text workload's traffic: shares, repetition, rates of change and model seconds are this project's own choice."""

VECTOR_KINDS = {
    "dense": Kind(0.5, 1.0, float("inf"), 4.0),
    "sparse": Kind(0.3, 1.0, float("inf"), 2.0),
    "fresh": Kind(0.2, 1.0, 600.0, 1.0),
}


def _law(n: int, exponent: float) -> np.ndarray:
    weights = 1.0 / np.arange(1, n + 1) ** exponent
    return np.asarray(weights / weights.sum())


def _draw(
    kinds: dict[str, Kind], intents: dict[str, list[str]], count: int, seconds: float, rng: np.random.Generator
) -> list[tuple[float, str, str, int]]:
    """(time, category, intent, version) of each request; which intents are popular is random."""
    if count < 1 or seconds <= 0:
        raise OptionError(f"count {count} and seconds {seconds} must be above 0")
    names = list(kinds)
    order = {name: list(rng.permutation(np.asarray(intents[name], object))) for name in names}
    phase = {intent: float(rng.random()) for name in names for intent in intents[name]}
    laws = {name: _law(len(order[name]), kinds[name].zipf) for name in names}
    times = np.sort(rng.random(count)) * seconds
    shares = np.asarray([kinds[name].share for name in names])
    drawn = []
    for at, which in zip(times, rng.choice(len(names), count, p=shares / shares.sum()), strict=True):
        name = names[which]
        intent = str(order[name][rng.choice(len(laws[name]), p=laws[name])])
        period = kinds[name].period
        # Answers of one category do not all change at the same moment.
        version = 0 if np.isinf(period) else int(at / period + phase[intent])
        drawn.append((float(at), name, intent, version))
    return drawn


def text_workload(count: int = 5000, *, seconds: float = 4 * 3600.0, seed: int = 0) -> list[Ask]:
    """English questions of `KINDS`, in order of time.

    Args:
        count: number of requests.
        seconds: time they spread over.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    forms: dict[str, tuple[Family, dict[str, str]]] = {}
    intents: dict[str, list[str]] = {}
    for name, kind in KINDS.items():
        for number, family in enumerate(kind.families):
            for slots in family.intents():
                intent = f"{name}/{number}/" + "/".join(slots.values())
                forms[intent] = (family, slots)
                intents.setdefault(name, []).append(intent)
    asks = []
    for at, name, intent, version in _draw(KINDS, intents, count, seconds, rng):
        family, slots = forms[intent]
        text = family.phrasings[int(rng.integers(len(family.phrasings)))].format(**slots)
        asks.append(Ask(at, name, intent, text, version))
    return asks


def vector_workload(
    count: int = 5000, *, dim: int = 64, seconds: float = 4 * 3600.0, seed: int = 0
) -> tuple[list[Ask], dict[str, Vector]]:
    """Requests of `VECTOR_KINDS` and the unit vector of every text.

    Dense: distinct intents at cosine 0.80 to 0.90 of each other, paraphrases at 0.95 to 0.99. Sparse and fresh:
        intents far apart,
    paraphrases at cosine 0.75 to 0.85 of each other.
    """
    rng = np.random.default_rng(seed)
    sizes = {"dense": (60, 0.85, 0.97), "sparse": (60, 0.0, 0.80), "fresh": (20, 0.0, 0.80)}
    table: dict[str, Vector] = {}
    intents: dict[str, list[str]] = {}
    for name, (size, between, within) in sizes.items():
        centre = unit(rng.standard_normal(dim))
        for i in range(size):
            intent = f"{name}/{i}"
            intents.setdefault(name, []).append(intent)
            # Around one centre at cosine sqrt(c) two independent directions have cosine c on average.
            own = _around(centre, between**0.5, rng) if between else unit(rng.standard_normal(dim))
            for j in range(5):
                spread = rng.uniform(-0.02, 0.02) if name == "dense" else rng.uniform(-0.05, 0.05)
                table[f"{intent} #{j}"] = _around(own, (within + spread) ** 0.5, rng)
    drawn = _draw(VECTOR_KINDS, intents, count, seconds, rng)
    return [Ask(at, n, intent, f"{intent} #{rng.integers(5)}", v) for at, n, intent, v in drawn], table


def _around(base: Vector, cosine: float, rng: np.random.Generator) -> Vector:
    """A unit vector at this cosine to a unit vector [dim], in a random direction."""
    other = rng.standard_normal(len(base)).astype(np.float32)
    other = unit(other - (other @ base) * base)
    return unit(cosine * base + (1 - cosine**2) ** 0.5 * other)


def texts_of(asks: Sequence[Ask]) -> list[str]:
    """The different texts, in order of first use."""
    return list(dict.fromkeys(ask.text for ask in asks))
