"""A second look at near pairs: sentence embeddings hardly see a negation, a changed number or an exchanged order.

Spec: false hits such as "sort ascending" for "sort descending"; issue "Verifier hook for near-threshold pairs
    (negation, numbers and
polarity differ -> miss)". The rules only ever turn a hit into a miss. They read English; other verifiers (a
cross-encoder, a judge) implement `Verifier`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from elision.errors import OptionError, UnknownName


class Verifier(Protocol):
    """Decides whether a stored question may stand in for a new one; must be fast, it runs on the request path."""

    def __call__(self, query: str, stored: str, score: float, threshold: float) -> str | None:
        """`None` to accept, else the reason for a miss in a word or two."""
        ...


_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?|\d+(?:[.,]\d+)*", re.UNICODE)


def _bag(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COUNTED = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty"""
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_COUNTED.split())} | {
    "hundred": "100",
    "thousand": "1000",
    "million": "1000000",
    "first": "1st",
    "second": "2nd",
    "third": "3rd",
}
_NEGATIONS = _bag("no not never none nor nothing nobody neither without cannot except excluding lacks lack")
_OPPOSITES = """
ascending/descending increase/decrease increasing/decreasing increases/decreases enable/disable enabled/disabled
maximum/minimum max/min maximize/minimize most/least more/less more/fewer best/worst better/worse highest/lowest
higher/lower high/low largest/smallest larger/smaller big/small first/last before/after start/stop start/end open/close
buy/sell add/remove add/delete create/delete insert/delete allow/deny allow/block allow/prevent accept/reject true/false
on/off hot/cold up/down left/right above/below import/export encrypt/decrypt encode/decode compress/decompress push/pull
upload/download lock/unlock install/uninstall include/exclude safe/unsafe safe/dangerous legal/illegal
possible/impossible good/bad pros/cons advantages/disadvantages advantage/disadvantage benefits/risks win/lose gain/lose
positive/negative plus/minus even/odd public/private input/output read/write send/receive raise/lower fast/slow
faster/slower longer/shorter long/short older/younger old/new oldest/newest earliest/latest early/late inside/outside
internal/external always/never with/without male/female men/women man/woman husband/wife mother/father summer/winter
day/night love/hate like/dislike agree/disagree north/south east/west serialize/deserialize mount/unmount attach/detach
connect/disconnect subscribe/unsubscribe follow/unfollow expand/collapse show/hide prefix/suffix client/server
horizontal/vertical rows/columns row/column uppercase/lowercase signed/unsigned synchronous/asynchronous
stateful/stateless lossy/lossless mutable/immutable upgrade/downgrade inbound/outbound deposit/withdraw lend/borrow
credit/debit
"""
_OPPOSITE_OF: dict[str, set[str]] = {}
for _pair in _OPPOSITES.split():
    _a, _b = _pair.split("/")
    _OPPOSITE_OF.setdefault(_a, set()).add(_b)
    _OPPOSITE_OF.setdefault(_b, set()).add(_a)
_FUNCTION = _bag(
    """a an the of in on at by for with about as is are was were be been am do does did can could will would shall
    should may might must i you he she it we they me him her us them my your his its our their this that these those
    what which
    who whom whose when where why how please tell show give explain and or if so just also some any there here s t m re
    ve ll d get let want need know"""
)
# Words around which the order of two things decides the meaning.
_DIRECTIONAL = _bag(
    "to from into onto than before after over beats beat under versus vs against between by through via"
)


def _words(text: str) -> list[str]:
    words = [word.lower().replace("’", "'") for word in _WORD.findall(text)]
    return [_NUMBER_WORDS.get(word, word) for word in words]


def _stem(word: str) -> str:
    """A crude stem: enough to see that 'lists' and 'list' are one word."""
    for suffix in ("ings", "ing", "ies", "ed", "es", "s"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: -len(suffix)]
    return word


def negation(a: str, b: str) -> bool:
    """Whether one text negates more often than the other."""

    def count(text: str) -> int:
        words = _words(text)
        return sum(word in _NEGATIONS or word.endswith("n't") for word in words)

    return count(a) % 2 != count(b) % 2


def numbers(a: str, b: str) -> bool:
    """Whether the numbers differ, as digits or as words."""

    def found(text: str) -> Counter[str]:
        return Counter(word.replace(",", "") for word in _words(text) if word[0].isdigit())

    return found(a) != found(b)


def polarity(a: str, b: str) -> bool:
    """Whether one text has a word and the other its opposite, neither having both."""
    left, right = set(_words(a)), set(_words(b))
    return any(_OPPOSITE_OF[word] & (right - left) for word in left - right if word in _OPPOSITE_OF)


def order(a: str, b: str) -> bool:
    """Whether the same content words stand in another order around a word like 'to', 'from' or 'than'."""
    left = [_stem(w) for w in _words(a) if w not in _FUNCTION]
    right = [_stem(w) for w in _words(b) if w not in _FUNCTION]
    if left == right:
        return False
    directed = _DIRECTIONAL & set(left) & set(right)
    # Only words that both texts share once have an order to compare.
    once = {w for w in left if left.count(w) == right.count(w) == 1} - _DIRECTIONAL
    return bool(directed) and [w for w in left if w in once] != [w for w in right if w in once]


def names(a: str, b: str) -> bool:
    """Whether each text has a capitalised word (not at its start) that the other lacks."""

    def found(text: str) -> set[str]:
        spans = [m for m in _WORD.finditer(text) if m.group()[0].isupper()]
        inner = [m.group() for m in spans if text[: m.start()].rstrip()[-1:] not in ("", ".", "!", "?", ":", "\n")]
        return {w.lower().removesuffix("'s").removesuffix("’s") for w in inner} - {"i"}

    left, right = found(a), found(b)
    words_a = {w.removesuffix("'s") for w in _words(a)}
    words_b = {w.removesuffix("'s") for w in _words(b)}
    return bool(left - words_b) and bool(right - words_a)


def slot(a: str, b: str) -> bool:
    """Whether exactly one content word is exchanged ('weather in paris' / 'weather in rome')."""
    left, right = _words(a), _words(b)
    if len(left) != len(right):
        return False
    pairs = [(x, y) for x, y in zip(left, right, strict=True) if _stem(x) != _stem(y)]
    return len(pairs) == 1 and len(left) >= 3 and not (set(pairs[0]) & _FUNCTION)


RULES: dict[str, Callable[[str, str], bool]] = {
    "negation": negation,
    "numbers": numbers,
    "polarity": polarity,
    "order": order,
    "names": names,
    "slot": slot,
}
"""The rules by name; each is true where two texts differ in a way that changes the answer."""


class LexicalVerifier:
    """Rejects a pair when one of the rules says that it differs.

    Args:
        rules: names out of `RULES`, asked in this order.
        band: only pairs within this distance above the threshold are looked at; 1 looks at all. Embeddings put
            negations well above any usable threshold, so a narrow band is for languages where the rules err.

    Example:
        >>> LexicalVerifier()("sort a list ascending", "sort a list descending", 0.95, 0.9)
        'polarity'
    """

    def __init__(self, rules: Sequence[str] = tuple(RULES), band: float = 1.0) -> None:
        for rule in rules:
            if rule not in RULES:
                raise UnknownName.of("verifier rule", rule, RULES)
        if not 0 <= band <= 1:
            raise OptionError(f"band {band} must lie in [0, 1]")
        self.rules, self.band = tuple(rules), band

    def __call__(self, query: str, stored: str, score: float, threshold: float) -> str | None:
        """See `Verifier`."""
        if query == stored or score > threshold + self.band:
            return None
        return next((rule for rule in self.rules if RULES[rule](query, stored)), None)
