"""Which category a question belongs to, from its embedding.

Spec, "Pitfalls": "Classifier error picks the wrong τ: on low confidence use the strictest policy among the candidates."
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from elision.errors import OptionError
from elision.serving.semantic.embed import Embedder, unit
from elision.serving.semantic.index import Vector
from elision.serving.semantic.keys import canonical, digest
from elision.serving.semantic.policies import DEFAULT_CATEGORY, Policies


@dataclass(frozen=True, slots=True)
class Classification:
    """A classifier's answer.

    Attributes:
        category: the most likely category.
        confident: whether the others are out of the question.
        candidates: all categories that may be right, the most likely first.
    """

    category: str
    confident: bool
    candidates: tuple[str, ...]

    def settle(self, policies: Policies) -> str:
        """The category to use: the likely one if confident, else the candidate with the strictest policy."""
        if self.confident:
            return policies.name(self.category)
        names = [policies.name(candidate) for candidate in self.candidates]
        return max(names, key=lambda name: policies.of(name).strictness())


class Classifier(Protocol):
    """Maps a unit vector to categories; must be deterministic."""

    name: str
    """Changes whenever the answers may change."""

    def __call__(self, vector: Vector) -> Classification:
        """The classification of a unit vector [dim]."""
        ...


class PrototypeClassifier:
    """Nearest prototype: a category is the mean embedding of a few example questions.

    Args:
        embedder: the cache's encoder.
        examples: example questions by category; five to twenty each are enough.
        margin: how much more similar the best category must be than the next one.
        least: similarity below which the question may also belong to no category at all.

    Example:
        >>> examples = {"code": ["How do I sort a list in Python?"], "chat": ["Tell me a joke"]}
        >>> classify = PrototypeClassifier(embedder, examples)
        >>> classify(embedder(["Reverse a string in C"])[0]).category
        'code'
    """

    def __init__(
        self, embedder: Embedder, examples: Mapping[str, Sequence[str]], *, margin: float = 0.05, least: float = 0.15
    ) -> None:
        empty = sorted(category for category, texts in examples.items() if not texts)
        if not examples or empty:
            raise OptionError(f"categories without examples: {empty or 'all'}; give each a few example questions")
        self.margin, self.least = margin, least
        self.categories = sorted(examples)
        self.name = "prototypes:" + digest(
            embedder.name, canonical({c: list(examples[c]) for c in examples}), f"{margin}/{least}"
        )
        means = [unit(embedder(list(examples[category]))).mean(axis=0) for category in self.categories]
        self.prototypes = unit(np.stack(means))  # [C, dim]

    def __call__(self, vector: Vector) -> Classification:
        """See `Classifier`."""
        scores = self.prototypes @ vector  # [C]
        order = np.argsort(-scores, kind="stable")
        best = float(scores[order[0]])
        near = [self.categories[i] for i in order if scores[i] > best - self.margin]
        if best < self.least:
            near.append(DEFAULT_CATEGORY)
        return Classification(near[0], len(near) == 1, tuple(near))
