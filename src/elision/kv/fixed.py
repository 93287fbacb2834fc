"""What PrefixKV and Elastic Cache share: scores of the prompt's rows, and deletion at a fixed place while decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from elision.kv.method import tokens_of
from elision.kv.parts import Call, Keep
from elision.kv.scorers import reduce_group
from elision.kv.store import LayerStore


def held(store: LayerStore) -> Keep:
    """Real tokens that the dense slots hold, the same in all heads: one number, or one per row [B]."""
    valid = store.dense.get("valid")
    return store.dense.n if valid is None else valid[:, 0].sum(-1)


def share_of(budget: int | float | str, call: Call) -> tuple[float | Tensor, Keep]:
    """`budget` as a share of the real tokens seen by now, at most 1, and in tokens (0 if it is a share).

    Each is one number or one per row [B]; shares are float64.
    """
    if isinstance(budget, float):
        return budget, 0
    tokens, seen = tokens_of(budget, call), call.lengths
    if isinstance(seen, Tensor):
        return (tokens / seen.double()).clamp(max=1.0), tokens
    return min(int(tokens) / seen, 1.0), tokens


@dataclass(frozen=True)
class PromptSums:
    """Attention that every slot received from all rows of the prompt, averaged over the heads (one score for all).

    Parts of a prompt add up; a new turn starts from zero, with what is left of the turns before among its columns.
    """

    def observe(self, call: Call) -> None:
        """Add the sums of one part of a prompt; decoding steps are not looked at."""
        if call.phase == "step":
            return
        state = call.store.state
        sums = reduce_group(call.grouped(call.column_sums()), "all")  # [B, 1, n]
        before = None if call.starts else state.get("sums")
        if before is not None:
            sums = sums + functional.pad(before, (0, sums.shape[-1] - before.shape[-1]))
        state["sums"] = sums

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """[B, 1, n]; they are not needed again."""
        del call
        sums: Tensor = store.state.pop("sums")
        return sums


def by_row(one: Callable[..., Sequence[float]], call: Call, *args: float | Tensor) -> list[Any]:
    """`one(*args)` if all are numbers, else row by row, its results as tensors [B] (whole numbers, or float64)."""
    if not any(isinstance(x, Tensor) for x in args):
        return list(one(*args))
    k = call.store.dense["k"]
    rows = zip(*(x.tolist() if isinstance(x, Tensor) else [x] * len(k) for x in args), strict=True)
    found = zip(*(one(*row) for row in rows), strict=True)
    kinds = (torch.int64, torch.float64)
    return [torch.tensor(x, dtype=kinds[isinstance(x[0], float)], device=k.device) for x in found]


def overdue(call: Call) -> Keep:
    """How many tokens a layer has to let go after a decoding step, see `Fraction`; 0 if none in any row."""
    store, state = call.store, call.store.state
    if "share" not in state:
        return 0
    have, seen = (x.double() if isinstance(x, Tensor) else x for x in (held(store), call.lengths))
    gone: Keep = 0
    for back in reversed(range(call.m)):
        over = (have - gone - back) - (seen - back) * state["share"] - state["room"]
        gone = gone + (over >= 1)
    return gone if isinstance(gone, int) or bool(gone.any()) else 0


@dataclass(frozen=True)
class Fraction:
    """While decoding, every layer holds `state["share"]` of all tokens seen and `state["room"]` more.

    One of the two is 0: layers grow with the stream, or stay as they are. One token is let go for every new one that
    finds the layer over that by a whole token. When several tokens came in one forward, each is counted as if it had
    come alone.
    """

    def allot(self, call: Call) -> Mapping[int, Keep]:
        """What stays of this layer, if anything has to go; `state["due"]` is how many go."""
        gone = overdue(call)
        if isinstance(gone, int) and not gone:
            return {}
        call.store.state["due"] = gone
        return {call.layer: held(call.store) - gone}


@dataclass(frozen=True)
class FixedSlot:
    """The same place in the order of time, `state["point"]`, is emptied again and again; the rest moves up.

    A place below zero counts from the end of what is held.
    """

    def observe(self, call: Call) -> None:
        """Attention of decoding steps is not used."""

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """0 for the tokens that have to go, 1 for all others: [B, 1, n]."""
        del call
        due, point, n = store.state.pop("due"), store.state["point"], held(store)
        places = store.positions()
        if not any(isinstance(x, Tensor) for x in (due, point, n)):
            point = n - due + 1 + point if point < 0 else point
            point = max(min(point, n - due), 0)
            low = places.kthvalue(point + 1, -1, keepdim=True).values
            if due == 1:
                return (places != low).float()
            high = places.kthvalue(point + due, -1, keepdim=True).values
        else:
            valid = store.valid()
            device = places.device
            due, point, n = (torch.as_tensor(x, device=device).expand(len(places)) for x in (due, point, n))
            point = torch.where(point < 0, n - due + 1 + point, point)
            point = torch.minimum(point, n - due).clamp(min=0)[:, None, None]
            ends = torch.cat([point, (point + due[:, None, None] - 1).clamp(min=0)], -1)
            last = torch.iinfo(places.dtype).max
            order = (places if valid is None else places.masked_fill(~valid, last)).sort(-1).values
            low, high = order.gather(-1, ends).chunk(2, -1)
        return ((places < low) | (places > high)).float()
