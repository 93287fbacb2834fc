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


def _best(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest `count` scores and their slots; of equal scores the older slot, however the row is padded."""
    values, index = torch.sort(score, dim=-1, descending=True, stable=True)
    return values[..., :count], index[..., :count]


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
        if isinstance(keep, Tensor):
            self._each_row(store, score, keep.to(score.device))
            return
        if n <= keep:
            return
        score = ranked(store, score, self.recent, self.first)
        if self.order == "any" and keep == n - 1:
            store.evict_one(score.argmin(-1))
            return
        index = _best(score, max(keep, 0))[1]
        store.evict(index if self.order == "score" else index.sort(-1).values)

    def _each_row(self, store: LayerStore, score: Tensor, keep: Tensor) -> None:
        """Every row down to its own number [B]; slots that a row has no use for are marked invalid."""
        n, valid = store.dense.n, store.dense.get("valid")
        held = torch.full_like(keep, n) if valid is None else valid[:, 0].sum(-1)
        over = held - keep
        most, worst = (int(x) for x in torch.stack([held.minimum(keep).max().clamp(min=0), over.max()]).tolist())
        if worst <= 0 and most == n:
            return
        score = ranked(store, score, self.recent, self.first)
        if self.order == "any" and worst <= 1 and n - most <= 1:
            full = (over > 0)[:, None]
            lowest = score.masked_fill(score == -torch.inf, torch.inf).argmin(-1)
            victim = torch.where(full, lowest, score.argmin(-1))
            if most < n:  # a row below its number has padding to give
                store.evict_one(victim)
            else:
                store.blank(victim, full)
            return
        values, index = _best(score, most)
        inside = torch.arange(most, device=score.device) < keep[:, None, None]
        held_slots = (values > -torch.inf) & inside
        if self.order != "score":
            index, order = index.sort(-1)
            held_slots = held_slots.gather(-1, order)
        store.evict(index, None if bool(held_slots.all()) else held_slots)
