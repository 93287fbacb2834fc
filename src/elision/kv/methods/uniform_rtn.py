"""Uniform round-to-nearest: every token but the newest at the same few bits; the baseline of mixed-precision methods.

In the manner of KIVI ("KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024,
https://arxiv.org/abs/2402.02750): keys per channel over groups of `group` tokens, values per token over groups of
channels, and a window of exact tokens. KIVI empties its window of keys whenever it is full and that of values one by
one; here both always hold at least the newest `residual` tokens, and hand on `group` tokens at a time. `keys="token"`
quantises keys like values: plain uniform quantisation. A prompt is read exactly, and packed at its end. Padding is left
out of all groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elision.kv.budgets import Even
from elision.kv.classes import every, picked
from elision.kv.method import KVHost, KVMethod
from elision.kv.packed import RowTier, check_group
from elision.kv.parts import Call, Keep, Rule
from elision.kv.store import LayerStore
from elision.method import Paper, option, register
from elision.tensors.packing import DTYPES, Grid


class Age:
    """Newer tokens matter more."""

    def observe(self, call: Call) -> None:
        """Nothing to learn."""

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """Positions of the dense slots, [B, G or 1, n]."""
        return store.positions()[..., store.n - store.dense.n :]


@dataclass(frozen=True)
class Pack:
    """Moves the oldest whole groups into the tier, as long as `keep` tokens stay exact."""

    method: UniformRTN

    def __call__(self, store: LayerStore, score: Tensor, keep: Keep) -> None:
        """All slots are in order of time, so scores are not needed."""
        size = self.method.group if self.method.keys == "channel" else 1
        slots, valid = every(store)
        if valid is None:
            counts, most = None, (store.dense.n - int(keep)) // size * size
        else:
            n = valid.sum(-1)  # [B, 1]
            counts = ((n - keep) // size * size).clamp(min=0)
            most = int(counts.max())
        if most <= 0:
            return
        tokens = picked(store, (slots[..., :most], None))
        if not store.tiers:
            store.tiers.append(self._tier(store))
        tier = store.tiers[0]
        assert isinstance(tier, RowTier)
        tier.append(tokens.k, tokens.v, tokens.pos, counts)
        if counts is None:
            store.demote(slots[..., most:])
            return
        left = torch.arange(int((n - counts).max()), device=slots.device) + counts[..., None]  # [B, 1, left]
        store.demote(slots.gather(-1, left.clamp(max=slots.shape[-1] - 1)), left < n[..., None])

    def _tier(self, store: LayerStore) -> RowTier:
        method, params = self.method, DTYPES[self.method.params]
        d, dv = (store.dense[name].shape[-1] for name in ("k", "v"))
        values = Grid(method.bits, "token", group=method.channels(dv), params=params)
        if method.keys == "channel":
            return RowTier(Grid(method.bits, "channel", group=method.group, params=params), values)
        return RowTier(Grid(method.bits, "token", group=method.channels(d), params=params), values)


@register
@dataclass(frozen=True)
class UniformRTN(KVMethod):
    """All tokens but the newest at the same few bits."""

    name: ClassVar[str] = "uniform_rtn"
    description: ClassVar[str] = "all tokens but the newest at the same 2, 3, 4 or 8 bits, as KIVI does"
    paper: ClassVar[Paper] = Paper(
        "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", "ICML 2024", "https://arxiv.org/abs/2402.02750"
    )
    control: ClassVar[bool] = True

    bits: int = option(2, "bits of a code", choices=(2, 3, 4, 8))
    residual: int = option(128, "newest tokens that stay exact", ge=0)
    group: int = option(32, "tokens of one channel that share a range (keys)", ge=1)
    value_group: int | None = option(
        None, "channels of one token that share a range; None: 32, or all where 32 does not divide them", ge=1
    )
    keys: Literal["channel", "token"] = option(
        "channel", "keys per channel over tokens, or per token over channels like values", choices=("channel", "token")
    )
    params: str = option("float16", "type of stored minima and steps", choices=tuple(DTYPES))

    def channels(self, d: int) -> int:
        """Channels that share a range, of d."""
        if self.value_group is None:
            return 32 if d % 32 == 0 else d
        return self.value_group

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One rule."""
        check_group(self.name, "value_group", self.value_group, host.config)
        budget = Even(lambda call: self.residual, growing=True)
        return (Rule(lambda call: call.phase != "prompt_chunk", Age(), budget, Pack(self)),)
