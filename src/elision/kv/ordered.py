"""Scores that depend on which tokens are neighbours, wherever their slots lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elision.kv.parts import Call, Keep
from elision.kv.scorers import last_row, pool
from elision.kv.slicing import per_row, real_slots, slot_order
from elision.kv.store import LayerStore


@dataclass(frozen=True)
class PooledLastRow:
    """Weights of the newest query, averaged over neighbours; the newest tokens are infinite (CAKE).

    Attributes:
        window: how many are the newest.
        kernel: how many neighbours are averaged.
        by_score: neighbours are those in the order in which an earlier top-k left the tokens, not in the text; the
            order is kept as a column of ranks.
        keep: how many slots a layer may hold, so that rows that lose nothing keep their order.
    """

    window: int
    kernel: int
    by_score: bool
    keep: Callable[[Call], Keep]

    def observe(self, call: Call) -> None:
        """Nothing to remember."""

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """[B, G, n]."""
        n = store.dense.n
        before = max(n - self.window, 0)
        order = slot_order(store, "rank" if "rank" in store.dense else "pos")
        weights = last_row(call)
        weights = weights if order is None else weights.gather(-1, order)
        score = torch.full_like(weights, torch.inf)
        score[..., :before] = pool(weights[..., :before], self.kernel)
        padding = 0 if "valid" not in store.dense else (n - real_slots(store))[:, None, None]
        score = _settle_ties(score, before, before - padding, self.kernel)
        if self.by_score:
            self._rank(call, store, score, order)
        return score if order is None else torch.empty_like(score).scatter_(-1, order, score)

    def _rank(self, call: Call, store: LayerStore, score: Tensor, order: Tensor | None) -> None:
        """Write down the order in which top-k leaves the tokens, in rows that lose one: by score, then the window."""
        places = torch.arange(store.dense.n, device=score.device).expand_as(score)
        order = places if order is None else order
        window = score == torch.inf
        key, valid, keep = score.neg().masked_fill_(window, torch.inf), store.dense.get("valid"), self.keep(call)
        if valid is not None:
            key = key.masked_fill(~valid.expand_as(order).gather(-1, order), -torch.inf)
        best = key.argsort(dim=-1, stable=True)
        if valid is not None or isinstance(keep, Tensor):
            over = real_slots(store) > per_row(keep, score)
            best = torch.where(over[:, None, None], best, places)
        rank = torch.empty_like(score).scatter_(-1, order.gather(-1, best), places.float())
        store.dense["rank"], store.fills["rank"] = rank, torch.inf


def _settle_ties(score: Tensor, before: int, real: Keep, kernel: int) -> Tensor:
    """Where so few tokens are left that every average is of all of them, the oldest one is worth least."""
    few = real <= kernel // 2 + 1
    if few is False:
        return score
    score = score.clone()
    age = torch.arange(before, device=score.device).float()
    score[..., :before] = torch.where(torch.as_tensor(few, device=score.device), age, score[..., :before])
    return score
