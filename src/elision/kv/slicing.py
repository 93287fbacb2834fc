"""Slicing one budget among layers: real shares by preference, and their repair to whole tokens under a cap.

All functions work on the rows of a batch at once; layers are those seen so far, in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elision.kv.parts import Keep
from elision.kv.store import LayerStore


def shares(preference: Tensor, total: Tensor) -> Tensor:
    """`total` [B] in proportion to `preference` [B, L] (not negative), float32 [B, L]; evenly where all are zero."""
    preference = preference.float().clamp(max=1e30)  # so that a sum of many stays finite
    whole = preference.sum(-1, keepdim=True)
    even = torch.full_like(preference, 1 / preference.shape[1])
    return torch.where(whole > 0, preference / whole, even) * total[:, None]


def single_round(real: Tensor, total: Tensor, cap: Tensor) -> Tensor:
    """CAKE's released repair of `real` [B, L] to integers that sum to `total` [B].

    Shares are truncated and cut at `cap` [B, L]; what was cut goes to the layers below it in equal parts, once, and
    what rounding left over likewise. Both may lift a layer over its cap: cutting it again loses those tokens.
    """
    whole = real.trunc().long()
    cut = (whole - cap).clamp(min=0).sum(-1)
    budget = whole.minimum(cap)
    budget = budget + _spread(cut, budget < cap)
    rest = total - budget.sum(-1)
    return budget + _spread(rest.clamp(min=0), budget < cap) - _spread((-rest).clamp(min=0), budget > 1)


def water_filling(real: Tensor, total: Tensor, cap: Tensor) -> Tensor:
    """Like `single_round`, but repeated until no layer is over its cap: min(total, sum of caps) is always used."""
    budget = real.trunc().long().minimum(cap)
    goal = total.minimum(cap.sum(-1))
    rest = goal - budget.sum(-1)
    while bool((rest > 0).any()):
        budget = (budget + _spread(rest.clamp(min=0), budget < cap)).minimum(cap)
        rest = goal - budget.sum(-1)
    return budget - _spread((-rest).clamp(min=0), budget > 1)  # shares of float32 may round up


def _spread(amount: Tensor, among: Tensor) -> Tensor:
    """`amount` [B] in equal parts over the layers `among` [B, L], the remainder one each to the first of them."""
    count = among.sum(-1, keepdim=True).clamp(min=1)
    part, rest = amount[:, None] // count, amount[:, None] % count
    return (part + (among.cumsum(-1) <= rest).long()) * among


def per_row(number: Keep, like: Tensor) -> Tensor:
    """A number, or one per row, as one per row of the batch of `like`: int64 [B]."""
    if isinstance(number, Tensor):
        return number.to(like.device)
    return torch.full((len(like),), number, device=like.device)


def one_if_equal(numbers: Tensor) -> Keep:
    """`numbers` [B] as one number where all rows agree, which lets decoding go without asking the device."""
    first, *others = numbers.tolist()
    return int(first) if all(x == first for x in others) else numbers


def real_slots(store: LayerStore) -> Tensor:
    """How many dense slots of each row hold a real token, [B]."""
    valid = store.dense.get("valid")
    return per_row(store.dense.n, store.dense["k"]) if valid is None else valid[:, 0].sum(-1)


def slot_order(store: LayerStore, column: str = "pos", newest: int = 0) -> Tensor | None:
    """Dense slots by `column`, lowest first and padding before all, [B, G, n]; None if that is how they lie.

    The `newest` slots at the end are left out.
    """
    key, valid = store.dense.get(column), store.dense.get("valid")
    if key is None:
        if valid is None or "gaps" not in store.state:
            return None
        key = store.positions()[:, :, -store.dense.n :]
    key = key if valid is None else key.masked_fill(~valid, -1)
    key = key[:, :, : key.shape[2] - newest]
    return key.argsort(dim=-1, stable=True).expand(-1, store.dense["k"].shape[1], -1)
