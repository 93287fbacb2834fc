"""Actions: what becomes of tokens that a budget has no room for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elision.kv.parts import Keep
from elision.kv.store import LayerStore


def ranked(store: LayerStore, score: Tensor, recent: Keep = 0, first: int = 0) -> Tensor:
    """`score` [B, G or 1, n] of the dense slots as float32 with padding last and protected tokens first.

    Protected are the newest `recent` (one number, or one per row) and the oldest `first` real tokens of each row, by
    position, not by slot.
    """
    score = score.float()
    valid = store.dense.get("valid")
    if isinstance(recent, Tensor):
        since = store.seen - recent.to(score.device)[:, None, None]
        score = score.masked_fill(store.positions()[:, :, -store.dense.n :] >= since, torch.inf)
    elif recent:
        newest = store.seen - recent
        if store.intact:
            score = score.clone()
            score[..., max(newest - (store.seen - score.shape[-1]), 0) :] = torch.inf
        else:
            score = score.masked_fill(store.dense["pos"] >= newest, torch.inf)
    if first:
        positions = store.positions()[:, :, -store.dense.n :]
        start = store.state.get("pads", 0)
        oldest = positions < first + start
        score = score.masked_fill(oldest, torch.inf)
    return score if valid is None else score.masked_fill(~valid, -torch.inf)


@dataclass(frozen=True)
class Evict:
    """Drop all but the highest scores.

    Attributes:
        recent: the newest tokens of a layer that always stay; they count towards what is kept.
        first: the oldest real tokens that always stay.
        order: "time" keeps slots in the order of time; "score" leaves them as sorted, highest first, before the
            protected newest ones (CAKE's released code); "any" lets the newest token take the victim's slot when one
            token has to go, which costs next to nothing.
    """

    recent: Keep = 0
    first: int = 0
    order: str = "any"

    def __call__(self, store: LayerStore, score: Tensor, keep: Keep) -> None:
        """Bring the dense slots down to `keep` (one number, or one per row)."""
        n = store.dense.n
        most = int(keep.max()) if isinstance(keep, Tensor) else keep
        if n <= most and not isinstance(keep, Tensor):
            return
        score = ranked(store, score, self.recent, self.first)
        if not isinstance(keep, Tensor) and self.order == "any" and keep == n - 1:
            store.evict_one(score.argmin(-1))
            return
        most = max(min(most, n), 0)
        # a stable sort, not top-k: of equal scores the older token stays, however the row is padded
        values, index = (x[..., :most] for x in torch.sort(score, dim=-1, descending=True, stable=True))
        if isinstance(keep, Tensor):
            inside = torch.arange(most, device=score.device) < keep.to(score.device)[:, None, None]
            held = (values > -torch.inf) & inside
        else:
            held = None
        if self.order != "score":
            index, order = index.sort(-1)
            held = None if held is None else held.gather(-1, order)
        store.evict(index, None if held is None or bool(held.all()) else held.expand(index.shape))
