"""One arm on one batch of prompts: its answers beside those of the full cache, and the bytes it held."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import elision
from elision.bench.kv.replay import Recording, record, replay, replayable
from elision.bench.kv.subject import LanguageSubject
from elision.bench.kv.tasks import Prompt
from elision.errors import ElisionWarning
from elision.kv.engine import KVApplied
from elision.kv.method import KVMethod
from elision.kv.report import KVReport

CONTINUED = 24  # tokens of the full cache's continuation that are scored


@dataclass
class Outcome:
    """What one arm did on one prompt.

    Attributes:
        task, seed, depth: of the prompt.
        exact: whether every token of every answer was the likeliest one; None where there is no right answer.
        turns: the same for every turn.
        nll: mean negative log-likelihood of the answers' tokens, nats. Not counted is the first token of the first
            answer: it is drawn from the prompt's own forward, before anything left the cache.
        kl: mean divergence of the predictions of these tokens from those over the full cache, nats.
        agree: share of these tokens at which both caches have the same likeliest token.
        bytes_held, bytes_peak: of this prompt's row, from the tensors' storages, after the last answer.
        bytes_full: what the full cache holds then.
        layers: tokens that every managed layer held after the prompt, on average over heads.
        exact_share: share of the prompt's tokens that were held as they are, not packed; average over layers and heads.
    """

    task: str
    seed: int
    depth: float | None
    exact: float | None
    turns: list[float]
    nll: float
    kl: float
    agree: float
    bytes_held: int
    bytes_peak: int
    bytes_full: int
    layers: list[float] = field(default_factory=list)
    exact_share: float = 1.0

    @property
    def share(self) -> float:
        """Bytes held as a share of the full cache's."""
        return self.bytes_held / self.bytes_full


@dataclass
class Truth:
    """What the full cache says on one batch.

    Attributes:
        prompts: the batch, all of one shape.
        recording: of their first turns.
        answers: tokens that are given to every arm, one [B, T] per turn.
        predicted: log-probabilities before each of them, one [B, T, V] per turn.
        bytes_full: of one row after the last answer.
    """

    prompts: Sequence[Prompt]
    recording: Recording
    answers: list[Tensor]
    predicted: list[Tensor]
    bytes_full: int


def batches(prompts: Sequence[Prompt], rows: int, tokens: int = 6144) -> Iterator[list[Prompt]]:
    """Prompts of equal shape, at most `rows` and about `tokens` tokens in one batch."""
    groups: dict[Any, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.task, prompt.shape), []).append(prompt)
    for group in groups.values():
        most = max(1, min(rows, tokens // sum(n for n, _ in group[0].shape)))
        for start in range(0, len(group), most):
            yield group[start : start + most]


@torch.no_grad()
def full(subject: LanguageSubject, prompts: Sequence[Prompt]) -> Truth:
    """Run a batch over the full cache, remembering its prompt for the arms that follow."""
    recording = record(subject.model, subject.tensor([p.turns[0].ids for p in prompts]))
    answers = [subject.tensor([p.turns[i].answer for p in prompts]) for i in range(len(prompts[0].turns))]
    if not answers[0].numel():
        answers, predicted = _continue(subject.model, recording)
    else:
        predicted = _play(subject, prompts, recording.cache, recording.logits, answers)
    held = sum(_storage(t) for layer in recording.cache.layers for t in (layer.keys, layer.values))
    return Truth(prompts, recording, answers, predicted, held // len(prompts))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _continue(model: Any, recording: Recording) -> tuple[list[Tensor], list[Tensor]]:
    """The greedy continuation and its predictions."""
    logits, tokens, rows = recording.logits, [], []
    for _ in range(CONTINUED):
        rows.append(logits.float().log_softmax(-1))
        tokens.append(logits.argmax(-1, keepdim=True))
        logits = model(tokens[-1], past_key_values=recording.cache, use_cache=True).logits[:, -1]
    return [torch.cat(tokens, 1)], [torch.stack(rows, 1)]


def _play(
    subject: LanguageSubject, prompts: Sequence[Prompt], cache: Any, logits: Tensor, answers: Sequence[Tensor]
) -> list[Tensor]:
    """Predictions before every token of every answer, the answers being given; token by token, as when decoding."""
    predicted = []
    for turn, answer in enumerate(answers):
        if turn:
            ids = subject.tensor([p.turns[turn].ids for p in prompts])
            logits = subject.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        rows = []
        for t in range(answer.shape[1]):
            rows.append(logits.float().log_softmax(-1))
            token = answer[:, t : t + 1]
            # the last one too: the next turn, and the bytes held, are those after the whole answer
            logits = subject.model(token, past_key_values=cache, use_cache=True).logits[:, -1]
        predicted.append(torch.stack(rows, 1))
    return predicted


@dataclass
class Trial:
    """One arm on one batch: an outcome per prompt, what was kept of the first one, and the report."""

    outcomes: list[Outcome]
    report: KVReport | None = None
    kept: Kept | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Kept:
    """Where the tokens of one prompt are after it, as shares of all layers and KV heads, one number per token."""

    held: list[float]
    packed: list[float]


@contextmanager
def applied(model: Any, method: KVMethod, profile: Any, notes: list[str]) -> Iterator[KVApplied]:
    """A method applied; that it left nothing out is a result here, not a mistake, so the warning becomes a note."""
    options = {} if profile is None else {"profile": profile}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ElisionWarning)
        with elision.apply(model, method, **options) as run:
            assert isinstance(run, KVApplied)
            yield run
    for other in caught:
        if issubclass(other.category, ElisionWarning):
            notes.append(str(other.message))
        else:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)


@torch.no_grad()
def trial(subject: LanguageSubject, method: KVMethod, truth: Truth, profile: Any = None) -> Trial:
    """A method on a batch whose full run is known."""
    notes: list[str] = []
    prompts, recording = truth.prompts, truth.recording
    with applied(subject.model, method, profile, notes) as run:
        cache = run.cache()
        logits = _prompt(subject, run, recording, cache)
        layers, exact, kept = _held(run, cache, recording.ids.shape[1])
        predicted = _play(subject, prompts, cache, logits, truth.answers)
        report = run.report()
    rows = len(prompts)
    sizes = (report.bytes_held // rows, report.bytes_peak // rows)
    outcomes = _judge(truth, predicted, sizes)
    for row, outcome in enumerate(outcomes):
        outcome.layers = [float(counts[row]) for counts in layers]
        outcome.exact_share = float(exact[row])
    return Trial(outcomes, report, kept, [*notes, *report.notes])


def _prompt(subject: LanguageSubject, run: KVApplied, recording: Recording, cache: DynamicCache) -> Tensor:
    """Pass the prompts, for real only where that is needed; the logits after them [B, V]."""
    if replayable(run):
        replay(run, recording, cache)
        return recording.logits
    out = subject.model(recording.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = out.logits[:, -1]
    return logits


@torch.no_grad()
def kept(subject: LanguageSubject, method: KVMethod, truth: Truth, profile: Any = None) -> dict[int, Tensor]:
    """Sequence indices that every layer holds after the prompts: [B, G, n], -1 where a row holds fewer."""
    with applied(subject.model, method, profile, []) as run:
        cache = run.cache()
        _prompt(subject, run, truth.recording, cache)
        return run.kept(cache)


@torch.no_grad()
def plain(truth: Truth) -> Trial:
    """The full cache itself, as an arm."""
    outcomes = _judge(truth, truth.predicted, (truth.bytes_full, truth.bytes_full))
    for outcome, prompt in zip(outcomes, truth.prompts, strict=True):
        outcome.layers = [float(len(prompt.turns[0].ids))] * len(truth.recording.cache.layers)
    return Trial(outcomes)


@torch.no_grad()
def other_cache(subject: LanguageSubject, truth: Truth, cache: Any) -> Trial:
    """A cache of transformers' own that is no `DynamicCache`, as an arm."""
    ids = truth.recording.ids
    logits = subject.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    predicted = _play(subject, truth.prompts, cache, logits, truth.answers)
    held = sum(_storage(t) for t in _tensors(cache.layers)) // len(truth.prompts)
    return Trial(_judge(truth, predicted, (held, held)))


def _tensors(value: Any, seen: set[int] | None = None) -> Iterable[Tensor]:
    """Every tensor that an object holds, each storage once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        inner = [getattr(value, name) for name in ("_data", "_scale", "_shift") if hasattr(value, name)]
        if inner:
            for part in inner:  # not the list, which is gone at once, so that another object may get its id
                yield from _tensors(part, seen)
        elif value.untyped_storage().data_ptr() not in seen:
            seen.add(value.untyped_storage().data_ptr())
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry, seen)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry, seen)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value), seen)


def _judge(truth: Truth, predicted: Sequence[Tensor], sizes: tuple[int, int]) -> list[Outcome]:
    found: list[Outcome] = []
    for row, prompt in enumerate(truth.prompts):
        right: list[float] = []
        nll: list[Tensor] = []
        kl: list[Tensor] = []
        agree: list[Tensor] = []
        for turn, (answer, mine, theirs) in enumerate(zip(truth.answers, predicted, truth.predicted, strict=True)):
            told, p, q = answer[row], mine[row], theirs[row]  # [T], [T, V], [T, V]
            right.append(float(p.argmax(-1).eq(told).all()))
            since = 1 if turn == 0 and len(told) > 1 else 0
            nll.append(-p.gather(-1, told[:, None])[since:, 0])
            kl.append((q.exp() * (q - p)).sum(-1)[since:])
            agree.append(p.argmax(-1).eq(q.argmax(-1)).float()[since:])
        graded = bool(prompt.turns[0].answer)
        found.append(
            Outcome(
                prompt.task,
                prompt.seed,
                prompt.depth,
                sum(right) / len(right) if graded else None,
                right if graded else [],
                float(torch.cat(nll).mean()),
                max(float(torch.cat(kl).mean()), 0.0),
                float(torch.cat(agree).mean()),
                *sizes,
                truth.bytes_full,
            )
        )
    return found


def _held(run: KVApplied, cache: DynamicCache, tokens: int) -> tuple[list[Tensor], Tensor, Kept]:
    """Tokens per row of every managed layer, on average over heads; the share of them that is not packed, per row; and
    where the tokens of the first row are."""
    layers: list[Tensor] = []
    exact: list[Tensor] = []
    held, packed = torch.zeros(tokens), torch.zeros(tokens)
    heads = 0
    for store in (cache.layers[i].store for i in run.layers):
        positions, valid = store.positions(), store.valid()
        real = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid.expand_as(positions)
        layers.append(real.sum(-1).float().mean(-1))
        n = store.n - store.dense.n  # tiers are read first
        exact.append(real[..., n:].sum(-1).float().mean(-1))
        groups = store.dense["k"].shape[1]
        share = groups / positions.shape[1]
        heads += groups
        for where, slots in ((packed, slice(0, n)), (held, slice(n, None))):
            places, counted = positions[0, :, slots].long(), real[0, :, slots]
            where.index_add_(0, places[counted].cpu(), torch.full((int(counted.sum()),), share))
    return layers, torch.stack(exact).mean(0) / tokens, Kept((held / heads).tolist(), (packed / heads).tolist())
