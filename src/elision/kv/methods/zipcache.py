"""ZipCache: every token stays, salient ones at 4 bits and the others at 2, by column-normalised attention of few rows.

"ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification", NeurIPS 2024,
https://arxiv.org/abs/2405.14256.

    prompt:  probes = last l - int(l - recent · l) rows and int(random · l) earlier ones, drawn with replacement
             p_i  = sum over probes and the query heads of a KV head of softmax(q K^T / sqrt d)_i
             p~_i = p_i / (number of probes that see column i)
             the int(low_ratio · l) smallest p~ go to bits_other, the rest to bits_salient
    decode:  new tokens stay exact; whenever `gap` of them have gathered, the newest query ranks them in the same way
             (without normalisation) and they are packed; old tokens never change their class

Keys are packed per channel over the tokens of their class. Values are divided by c_j = sqrt(max |V_j|) over all tokens
of both classes, and packed per token over all channels of all KV heads. The lists of a class are per head, so one range
spans the tokens at one place of every head's list, in the released order: others by ascending saliency, salient by
position.

Where paper and released code differ: the code divides by l - i, as if all rows were probes (`norm="full_count"`); the
paper's definition is the default. One ratio and one split serve keys and values, as in the code's own path. The code
takes key ranges and channel scales over the batch (`shared_ranges=True`), which makes a row's cache depend on its
neighbours; by default each row has its own. The code packs all tokens anew at every gap, old ones from their decoded
values, so they are rounded again (`requant="all"`, default); `requant="block"` leaves old codes alone and gives each
new block its own parameters (inferred). Packed tokens that `crop` takes back are not read any more; with "all" the next
packing closes their gaps, with "block" their codes stay. The code breaks on empty classes and turns all values into NaN
when one channel is zero; both work here. A later prompt of a chat is one more block, in which its own rows are the
probes (inferred: the paper has single prompts only). Padding counts in no range, count or probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elision.errors import OptionError
from elision.kv.classes import Tokens, closed_up, decoded, joined, partition, picked
from elision.kv.method import KVHost, KVMethod
from elision.kv.packed import ListTier, real_elements, side_by_side
from elision.kv.parts import Call, Keep, Rule
from elision.kv.probes import Norm, Probes
from elision.kv.store import LayerStore
from elision.method import Paper, option, register
from elision.tensors.packing import DTYPES, Grid, channel_scale


def fresh(store: LayerStore) -> int:
    """Tokens that came since the last packing, padding included; they are the newest dense slots."""
    return store.seen - int(store.state.get("packed", 0))


@dataclass(frozen=True)
class Share:
    """How many of the new tokens are salient: all but int(low · n) of n real ones."""

    low: float

    def allot(self, call: Call) -> Mapping[int, Keep]:
        """Salient tokens of this layer's new ones, one number or one per row."""
        n: Keep = fresh(call.store)
        if "valid" in call.store.dense:
            n = call.store.dense["valid"][:, 0, call.store.dense.n - n :].sum(-1)
            return {call.layer: n - (n.double() * self.low).long()}
        return {call.layer: n - int(n * self.low)}


@dataclass(frozen=True)
class Demote:
    """Packs the tokens of a layer that came since the last time, `keep` of them per head as salient."""

    method: ZipCache

    def __call__(self, store: LayerStore, score: Tensor, keep: Keep) -> None:
        """`score` [B, G, dense slots]; slots before the new ones are salient tokens that stay exact (16 bits)."""
        zipcache, dense, n = self.method, store.dense, fresh(store)
        old = dense.n - n
        valid = dense["valid"][:, :, old:] if "valid" in dense else None
        real: Keep = n if valid is None else valid[:, 0].sum(-1)
        low, high = partition(score[..., old:], valid, real - keep, zipcache.low_order)
        store.state["packed"] = store.seen
        exact = zipcache.bits_salient == 16
        tiers = store.tiers if zipcache.requant == "all" else []
        if exact and not tiers and low[0].shape[-1] == 0:
            return
        packed = [picked(store, (slots + old, listed)) for slots, listed in ([low] if exact else [low, high])]
        since = old if zipcache.requant == "block" else 0  # a block has parameters of its own
        scale = self._scale(dense["v"][:, :, since:], dense["valid"][:, :, since:] if "valid" in dense else None)
        for tier in tiers:  # at most one of each class
            assert isinstance(tier, ListTier)
            again = decoded(tier, dense["k"], dense["v"])
            scale = torch.maximum(scale, self._scale(again.v, again.valid))
            packed[tier.label] = joined(again, packed[tier.label])
        tiers.clear()
        packed = [closed_up(tokens) for tokens in packed]
        store.tiers.extend(self._tier(i, tokens, scale) for i, tokens in enumerate(packed) if tokens.pos.shape[2])
        first = torch.arange(old, device=score.device).expand(*score.shape[:2], old)
        stays, listed = high if exact else (high[0][..., :0], None)
        mark = None if listed is None else torch.cat([torch.ones_like(first, dtype=torch.bool), listed], -1)
        store.demote(torch.cat([first, stays + old], -1), mark)

    def _scale(self, v: Tensor, valid: Tensor | None) -> Tensor:
        """c [B or 1, 1, G · D] over the tokens v [B, G, n, D]."""
        flat, real = side_by_side(v), real_elements(valid, v)
        if self.method.shared_ranges:
            flat, real = flat.flatten(0, 1)[None], None if real is None else real.flatten(0, 1)[None]
        return channel_scale(flat, valid=real, params=DTYPES[self.method.params])

    def _tier(self, label: int, tokens: Tokens, scale: Tensor) -> ListTier:
        """The tokens of one class: 0 the others, 1 the salient ones."""
        bits, params = (self.method.bits_other, self.method.bits_salient)[label], DTYPES[self.method.params]
        keys, values = Grid(bits, "channel", params=params), Grid(bits, "token", params=params)
        shared = self.method.shared_ranges
        return ListTier(*tokens, keys=keys, values=values, scale=scale, shared=shared, label=label)


@register
@dataclass(frozen=True)
class ZipCache(KVMethod):
    """Options of ZipCache."""

    name: ClassVar[str] = "zipcache"
    description: ClassVar[str] = (
        "all tokens stay: 4 bits for salient ones by normalised probe attention, 2 for the rest"
    )
    paper: ClassVar[Paper | None] = Paper(
        "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification",
        "NeurIPS 2024",
        "https://arxiv.org/abs/2405.14256",
    )

    low_ratio: float = option(0.4, "share of the tokens that are packed at `bits_other`", ge=0, le=1)
    bits_salient: int = option(4, "bits of salient tokens; 16 keeps them as they are", choices=(2, 3, 4, 8, 16))
    bits_other: int = option(2, "bits of the other tokens", choices=(2, 3, 4, 8, 16))
    norm: Norm = option(
        "probe_nnz",
        "what probe sums are divided by: the probes that see the column, or all rows that do (released code)",
        choices=("probe_nnz", "full_count"),
    )
    requant: Literal["all", "block"] = option(
        "all",
        "at every gap, pack all tokens anew (released code), or the new ones with parameters of their own (inferred)",
        choices=("all", "block"),
    )
    recent_probes: float = option(0.05, "share of a prompt's newest rows that are probes", ge=0, le=1)
    random_probes: float = option(0.05, "share of random earlier rows that are probes", ge=0, le=1)
    gap: int = option(100, "new tokens that stay exact before they are packed (streaming gap)", ge=1)
    seed: int = option(0, "of the random probes", ge=0)
    params: str = option("float16", "type of stored minima, steps and channel scales", choices=tuple(DTYPES))
    shared_ranges: bool = option(
        False, "take key ranges and channel scales over the batch (released code)", choices=(False, True)
    )
    low_order: Literal["saliency", "position"] = option(
        "saliency",
        "order of the others' lists, which decides whose values share a range (released code: ascending saliency)",
        choices=("saliency", "position"),
    )

    def __post_init__(self) -> None:
        """Check the options with each other."""
        super().__post_init__()
        if self.bits_other > self.bits_salient:
            raise OptionError(
                f"zipcache: bits_other={self.bits_other} is more than bits_salient={self.bits_salient}: salient tokens "
                "have at least as many bits as the others"
            )
        if self.recent_probes + self.random_probes == 0:
            raise OptionError("zipcache: recent_probes and random_probes are both 0: some row has to be a probe")

    def due(self, call: Call) -> bool:
        """After a prompt, and whenever `gap` new tokens have gathered."""
        state = call.store.state
        state["packed"] = min(state.get("packed", 0), call.first)  # packed tokens may have been taken back since
        if self.bits_other == 16 or call.phase == "prompt_chunk":
            return False
        return call.phase == "prompt_end" or fresh(call.store) >= self.gap

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One rule."""
        probes = Probes(self.recent_probes, self.random_probes, self.norm, self.seed)
        return (Rule(self.due, probes, Share(self.low_ratio), Demote(self)),)
