"""Words for prompts: prose of the Python language reference, which every interpreter carries, and seeded inventions.

`pydoc_data.topics` is part of the standard library (Python Software Foundation licence): some 600 kB of technical
English, the same for everybody with the same version of Python.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence

# ordinary words that tokenizers know as one token; drawn without replacement within a prompt
_WORDS = (
    "apple river stone cloud tiger piano bread ocean forest silver garden window bridge candle mirror basket "
    "rocket pencil hammer ladder button blanket orange lemon pepper coffee sugar butter honey salmon eagle rabbit "
    "monkey turtle dragon castle temple island desert valley canyon meadow harbor market station museum theater "
    "library kitchen engine anchor arrow shield sword helmet crown jewel pearl copper marble cotton velvet "
    "leather paper violin guitar trumpet drum flute"
)
WORDS = _WORDS.split()
_PLACES = (
    "London Paris Berlin Madrid Rome Vienna Athens Dublin Oslo Lisbon Prague Warsaw Moscow Cairo Tokyo Sydney "
    "Boston Chicago Denver Dallas Seattle Toronto Montreal Delhi"
)
PLACES = _PLACES.split()


@functools.cache
def prose() -> tuple[str, ...]:
    """Sentences of the language reference, in order."""
    from pydoc_data.topics import topics

    found: list[str] = []
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            if block.startswith(("   ", "\t")) or "::=" in block:
                continue  # code and grammar
            text = " ".join(block.replace("*", "").replace("`", "").split())
            found += [s for s in re.split(r"(?<=[.!?])\s+", text) if _reads_well(s)]
    return tuple(dict.fromkeys(found))


def _reads_well(sentence: str) -> bool:
    """Whether it is a sentence of words rather than of symbols."""
    words = sentence.split()
    plain = sum(word.strip(",.;:()\"'").isalpha() for word in words)
    return 8 <= len(words) <= 40 and sentence[0].isupper() and sentence[-1] == "." and plain >= 0.85 * len(words)


def passage(seed: int) -> list[str]:
    """Sentences in the order of the reference, beginning at a place drawn by `seed`."""
    sentences = prose()
    start = random.Random(seed).randrange(len(sentences))
    return [*sentences[start:], *sentences[:start]]


def digits(rng: random.Random, count: int = 5) -> str:
    """A number that does not begin with zero."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def draw(rng: random.Random, words: Sequence[str], count: int) -> list[str]:
    """`count` different words."""
    return rng.sample(list(words), count)
