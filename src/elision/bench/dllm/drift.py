"""How much true keys and values move from call to call, by layer: of all decided tokens, and of the most attended one.

Both premises of Elastic-Cache are about tokens that stay the same while others are decided around them. So a position
counts here if its token was decided before the previous call; what changes because [MASK] became a word is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from elision.bench.dllm.measure import Arm
from elision.bench.dllm.subject import DllmSubject, Question
from elision.dllm.decode import Step
from elision.dllm.engine import DllmApplied
from elision.dllm.passes import Net


@dataclass
class Drifts:
    """Relative changes ‖x_t − x_{t−1}‖ / ‖x_t‖ of K and V, the mean of both, mean over calls.

    Attributes:
        decided: [L] of all decided tokens together.
        each: [L] of a decided token, on average, and
        attended: [L] of the decided token that the masked rows attended most at the call before.
    """

    decided: Tensor
    each: Tensor
    attended: Tensor


@dataclass
class _Watch:
    """Sees every call of an uncached run and computes its keys, values and attention once more."""

    before: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    picked: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def __call__(self, step: Step, logits: Tensor, net: Net) -> None:
        old = (~step.before)[0].nonzero()[:, 0]  # decided before the previous call
        now: list[tuple[Tensor, Tensor]] = []
        picked: list[int] = []
        values: list[list[float]] = []
        h = net.embed(step)
        asking = step.masked[0].nonzero()[:, 0]
        decided = ~step.masked[0]
        for layer, block in enumerate(net.lm.blocks):
            q, k, v = block.project(h, net.rotation)
            now.append((k[0], v[0]))
            mass = block.weights(q[:, asking], k, None).mean(dim=(0, 1, 2)).sum(dim=0)  # [N]
            picked.append(int(mass.masked_fill(~decided, -1).argmax()))
            if self.before:
                values.append(_changes(self.before[layer], now[layer], old, self.picked[layer]))
            h = block.finish(h, block.attend(q, k, v, None))
        if values:
            self.rows.append(torch.tensor(values))
        self.before, self.picked = now, picked


def _changes(before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor], old: Tensor, picked: int) -> list[float]:
    """Change of all tokens `old` together, of each on average, and of the one that was picked."""
    out = []
    for x, y in zip(before, now, strict=True):
        moved, size = (y - x)[old].flatten(1), y[old].flatten(1)
        single = moved.norm(dim=1) / size.norm(dim=1)
        one = (y - x)[picked].norm() / y[picked].norm()
        out.append(torch.stack([moved.norm() / size.norm(), single.mean(), one]))
    mean: list[float] = torch.stack(out).mean(dim=0).tolist()
    return mean


def drifts(subject: DllmSubject, arm: Arm, question: Question) -> Drifts:
    """Follow the uncached decoding of one question."""
    watch = _Watch()
    with DllmApplied(subject.lm, arm.method) as applied:
        applied.generate(question.ids, on_step=watch, **arm.settings(question, subject))
    decided, each, attended = torch.stack(watch.rows).mean(dim=0).unbind(dim=1)
    return Drifts(decided, each, attended)
