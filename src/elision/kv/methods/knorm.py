"""Knorm: tokens whose keys have the smallest norm are kept.

"A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", EMNLP 2024, https://arxiv.org/abs/2406.11430.

Reproduced is the released rule: per KV head, the tokens with the smallest Euclidean norm of their key stay; layers of
`skip` are left alone (the paper spares the first two of some models). Norms are computed in float32 and rounded to 12
bits: the keys of one word in the first layer, and all keys where the model normalises them, have equal norms that
rotation blurs in the last bits only; of equal norms the newest stay (the release leaves it to its sort). Difference:
the release keeps a ratio of what is held at each call, from `prune_after` tokens on; here the number kept is the
budget, a share being one of the prompt. `decode=False` compresses prompts only; `recent` protects the newest tokens
(none in the release).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elision.errors import OptionError
from elision.kv.actions import Evict
from elision.kv.budgets import Even, at_least, over
from elision.kv.method import EvictingMethod, KVHost
from elision.kv.parts import Call, Rule
from elision.kv.store import LayerStore
from elision.method import Paper, option, register


@dataclass(frozen=True)
class KeyNorms:
    """Negative norms of the keys, written down once for every token as a column of the store."""

    def observe(self, call: Call) -> None:
        """Measure the new keys."""
        store = call.store
        known = "norm" in store.dense
        k = store.dense["k"][:, :, -call.m :] if known else store.dense["k"]
        norm = _rounded(k.float().norm(dim=-1))
        if known:
            store.dense["norm"][:, :, -call.m :] = norm
        else:
            store.dense["norm"], store.fills["norm"] = norm, 0.0

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """[B, G, n], float64: of equal norms the newer counts more."""
        del call
        positions = store.positions()[:, :, -store.dense.n :]
        return store.dense["norm"] * (positions.double() * 2.0**-40 - 1)  # the norms' own grid is 2^-12


def _rounded(norm: Tensor) -> Tensor:
    """Positive float32 with 12 bits of fraction, so that norms equal but for rounding are equal."""
    return ((norm.contiguous().view(torch.int32) + 2**10) & -(2**11)).view(torch.float32)


@register
@dataclass(frozen=True)
class Knorm(EvictingMethod):
    """Keep the tokens with the smallest keys."""

    name: ClassVar[str] = "knorm"
    description: ClassVar[str] = "keeps the tokens whose keys have the smallest norm"
    paper: ClassVar[Paper] = Paper(
        "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        "EMNLP 2024",
        "https://arxiv.org/abs/2406.11430",
    )
    control: ClassVar[bool] = True

    skip: tuple[int, ...] = option((), "layers that keep everything, by their index in the model")
    recent: int = option(
        0, "newest tokens that always stay; they count towards the budget, which is at least this", ge=0
    )
    decode: bool = option(True, "hold the budget while decoding too")

    def __post_init__(self) -> None:
        super().__post_init__()
        layers: Any = self.skip
        if not isinstance(layers, (tuple, list)) or not all(type(i) is int and i >= 0 for i in layers):
            raise OptionError(f"{self.name}: skip={layers!r} is no list of layers: give their indices, as in (0, 1)")
        object.__setattr__(self, "skip", tuple(layers))

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One: drop the largest keys."""
        if unknown := sorted(set(self.skip) - set(host.layers)):
            raise OptionError(f"{self.name}: skip names layers {unknown}, but those managed are {list(host.layers)}")
        budget = Even(at_least(self.tokens, self.recent))
        full = over(budget)

        def due(call: Call) -> bool:
            return call.layer not in self.skip and (self.decode or call.phase == "prompt_end") and full(call)

        return [Rule(due, KeyNorms(), budget, Evict(recent=self.recent))]
