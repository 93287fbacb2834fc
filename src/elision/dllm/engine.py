"""The engine of this family: one generation with a method, or without one, and its books.

Nothing is installed on the model. `generate` of a session drives the layers itself, so a model serves any number of
plain calls beside it, and removal has nothing to undo.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elision.dllm.decode import Decoding, Noise, Sampler, Step
from elision.dllm.model import MaskedLM, masked_lm
from elision.dllm.passes import Net
from elision.dllm.policy import DllmMethod, Nothing, Policy
from elision.dllm.report import DllmReport, DllmRun
from elision.errors import Conflict, ElisionWarning, OptionError, UnsupportedTarget
from elision.method import Method, create
from elision.session import Applied, Seconds, storage_bytes

_DETAILED_RUNS = 64
OnStep = Callable[[Step, Tensor, Net], None]


def attach(target: Any, methods: Sequence[Method], *, shadow: bool = False, **settings: Any) -> DllmApplied:
    """Apply one method of this family to a masked-diffusion language model."""
    for name, value in settings.items():
        if value is not None and value is not False and value != ():
            raise OptionError(f"{name}={value!r} means nothing to masked-diffusion language models: leave it out")
    mine = [m for m in methods if isinstance(m, DllmMethod)]
    if len(mine) != 1:
        raise Conflict(
            f"{', '.join(m.name for m in methods)}: each decides which rows a call computes, so they cannot act "
            "together; apply one of them"
        )
    return DllmApplied(target, mine[0], shadow=shadow)


@dataclass
class _Tally:
    runs: int = 0
    calls: int = 0
    full_calls: int = 0
    token_layers: int = 0
    asked: int = 0
    peak: int = 0


class DllmApplied(Applied):
    """A method at work on a masked-diffusion language model; see `elision.apply`."""

    def __init__(self, target: Any, method: DllmMethod, *, shadow: bool = False) -> None:
        super().__init__([method])
        self.lm = _take(target)
        self.method = method
        self.shadow = shadow
        self._name = type(self.lm.model).__name__
        self._clear()
        self._own(self.lm.model)

    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
        **decoding: Any,
    ) -> Tensor:
        """Generate, with the method at work.

        Args:
            input_ids: [B, P] or [P] token ids; shorter prompts are padded on the left.
            attention_mask: [B, P], 0 at the padding.
            generator: of random numbers.
            noise: random numbers from elsewhere, instead of a generator.
            on_step: called after every call with its step, the logits [B, m, V] at `step.need`, and the net.
            **decoding: settings of the sampler, see `elision.dllm.Decoding`: gen_length, steps, block_length ...

        Returns:
            [B, P + gen_length] token ids.

        Raises:
            OptionError: a setting out of its range, or against what the method prescribes.
        """
        self._open("generate()")
        prompt, mask = _inputs(input_ids, attention_mask, self.lm)
        settings = Decoding.of(**self.method.decoding(decoding, self.lm))
        asked = Decoding.of(**decoding)
        noise = noise or Noise(generator)
        apart = self.method.alone(self.lm) and len(prompt) > 1
        pieces = [slice(i, i + 1) for i in range(len(prompt))] if apart else [slice(None)]
        out = [
            self._generate(prompt[s], None if mask is None else mask[s], settings, asked, noise, on_step)
            for s in pieces
        ]
        self._warn(list(self._runs)[-len(pieces) :])
        return torch.cat(out)

    def _generate(
        self,
        prompt: Tensor,
        mask: Tensor | None,
        settings: Decoding,
        asked: Decoding,
        noise: Noise,
        on_step: OnStep | None,
    ) -> Tensor:
        policy = self.method.policy(self.lm)
        run = _Run(self.lm, policy, prompt, mask, settings, noise, shadow=self.shadow, on_step=on_step)
        try:
            return run.go()
        finally:
            self._enter(run, asked)

    def _warn(self, runs: list[DllmRun]) -> None:
        ran, asked = sum(run.token_layers for run in runs), sum(run.token_layers_asked for run in runs)
        if self.method.elides and ran >= asked:
            calls, full = sum(run.calls for run in runs), sum(run.full_calls for run in runs)
            warnings.warn(
                f"{self.method.name} elided nothing: {ran:,} token-layers ran in {calls} calls ({full} of them full), "
                f"{asked:,} without it; raise its interval or lower its threshold, or generate more tokens",
                ElisionWarning,
                stacklevel=3,
            )

    def _enter(self, run: _Run, asked: Decoding) -> None:
        record = run.record(asked)
        self._runs.append(record)
        t = self._tally
        t.runs, t.calls, t.full_calls = t.runs + 1, t.calls + record.calls, t.full_calls + record.full_calls
        t.token_layers, t.asked = t.token_layers + record.token_layers, t.asked + record.token_layers_asked
        t.peak = max(t.peak, run.peak)
        self._seconds.computing += run.seconds.computing
        self._seconds.deciding += run.seconds.deciding

    def report(self) -> DllmReport:
        """What happened so far; slots live during a generation only, so nothing is held between two."""
        t = self._tally
        notes = []
        if self.shadow:
            notes.append("shadow: true K and V were computed, too; seconds include them, token-layers do not")
        if any(run.padding for run in self._runs):
            notes.append("batches with sets of unequal size were filled up; their padding rows are counted apart")
        return DllmReport(
            [str(self.method)],
            self._name,
            bytes_held=0,
            bytes_peak=t.peak,
            seconds=replace(self._seconds),
            notes=notes,
            runs=list(self._runs),
            run_count=t.runs,
            calls=t.calls,
            full_calls=t.full_calls,
            token_layers=t.token_layers,
            token_layers_asked=t.asked,
        )

    def _clear(self) -> None:
        self._runs: deque[DllmRun] = deque(maxlen=_DETAILED_RUNS)
        self._tally = _Tally()
        self._seconds = Seconds()

    def _leave(self) -> None:
        pass

    def _finish(self) -> None:
        del self.lm  # a report that is kept must not keep the model alive


class _Run:
    """One generation: sampler, net, policy and what was measured."""

    def __init__(
        self,
        lm: MaskedLM,
        policy: Policy,
        prompt: Tensor,
        attention_mask: Tensor | None,
        decoding: Decoding,
        noise: Noise,
        *,
        shadow: bool = False,
        on_step: OnStep | None = None,
    ) -> None:
        self.policy, self.decoding, self.on_step = policy, decoding, on_step
        self.sampler = Sampler(prompt, decoding, lm.mask_id, lm.shift, noise)
        slots = policy.slots
        self.net = Net(lm, self.sampler.ids, attention_mask, cfg_scale=decoding.cfg_scale, slots=slots)
        self.seconds = Seconds()
        self.peak = 0
        self._total = 0.0
        self._true: list[tuple[Tensor, Tensor]] | None = None
        self._shadow: tuple[list[Tensor], list[Tensor]] | None = ([], []) if shadow else None

    @torch.no_grad()
    def go(self) -> Tensor:
        """Generate."""
        start = time.perf_counter()
        try:
            return self.sampler.run(self._call)
        finally:
            self._total = time.perf_counter() - start
            self.seconds.deciding = self._total - self.seconds.computing

    def _call(self, step: Step) -> tuple[Tensor, Tensor | None]:
        start = time.perf_counter()
        h, rows = self.policy.forward(step, self.net)
        logits, exists = self.net.logits(h, rows, step)
        self.seconds.computing += time.perf_counter() - start
        slots = self.net.slots
        held = storage_bytes([*(slots.tensors() if slots else ()), *self.policy.tensors()])
        self.peak = max(self.peak, held)
        if self._shadow is not None:
            self._compare(step)
        if self.on_step is not None:
            self.on_step(step, logits, self.net)
        return logits, exists

    def _compare(self, step: Step) -> None:
        assert self._shadow is not None
        true, before, slots = self.net.truth(step), self._true, self.net.slots
        zero = torch.zeros(len(true))
        held = [(slots.k(i), slots.v(i)) for i in range(len(true))] if slots else true
        self._shadow[0].append(_difference(held, true))
        self._shadow[1].append(zero if before is None else _difference(before, true))
        self._true = true

    def record(self, asked: Decoding) -> DllmRun:
        """The books in their final form."""
        book, sampler = self.net.book, self.sampler
        whole = self.net.batch * self.net.length * self.net.lm.layers
        scheduled = self.decoding.threshold is None and asked.threshold is None
        complete = not bool(sampler.masked.any())  # a run that was broken off is held against the calls it made
        calls = asked.calls if scheduled and complete else book.calls
        return DllmRun(
            batch=len(sampler.ids),
            prompt=sampler.prompt,
            generated=self.decoding.gen_length,
            layers=self.net.lm.layers,
            calls=book.calls,
            full_calls=book.full_calls,
            token_layers=book.token_layers,
            token_layers_asked=calls * whole,
            token_layers_uncached=book.calls * whole,
            padding=book.padding,
            head_rows=book.head_rows,
            committed=int((~sampler.masked[:, sampler.prompt :]).sum()),
            seconds=self._total,
            query=torch.stack(book.query).cpu()
            if book.query
            else torch.zeros(0, self.net.batch, self.net.length).bool(),
            depth=torch.tensor(book.depth, dtype=torch.long),
            reach=torch.tensor(book.reach, dtype=torch.long),
            stale=torch.stack(self._shadow[0]) if self._shadow and self._shadow[0] else None,
            drift=torch.stack(self._shadow[1]) if self._shadow and self._shadow[1] else None,
            facts=self.policy.facts(),
        )


def _difference(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Relative difference of K and V, the mean of both, by layer."""
    rows = [
        sum((x - y).float().norm() / y.float().norm() for x, y in zip(p, q, strict=True)) / 2
        for p, q in zip(a, b, strict=True)
    ]
    return torch.stack([torch.as_tensor(row) for row in rows]).cpu()


def _take(target: Any) -> MaskedLM:
    if isinstance(target, (str, bytes)):
        raise UnsupportedTarget(f"{target!r} is a name, not a model: load it first with elision.dllm.load({target!r})")
    return masked_lm(target)


def _inputs(prompt: Tensor, mask: Tensor | None, lm: MaskedLM) -> tuple[Tensor, Tensor | None]:
    prompt = torch.as_tensor(prompt, device=lm.device)
    if prompt.ndim == 1:
        prompt = prompt[None]
    if prompt.is_floating_point() or prompt.dtype == torch.bool or prompt.ndim != 2 or prompt.numel() < 1:
        raise OptionError(f"input_ids of shape {tuple(prompt.shape)} and {prompt.dtype}: give token ids [B, P]")
    prompt = prompt.long()
    low, high = (int(x) for x in prompt.aminmax())
    if low < 0 or high >= lm.vocab:
        raise OptionError(f"input_ids hold {low if low < 0 else high}: token ids go from 0 to {lm.vocab - 1}")
    if bool((prompt == lm.mask_id).any()):
        raise OptionError(
            f"input_ids hold the [MASK] token {lm.mask_id}: only what follows the prompt is generated, a mask in it "
            "would stay; leave it out"
        )
    if mask is not None:
        mask = torch.as_tensor(mask, device=lm.device)
        mask = mask[None] if mask.ndim == 1 else mask
        if mask.shape != prompt.shape:
            raise OptionError(f"attention_mask {tuple(mask.shape)} does not fit input_ids {tuple(prompt.shape)}")
        if not bool(mask[:, -1].all()):
            raise OptionError("attention_mask ends with padding: pad prompts on the left")
    return prompt, mask


def generate(
    model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    **decoding: Any,
) -> Tensor:
    """Generate without any cache: every call computes every row. Arguments as in `DllmApplied.generate`."""
    lm = _take(model)
    prompt, mask = _inputs(input_ids, attention_mask, lm)
    run = _Run(lm, Nothing(), prompt, mask, Decoding.of(**decoding), noise or Noise(generator), on_step=on_step)
    return run.go()


@dataclass(frozen=True)
class Measured:
    """What `measure` returns: tokens [B, P + gen_length], the run's record, bytes at the peak."""

    tokens: Tensor
    run: DllmRun
    bytes_peak: int

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, over the batch."""
        return self.run.committed / self.run.seconds


def measure(
    model: Any, method: str | DllmMethod, input_ids: Tensor, *, attention_mask: Tensor | None = None, **decoding: Any
) -> Measured:
    """One generation by one method, for comparisons; a method that elides nothing here does not warn.

    Of methods that take a batch sample by sample the run holds the sums over its samples, and the sets of the first.
    """
    made = method if isinstance(method, DllmMethod) else create(method)
    if not isinstance(made, DllmMethod):
        raise OptionError(f"{made.name} is no method for masked-diffusion language models")
    with DllmApplied(model, made) as applied, warnings.catch_warnings():
        warnings.simplefilter("ignore", ElisionWarning)
        tokens = applied.generate(input_ids, attention_mask=attention_mask, **decoding)
        report = applied.report()
    return Measured(tokens, _sum(report.runs), report.bytes_peak)


def _sum(runs: list[DllmRun]) -> DllmRun:
    total = replace(runs[0])
    for run in runs[1:]:
        for name in (
            "batch",
            "calls",
            "full_calls",
            "token_layers",
            "token_layers_asked",
            "token_layers_uncached",
            "padding",
            "head_rows",
            "committed",
            "seconds",
        ):
            setattr(total, name, getattr(total, name) + getattr(run, name))
    return total
