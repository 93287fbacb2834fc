"""Random: tokens that a hash picks, the control for every score.

Every token draws one number from the seed, its layer, head and index in its row; the highest stay. What is held at any
time is a uniform sample of all tokens so far, except that `recent` of the newest are always among them. There is no
generator whose state could diverge: the same row, alone or in a batch, in one part or in chunks, copied or reordered,
keeps the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elision.kv.actions import Evict
from elision.kv.budgets import Even, at_least, over
from elision.kv.method import EvictingMethod, KVHost
from elision.kv.parts import Call, Rule
from elision.kv.store import LayerStore
from elision.method import option, register

_ODD = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)  # multipliers of common 32-bit hashes
_MASK = 0xFFFFFFFF


def draw(index: Tensor, seed: int, layer: int, heads: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 [B, heads, n], for the tokens at `index` [B, 1 or heads, n]."""
    x = index.long().expand(-1, heads, -1) * _ODD[0]
    head = torch.arange(heads, device=x.device)[:, None] * _ODD[1]
    x = (x + head + ((seed * 0x27D4EB2F + layer * 0x165667B1) & _MASK)) & _MASK
    for shift, odd in ((16, _ODD[1]), (13, _ODD[2]), (16, _ODD[0]), (15, _ODD[1])):
        x = ((x ^ (x >> shift)) * odd) & _MASK  # below 2^64, so that wrapping loses nothing that counts
    return (x >> 8).float() / 2**24


@dataclass(frozen=True)
class Draws:
    """The numbers of all tokens, written down once as a column of the store."""

    seed: int

    def observe(self, call: Call) -> None:
        """Draw for the new tokens."""
        store = call.store
        heads, known = store.dense["k"].shape[1], "draw" in store.dense
        drawn = draw(_row_indices(call, call.m if known else store.dense.n), self.seed, store.layer, heads)
        if known:
            store.dense["draw"][:, :, -call.m :] = drawn
        else:
            store.dense["draw"], store.fills["draw"] = drawn, 0.0

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """[B, G, n]."""
        del call
        return store.dense["draw"]


def _row_indices(call: Call, m: int) -> Tensor:
    """Index of the newest m slots among the real tokens of their row, [B, 1, m]."""
    b, device, valid = len(call.q), call.q.device, call.store.dense.get("valid")
    real = torch.ones(b, 1, m, dtype=torch.long, device=device) if valid is None else valid[:, :1, -m:].long()
    last = call.lengths if isinstance(call.lengths, Tensor) else torch.full((b,), call.lengths, device=device)
    return last[:, None, None] - real.flip(-1).cumsum(-1).flip(-1)


@register
@dataclass(frozen=True)
class Random(EvictingMethod):
    """Keep tokens at random."""

    name: ClassVar[str] = "random"
    description: ClassVar[str] = "keeps a random sample of the tokens; reproducible"
    control: ClassVar[bool] = True

    seed: int = option(0, "another seed keeps other tokens", ge=0)
    recent: int = option(
        0, "newest tokens that always stay; they count towards the budget, which is at least this", ge=0
    )
    decode: bool = option(True, "hold the budget while decoding too")

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One: drop the lowest numbers."""
        budget = Even(at_least(self.tokens, self.recent))
        full = over(budget)

        def due(call: Call) -> bool:
            return full(call) and (self.decode or call.phase == "prompt_end")

        return [Rule(due, Draws(self.seed), budget, Evict(recent=self.recent))]
