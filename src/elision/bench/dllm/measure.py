"""One question answered by one method: is it right, what ran, how long did it take."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from elision.bench.dllm.subject import DllmSubject, Question
from elision.bench.spec import Spec
from elision.dllm.engine import DllmApplied
from elision.dllm.policy import DllmMethod
from elision.dllm.report import DllmRun
from elision.errors import ElisionWarning, OptionError


@dataclass(frozen=True)
class Arm:
    """A method and how it is decoded.

    Attributes:
        method: with its options.
        decoding: settings of the sampler beside the lengths, sorted, as pairs; `per_call` stands for as many steps as
            commit so many tokens in each call.
    """

    method: DllmMethod
    decoding: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, method: DllmMethod | str, **decoding: Any) -> Arm:
        """From a method or its text."""
        if isinstance(method, str):
            from elision.bench.spec import parse

            found = parse(method).method
            if not isinstance(found, DllmMethod):
                raise OptionError(f"{found.name} is a method of the family {found.family!r}, not of 'dllm'")
            method = found
        return cls(method, tuple(sorted(decoding.items())))

    @property
    def label(self) -> str:
        """Text that names it."""
        text = Spec(self.method).label
        settings = ", ".join(f"{name} {value}" for name, value in self.decoding)
        return f"{text} ({settings})" if settings else text

    def settings(self, question: Question, subject: DllmSubject) -> dict[str, Any]:
        """What the sampler is asked for: blocks, unless this arm decodes in a sliding window."""
        asked: dict[str, Any] = {"gen_length": question.gen_length, **dict(self.decoding)}
        if "per_call" in asked:
            asked["steps"] = -(-question.block // asked.pop("per_call")) * (question.gen_length // question.block)
        if self.method.decoding(asked, subject.lm).get("window") is None:
            asked["block_length"] = question.block
        return asked


@dataclass(frozen=True)
class Outcome:
    """What one arm did with one question.

    Attributes:
        task, length, seed: the question.
        exact: 1 if the answer is right, 0 if not; None where there is no right one.
        right: share of the answer's characters that are right in their place; None likewise.
        agree: share of generated tokens that are those of the uncached run; None until compared.
        tokens: generated.
        calls: of the model, and
        full_calls: those that computed everything.
        token_layers: rows that went through a layer, summed.
        flops: operations, counted from rows.
        seconds: of the generation.
        bytes_peak: the most that the method held.
        text: what was generated.
    """

    task: str
    length: int
    seed: int
    exact: float | None
    right: float | None
    agree: float | None
    tokens: int
    calls: int
    full_calls: int
    token_layers: int
    flops: int
    seconds: float
    bytes_peak: int
    text: str

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def run(
    subject: DllmSubject, arm: Arm, question: Question, *, truth: Tensor | None = None, shadow: bool = False
) -> tuple[Tensor, Outcome, DllmRun]:
    """Answer a question; gives the tokens [1, N], the numbers and the record of the run.

    Args:
        subject: the model.
        arm: the method.
        question: what is asked.
        truth: tokens of the uncached run to agree with.
        shadow: also compute true keys and values after every call; seconds then mean nothing.
    """
    with DllmApplied(subject.lm, arm.method, shadow=shadow) as applied, warnings.catch_warnings():
        # an arm that elides nothing is a result here, not a mistake
        warnings.simplefilter("ignore", ElisionWarning)
        tokens = applied.generate(question.ids, **arm.settings(question, subject))
        report = applied.report()
    record = report.runs[-1]
    text = subject.text(question, tokens)
    start = question.ids.shape[1]
    outcome = Outcome(
        question.task,
        question.length,
        question.seed,
        None if question.answer is None else float(text == question.answer),
        None if question.answer is None else _right(text, question.answer),
        None if truth is None else float((tokens == truth)[:, start:].float().mean()),
        record.committed,
        record.calls,
        record.full_calls,
        record.token_layers,
        subject.flops(record.token_layers, record.head_rows, question.total),
        record.seconds,
        report.bytes_peak,
        text,
    )
    return tokens, outcome, record


def _right(text: str, answer: str) -> float:
    return sum(a == b for a, b in zip(text, answer, strict=False)) / max(len(text), len(answer), 1)


def options(arm: Arm) -> Mapping[str, Any]:
    """Every option of an arm's method, for results."""
    return Spec(arm.method).options
