"""Tokens in classes: lists of slots per head, of which some are shorter in padded rows, and what is at them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from elision.kv.packed import narrow
from elision.kv.parts import Keep
from elision.kv.store import LayerStore, Tier, rows

List = tuple[Tensor, Tensor | None]  # slots [B, G, n], and which of them are real (None: all)


class Tokens(NamedTuple):
    """Keys and values [B, G, n, D], positions [B, G, n], and which are real [B, G, n] (None: all)."""

    k: Tensor
    v: Tensor
    pos: Tensor
    valid: Tensor | None


def partition(score: Tensor, valid: Tensor | None, n_low: Keep, order: str = "saliency") -> tuple[List, List]:
    """The `n_low` least salient of the real tokens per head, and all others.

    Args:
        score: [B, G, n].
        valid: [B, G or 1, n], or None if all are real.
        n_low: One number, or one per row [B], or per row and head [B, G or 1].
        order: Of the first list: "saliency" (ascending) or "position"; the second is always by position.
    """
    if not isinstance(n_low, Tensor) and valid is None:
        low = _lowest(score, n_low)
        low = low.sort(-1).values if order == "position" else low
        rest = torch.ones_like(score, dtype=torch.bool).scatter_(-1, low, value=False)
        high = rest.int().argsort(dim=-1, descending=True, stable=True)[..., : score.shape[-1] - n_low]
        return (low, None), (high, None)
    real = torch.ones_like(score, dtype=torch.bool) if valid is None else valid.expand_as(score)
    n_low = n_low if isinstance(n_low, Tensor) else real.new_full((len(score),), n_low, dtype=torch.int64)
    n_low = n_low.view(len(score), -1, 1)
    most = int(n_low.max())
    low = _lowest(score.masked_fill(~real, torch.inf), most)
    listed = (torch.arange(most, device=score.device) < n_low) & real.gather(-1, low)
    rest = real.scatter(-1, low, real.gather(-1, low) & ~listed)
    if order == "position":
        low = low.masked_fill(~listed, score.shape[-1]).sort(-1).values.clamp(max=score.shape[-1] - 1)
    high = rest.int().argsort(dim=-1, descending=True, stable=True)[..., : int(rest.sum(-1).max())]
    return (low, listed), (high, rest.gather(-1, high))


def _lowest(score: Tensor, n: int) -> Tensor:
    """The n lowest, ascending; stable, so that of equal scores the older token comes first however a row is padded."""
    return score.sort(dim=-1, stable=True).indices[..., :n]


def every(store: LayerStore) -> List:
    """All dense slots, [B, 1, n], real ones first and otherwise as they lie."""
    n, valid = store.dense.n, store.dense.get("valid")
    if valid is None:
        k = store.dense["k"]
        return torch.arange(n, device=k.device).expand(len(k), 1, n), None
    index = valid.int().argsort(dim=-1, descending=True, stable=True)
    return index, valid.gather(-1, index)


def counted(listed: List) -> Tensor | None:
    """How many slots of each row and head are real, [B, G or 1], unless all are."""
    valid = listed[1]
    if valid is None or bool(valid.all()):
        return None
    return valid.sum(-1)


def picked(store: LayerStore, listed: List) -> Tokens:
    """The dense tokens at the slots `listed`."""
    (index, valid), dense = listed, store.dense
    pos = dense.pick("pos", index) if "pos" in dense else index + (store.seen - dense.n)
    return Tokens(dense.pick("k", index), dense.pick("v", index), narrow(pos, store.seen), valid)


def decoded(tier: Tier, k: Tensor, v: Tensor) -> Tokens:
    """All tokens of a tier in float32; `k` and `v` are of the shape of the rest."""
    keys, values = (x.new_empty(*x.shape[:2], tier.meta.n, x.shape[3], dtype=torch.float32) for x in (k, v))
    tier.read(keys, values)
    return Tokens(keys, values, tier.meta["pos"], tier.meta.get("valid"))


def closed_up(tokens: Tokens) -> Tokens:
    """The lists without what is not real: each moves up, and all end where the longest does."""
    if tokens.valid is None:
        return tokens
    valid = tokens.valid.expand_as(tokens.pos)
    index = valid.int().argsort(dim=-1, descending=True, stable=True)[..., : int(valid.sum(-1).max())]
    left = valid.gather(-1, index)
    k, v, pos = (rows(x, index) for x in tokens[:3])
    return Tokens(k, v, pos, None if bool(left.all()) else left)


def joined(a: Tokens, b: Tokens) -> Tokens:
    """The lists of `a`, each continued by that of `b`."""
    valid = None
    if a.valid is not None or b.valid is not None:
        valid = torch.cat([torch.ones_like(t.pos, dtype=torch.bool) if t.valid is None else t.valid for t in (a, b)], 2)
    return Tokens(torch.cat([a.k, b.k], 2), torch.cat([a.v, b.v], 2), torch.cat([a.pos, b.pos], 2), valid)
