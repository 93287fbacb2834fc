"""Actions: what becomes of tokens that a budget has no room for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elision.kv.parts import Keep
from elision.kv.store import LayerStore


def ranked(store: LayerStore, score: Tensor, recent: Keep = 0, first: int = 0) -> Tensor:
    """`score` [B, G or 1, n] of the dense slots as float32 or float64 with padding last and protected tokens first.

    Protected are the newest `recent` (one number, or one per row) and the oldest `first` real tokens of each row, by
    position, not by slot.
    """
    score = score if score.dtype == torch.float64 else score.float()
    valid = store.dense.get("valid")
    if valid is not None and "gaps" in store.state:
        places = store.positions()[:, :, -store.dense.n :]
        score = score.masked_fill(among(places, valid, recent, largest=True), torch.inf)
        score = score.masked_fill(among(places, valid, first, largest=False), torch.inf)
        return score.masked_fill(~valid, -torch.inf)
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


def among(places: Tensor, valid: Tensor, count: Keep, *, largest: bool) -> Tensor:
    """Which slots hold one of the `count` newest (or oldest) real tokens of their row, [B, G or 1, n].

    For rows with padding between their turns, where the positions `places` [B, G or 1, n] do not count tokens.
    """
    places = (places if largest else -places) + torch.zeros_like(valid, dtype=places.dtype)
    valid = valid.expand_as(places)
    order = places.masked_fill(~valid, torch.iinfo(places.dtype).min).argsort(dim=-1, descending=True)
    count = count.to(places.device)[:, None, None] if isinstance(count, Tensor) else torch.tensor(count)
    inside = torch.arange(places.shape[-1], device=places.device) < count.to(places.device)
    return torch.zeros_like(valid).scatter_(-1, order, inside.expand_as(order))


def best(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of [B, G, n] and their slots, highest first.

    A stable sort, not top-k: of equal scores the older token stays, however the row is padded.
    """
    values, index = torch.sort(score, dim=-1, descending=True, stable=True)
    return values[..., :k], index[..., :k]


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
        _, index = best(score, max(keep, 0))
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
        values, index = best(score, most)
        inside = torch.arange(most, device=score.device) < keep[:, None, None]
        held_slots = (values > -torch.inf) & inside
        if self.order != "score":  # what a row has no use for lies first, so that nothing is between neighbours
            index = torch.where(held_slots, index, index - n).sort(-1).values
            held_slots, index = index >= 0, index % n
        store.evict(index, None if bool(held_slots.all()) else held_slots)


def nearest(sources: Tensor, anchors: Tensor) -> Tensor:
    """Index of the anchor closest to every source, the earlier one of two as close; both ascending, [s] and [a]."""
    after = torch.searchsorted(anchors, sources).clamp(max=len(anchors) - 1)
    before = (after - 1).clamp(min=0)
    return torch.where(sources - anchors[before] <= (anchors[after] - sources).abs(), before, after)


@dataclass(frozen=True)
class Merge:
    """Bring the dense slots of each row down by averaging what goes into the nearest anchor that stays.

    Scores have to be the same for all heads [B, 1, n]; what stays is put in the order of time. The oldest `first` and
    the newest real token of a row always stay and take nothing in; of the others, the best are anchors. An anchor's key
    and value become the plain mean of its own and of those assigned to it, over vectors as they are cached. Where no
    anchor is left, tokens are dropped.

    Attributes:
        first: the oldest real tokens that always stay.
        merge: False drops the same tokens instead.
        swapped: the selection and the sources of Elastic Cache's released code, which tests the sorting permutation
            instead of the ranks and reads the merged vectors `first` slots too early.
    """

    first: int = 1
    merge: bool = True
    swapped: bool = False

    def __call__(self, store: LayerStore, score: Tensor, keep: Keep) -> None:
        """Bring the dense slots down to `keep` (one number, or one per row)."""
        b, device = len(score), score.device
        valid, places = store.dense.get("valid"), store.positions().expand(b, 1, -1)[:, 0].contiguous()
        k, v = store.dense["k"], store.dense["v"]
        width = int(keep.max()) if isinstance(keep, Tensor) else keep
        index = torch.zeros(b, 1, width, dtype=torch.int64, device=device)
        real = torch.zeros(b, 1, width, dtype=torch.bool, device=device)
        keys, values = (x.new_zeros(b, x.shape[1], width, x.shape[3]) for x in (k, v))
        for row in range(b):
            mine = places[row].argsort()  # slots may have been reused since the last time
            mine = mine if valid is None else mine[valid[row, 0, mine]]
            stay = keep if isinstance(keep, int) else int(keep[row])
            kept, source, target = self._split(score[row, 0, mine], places[row, mine], stay)
            count = len(kept)
            index[row, 0, :count], real[row, 0, :count] = mine[kept], True
            for out, column in ((keys, k), (values, v)):
                out[row, :, :count] = _mean(column[row], mine[kept], mine[source], target)
        lost = store.evicted
        store.evict(index, None if bool(real.all()) else real)
        if self.merge:
            store.dense["k"], store.dense["v"] = keys, values
            store.merged, store.evicted = store.merged + store.evicted - lost, lost

    def _split(self, score: Tensor, places: Tensor, stay: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots of one row that stay, slots that are merged, and into which of those that stay (by its number)."""
        n, first = len(score), self.first
        everything, none = torch.arange(n, device=score.device), torch.arange(0, device=score.device)
        if stay >= n:
            return everything, none, none
        if self.swapped and stay == n - 1:
            return everything[1:], none, none  # the release takes this prompt for a decoding step
        candidates, gone = max(n - first - 1, 0), n - stay
        rank = score[first : n - 1].argsort(stable=True)
        rank = rank if self.swapped else rank.argsort()
        thrown = (rank < gone).nonzero()[:, 0]
        anchors = (rank >= gone).nonzero()[:, 0] + first
        kept = torch.cat([everything[: n - 1 - candidates], anchors, everything[n - 1 :]])
        if not self.merge or not len(anchors):
            return kept, none, none
        source = thrown if self.swapped else thrown + first
        return kept, source, nearest(places[source], places[anchors]) + (n - 1 - candidates)


def _mean(column: Tensor, kept: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """`column` [G, n, D] at `kept`, where number `target[i]` of them also counts the slot `source[i]`; [G, k, D]."""
    if not len(source):
        return column[:, kept]
    total = column[:, kept].float().index_add_(1, target, column[:, source].float())
    count = torch.ones(len(kept), device=column.device).index_add_(0, target, torch.ones_like(target).float())
    return (total / count[:, None]).to(column.dtype)
