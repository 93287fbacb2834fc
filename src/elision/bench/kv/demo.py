"""A question about a long text, answered over the full cache and over compressed ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

import elision
from elision.bench.kv import texts
from elision.bench.kv.subject import LanguageSubject
from elision.bench.spec import parse
from elision.errors import ElisionWarning

METHODS = ("cake:budget=0.25", "zipcache")
QUESTION = "From which platform does the night train to Lisbon leave?"
REPLY = "The night train to Lisbon leaves from"
_FACT = " The night train to Lisbon leaves from platform 7."


@dataclass(frozen=True)
class Answer:
    """What was said over one cache, and what that cache held at the end.

    Attributes:
        label: the cache.
        text: the answer.
        tokens: in the prompt.
        bytes_held: of all tensors for tokens.
        bytes_full: what the full cache held after as many tokens.
        seconds: from the prompt to the end of the answer.
    """

    label: str
    text: str
    tokens: int
    bytes_held: int
    bytes_full: int
    seconds: float


def long_text(subject: LanguageSubject, length: int) -> str:
    """Prose of about `length` tokens with one fact in its middle."""
    sentences: list[str] = []
    count = 0
    for sentence in texts.passage(11):
        if count >= length:
            break
        sentences.append(" " + sentence)
        count += len(subject.encode(sentences[-1]))
    sentences.insert(len(sentences) // 2, _FACT)
    return "".join(sentences).strip()


def ask(
    subject: LanguageSubject,
    methods: Sequence[str] = METHODS,
    *,
    length: int = 768,
    most: int = 16,
    told: Callable[[str], None] = lambda text: None,
) -> list[Answer]:
    """The answers, that over the full cache first; methods are those of `methods` that there are."""
    before, after = subject.frame()
    text = f"{before}{long_text(subject, length)}\n\n{QUESTION}{after}{REPLY}"
    ids = subject.tensor([subject.encode(text)])
    known = {row.name for row in elision.methods("kv")}
    arms: list[str | None] = [None, *(method for method in methods if method.partition(":")[0] in known)]
    return [_answer(subject, arm, ids, most, told) for arm in arms]


@torch.no_grad()
def _answer(
    subject: LanguageSubject, method: str | None, ids: torch.Tensor, most: int, told: Callable[[str], None]
) -> Answer:
    told(method or "the full cache")
    around: Any = nullcontext() if method is None else elision.apply(subject.model, parse(method).method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ElisionWarning)  # a very short text leaves nothing to compress
        with around as run:
            cache = DynamicCache(config=subject.model.config) if run is None else run.cache()
            started = perf_counter()
            out = subject.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=subject.tokenizer.eos_token_id,
            )
            seconds = perf_counter() - started
            report = None if run is None else run.report()
    said = subject.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]
    if report is not None:
        held, full = report.bytes_held, report.bytes_full
    else:
        held = full = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    return Answer(method or "full cache", f"{REPLY}{said}", ids.shape[1], held, full, seconds)
