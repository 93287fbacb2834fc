"""MiKV: tokens that H2O would evict stay at 2 to 4 bits; a channel balancer keeps their keys usable.

"No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization", 2024,
https://arxiv.org/abs/2402.18096. There is no official code; two independent ports, which agree on the equations, were
read.

    prompt:  score = column sums of the softmax, over all rows and the query heads of a KV head
             b_c   = sqrt(max |q_c| / max |k_c|), once, over real tokens and the group's query heads; 1 if either is 0
             n_hi  = floor(ratio · S): the newest floor(recent_share · n_hi) tokens and the best of the older ones
             importance tier: as it is (16 bits) or I(k · b), I(v) at hi_bits; retained tier: the same at lo_bits
    decode:  a new token enters the importance tier, every step adds to its scores, and whatever exceeds
             n_hi moves to the retained tier for good: the lowest scores outside the newest tokens
    I(x)     = alpha · round((x - beta) / alpha) + beta per token and head, in groups of D/2 channels (Eq. 1)

Keys are read as I(k · b) / b, which gives the logit of q/b with I(k · b) and leaves attention alone. Codes are fitted
to alpha and beta as they are stored. Open in the paper, as the ports have it: `size="ratio"` lets n_hi follow the
length, so that ratio 1 is the full cache (default); `size="prompt"` freezes it after each prompt of a chat, as in H2O's
code. With hi_bits below 16 a new token is quantised after its own step, and a demoted one from its decoded value
(inferred; tokens of the first prompt go to either tier from their exact values). `lo_bits="drop"` evicts instead of
demoting: H2O with the same selection. b is clamped to [1e-4, 1e4] (ports). Padding counts in no maximum, score or
length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elision.errors import OptionError
from elision.kv.actions import among
from elision.kv.budgets import Even
from elision.kv.classes import List, Tokens, counted, every, partition, picked
from elision.kv.method import KVHost, KVMethod
from elision.kv.packed import RowTier, check_group
from elision.kv.parts import Call, Keep, Rule
from elision.kv.scorers import ColumnSums
from elision.kv.store import LayerStore
from elision.method import Paper, option, register
from elision.tensors.packing import DTYPES, Grid


def balancer(q_max: Tensor, k_max: Tensor) -> Tensor:
    """b = sqrt(max |q| / max |k|) per channel, float32, of maxima of the same shape; 1 where either is 0 (Eqs. 2-4)."""
    q, k = q_max.float(), k_max.float()
    b = (q / k).sqrt().clamp(1e-4, 1e4)
    return torch.where((q > 0) & (k > 0), b, torch.ones_like(b))


def cache_size(ratio: float, hi_bits: int, lo_bits: int, group: int) -> float:
    """Share of a 16-bit cache: keys, values and their parameters in 16 bits, without positions and scores."""
    bits = [b if b == 16 else b + 32 / group for b in (hi_bits, lo_bits)]
    return (ratio * bits[0] + (1 - ratio) * bits[1]) / 16


@dataclass(frozen=True)
class Balanced(ColumnSums):
    """Accumulated attention of the importance tier; also finds the balancer at the end of the first prompt."""

    def observe(self, call: Call) -> None:
        """Add this call's column sums; of the first prompt's rows, take the maxima of |q|."""
        super().observe(call)
        state = call.store.state
        if "balance" in state:
            return
        q = call.grouped(call.q.abs())  # [B, G, g, m, D]
        if call.valid is not None:
            q = q * call.valid[:, None, None, :, None]
        peak = q.amax((2, 3), keepdim=True)[:, :, 0]  # [B, G, 1, D]
        state["q_max"] = torch.maximum(state["q_max"], peak) if "q_max" in state else peak
        if call.phase != "prompt_chunk":  # a step comes first over tokens that were in the cache before
            k, valid = call.store.dense["k"].abs(), call.store.dense.get("valid")
            k = k if valid is None else k * valid[..., None]
            state["balance"] = balancer(state.pop("q_max"), k.amax(2, keepdim=True))


def share(part: float, n: Keep) -> Keep:
    """floor(part · n), of one number or one per row."""
    return (n.double() * part + 1e-9).long() if isinstance(n, Tensor) else math.floor(n * part + 1e-9)


@dataclass(frozen=True)
class Demote:
    """Moves the least important tokens to the retained tier until `keep` are left in the importance tier.

    The importance tier is the dense table at 16 bits, else the last tier; the retained tier is the first.
    """

    method: MiKV

    def __call__(self, store: LayerStore, score: Tensor, keep: Keep) -> None:
        """`keep` is n_hi, one number or one per row."""
        hi = self._admitted(store, score)
        table = store.dense if hi is None else hi.meta
        pos = store.positions()[..., store.n - table.n :] if hi is None else table["pos"]
        valid = table.get("valid")
        rank = table["score"].masked_fill(self._newest(store, pos, valid, keep), torch.inf)
        keep = keep[:, None] if isinstance(keep, Tensor) else keep
        over = (table.n if valid is None else valid.sum(-1)) - keep  # [B, G or 1]
        over = over.clamp(min=0) if isinstance(over, Tensor) else max(over, 0)
        if isinstance(over, int) and over == 1 and valid is None and (hi is not None or self.method.hi_bits == 16):
            victim = rank.argmin(-1)
            self._move(store, hi, (victim[..., None], None))
            self._leave(store, victim, hi)
            return
        low, high = partition(rank, valid, over)
        if low[0].shape[-1]:
            self._move(store, hi, low)
        if self.method.hi_bits < 16 and hi is None:
            tier = self._tier(store, self.method.hi_bits)
            first = picked(store, high)
            tier.append(first.k, first.v, first.pos, counted(high), score=store.dense.pick("score", high[0]))
            store.tiers.append(tier)
            store.demote(high[0][..., :0])
        elif low[0].shape[-1]:
            self._stay(store, high, hi)

    def _newest(self, store: LayerStore, pos: Tensor, valid: Tensor | None, keep: Keep) -> Tensor:
        """Which slots of the importance tier, at positions `pos`, hold the newest tokens, [B, G or 1, n]."""
        newest = share(self.method.recent_share, keep)
        if "gaps" in store.state:  # padding lies between the turns of a chat
            return among(pos, torch.ones_like(pos, dtype=torch.bool) if valid is None else valid, newest, largest=True)
        return pos >= store.seen - (newest[:, None, None] if isinstance(newest, Tensor) else newest)

    def _admitted(self, store: LayerStore, score: Tensor) -> RowTier | None:
        """The packed importance tier, which the new tokens join; None at 16 bits and before the first tokens."""
        if self.method.hi_bits == 16 or not store.tiers:
            return None
        hi = store.tiers[-1]
        assert isinstance(hi, RowTier)
        new = every(store)
        tokens = picked(store, new)
        hi.append(tokens.k, tokens.v, tokens.pos, counted(new), score=store.dense.pick("score", new[0]))
        store.demote(new[0][..., :0])
        return hi

    def _tier(self, store: LayerStore, bits: int) -> RowTier:
        d, dv = (store.dense[name].shape[-1] for name in ("k", "v"))
        params = DTYPES[self.method.params]
        keys = Grid(bits, "token", group=self.method.group or d // 2, params=params)
        values = Grid(bits, "token", group=self.method.group or dv // 2, params=params)
        return RowTier(keys, values, store.state["balance"] if self.method.balance else None)

    def _move(self, store: LayerStore, hi: RowTier | None, low: List) -> None:
        """Add the tokens at the slots `low` of the importance tier to the retained one."""
        if self.method.lo_bits == "drop":
            return
        if hi is None:
            tokens = picked(store, low)
        else:
            shapes = [(*low[0].shape, store.dense[name].shape[-1]) for name in ("k", "v")]
            k, v = (torch.empty(shape, device=low[0].device) for shape in shapes)
            hi.take(low[0], k, v)
            tokens = Tokens(k, v, hi.meta.pick("pos", low[0]), low[1])
        if len(store.tiers) == (hi is not None):
            store.tiers.insert(0, self._tier(store, int(self.method.lo_bits)))
        lo = store.tiers[0]
        assert isinstance(lo, RowTier)
        lo.append(tokens.k, tokens.v, tokens.pos, counted(low))

    def _leave(self, store: LayerStore, victim: Tensor, hi: RowTier | None) -> None:
        """One slot per head leaves the importance tier; the newest token takes its place."""
        if hi is not None:
            hi.meta.overwrite(victim)
        elif self.method.lo_bits == "drop":
            store.evict_one(victim)
        else:
            store.demote_one(victim)

    def _stay(self, store: LayerStore, high: List, hi: RowTier | None) -> None:
        """Only the slots `high` stay in the importance tier."""
        if hi is not None:
            hi.keep(high[0], counted(high))
        elif self.method.lo_bits == "drop":
            store.evict(*high)
        else:
            store.demote(*high)


@register
@dataclass(frozen=True)
class MiKV(KVMethod):
    """Important tokens at high precision, all others at 2 to 4 bits."""

    name: ClassVar[str] = "mikv"
    description: ClassVar[str] = "all tokens stay: heavy hitters exact or at 8 bits, the rest at 2 to 4, keys balanced"
    paper: ClassVar[Paper] = Paper(
        "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization",
        "arXiv 2024",
        "https://arxiv.org/abs/2402.18096",
    )
    wants_lse: ClassVar[bool] = True

    ratio: float = option(0.2, "share of the tokens in the importance tier (r)", ge=0, le=1)
    hi_bits: int = option(16, "bits of the importance tier; 16 keeps tokens as they are", choices=(2, 3, 4, 8, 16))
    lo_bits: int | str = option(2, "bits of the retained tier; 'drop' evicts as H2O does", choices=(2, 3, 4, 8, "drop"))
    balance: bool = option(True, "balance the channels of quantised keys", choices=(True, False))
    size: Literal["ratio", "prompt"] = option(
        "ratio",
        "whether the importance tier grows with the length, or keeps its size after the prompt",
        choices=("ratio", "prompt"),
    )
    recent_share: float = option(0.5, "share of the importance tier that the newest tokens have", ge=0, le=1)
    group: int | None = option(None, "channels that share a range; None: half the head dimension", ge=1)
    params: str = option("float16", "type of stored minima and steps", choices=tuple(DTYPES))

    def __post_init__(self) -> None:
        """Check the options with each other."""
        super().__post_init__()
        if self.lo_bits == "drop" and self.hi_bits < 16:
            raise OptionError(f"mikv: lo_bits='drop' needs hi_bits=16, not {self.hi_bits}: it evicts from exact tokens")
        if self.lo_bits != "drop" and int(self.lo_bits) > self.hi_bits:
            raise OptionError(f"mikv: lo_bits={self.lo_bits} is more than hi_bits={self.hi_bits}: it cannot be more")

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One rule: demote after every call but inside a prompt."""
        check_group(self.name, "group", self.group, host.config)
        budget = Even(lambda call: share(self.ratio, call.lengths), growing=self.size == "ratio")
        return (Rule(lambda call: call.phase != "prompt_chunk", Balanced("sum"), budget, Demote(self)),)
