"""Drives rules on given attention weights: recorded runs of code that takes them from the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elision.kv.parts import Call
from tests.kv.rig import Rig


@dataclass(slots=True)
class Given(Call):
    """A call whose attention weights [B, Hq, m, n] are known."""

    weights: Tensor | None = None

    def column_sums(self) -> Tensor:
        assert self.weights is not None
        return self.weights.sum(2)


def feed(rig: Rig, layer: int, weights: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> None:
    """One call of one layer: a prompt if it has several rows, a step otherwise."""
    b, _, m, _ = weights.shape
    k = torch.zeros(b, 1, m, 1) if k is None else k
    store, book = rig.book.stores[layer], rig.book
    first = store.seen
    store.append(k, k if v is None else v, None)
    q = k.new_zeros(b, weights.shape[1], m, k.shape[3])
    phase = "step" if m == 1 else "prompt_end"
    call = Given(store, book, q, None, first, phase, m > 1, 1.0, None, None, first + m, weights=weights)
    for rule in rig.rules:
        rule.scorer.observe(call)
    for rule in rig.rules:
        rule.act(call)


def same(held: Tensor, expected: Tensor) -> bool:
    """Whether positions held [B, 1, n] are the recorded ones [B, n or more], which are padded with -1."""
    n = held.shape[-1]
    return torch.equal(held[:, 0], expected[:, :n]) and bool((expected[:, n:] == -1).all())
