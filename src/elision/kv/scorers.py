"""Scorers: what makes a token worth keeping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from elision.kv.parts import Call
from elision.kv.store import LayerStore

Reduce = Literal["mean", "sum", "max", "first", "all"]


def reduce_group(per_query_head: Tensor, how: Reduce) -> Tensor:
    """Scores [B, G, g, n] of the query heads as [B, G, n], per KV head; "all" is the mean of all heads, [B, 1, n]."""
    if how == "all":
        return per_query_head.mean((1, 2), keepdim=True)[:, :, 0]
    if how == "first":
        return per_query_head[:, :, 0]
    if how == "max":
        return per_query_head.amax(2)
    return per_query_head.mean(2) if how == "mean" else per_query_head.sum(2)


def pool(score: Tensor, kernel: int, kind: Literal["avg", "max"] = "avg") -> Tensor:
    """Smooth [B, G, n] over neighbouring slots, zero padded at both ends (average) or bounded (maximum)."""
    if kernel <= 1 or score.shape[-1] == 0:
        return score
    if kind == "max":
        return functional.max_pool1d(score, kernel, stride=1, padding=kernel // 2)[..., : score.shape[-1]]
    windows = functional.pad(score, (kernel // 2, kernel // 2)).unfold(-1, kernel, 1)  # faster than avg_pool1d
    return windows.sum(-1)[..., : score.shape[-1]] / kernel


def by_position(score: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, G, n] in the order of their positions [B, G or 1, n], and the order to undo it with."""
    order = positions.expand_as(score).argsort(-1)
    return score.gather(-1, order), order


@dataclass(frozen=True)
class ColumnSums:
    """Accumulated attention: every row that ever attended adds its weights; local statistics, no decay (H2O).

    `reduce` says how the query heads of one KV head count; the running sum is a column of the store, float32.
    """

    reduce: Reduce = "mean"

    def observe(self, call: Call) -> None:
        """Add this call's column sums."""
        new = reduce_group(call.grouped(call.column_sums()), self.reduce)
        store = call.store
        if "score" not in store.dense:
            store.dense["score"] = torch.zeros_like(new[:, :, store.n - store.dense.n :])
            store.fills["score"] = 0.0
        at = 0
        for slots in (*(tier.meta for tier in store.tiers), store.dense):
            if "score" in slots:
                slots["score"].add_(new[:, :, at : at + slots.n])
            at += slots.n

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """The running sums, [B, G, n]."""
        del call
        return store.dense["score"]


@dataclass(frozen=True)
class Window(ABC):
    """Attention of the last `rows` queries of a prompt, kept across its chunks (SnapKV and what follows it)."""

    rows: int

    def observe(self, call: Call) -> None:
        """Remember the prompt's newest queries."""
        state = call.store.state
        if call.phase == "step":
            return
        q, valid = call.q[:, :, -self.rows :], None if call.valid is None else call.valid[:, -self.rows :]
        if not call.starts and "tail" in state and q.shape[2] < self.rows:
            old, known = state["tail"], state.get("tail_valid")
            if valid is not None or known is not None:
                mine = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if valid is None else valid
                before = torch.ones_like(old[:, 0, :, 0], dtype=torch.bool) if known is None else known
                valid = torch.cat([before, mine], 1)[:, -self.rows :]
            q = torch.cat([old, q], 2)[:, :, -self.rows :]
        state["tail"], state["tail_valid"] = q, valid
        if call.phase == "prompt_end":
            state.pop("tail"), state.pop("tail_valid")
            state["window"], state["window_valid"] = q, valid

    def weights(self, call: Call) -> Tensor:
        """Their weights over every slot, [B, G, g, rows, n], float32; at the end of a prompt."""
        q, valid = call.store.state.pop("window"), call.store.state.pop("window_valid")
        weights: Tensor = call.probs(q.shape[2], q, valid)
        return weights

    @abstractmethod
    def score(self, call: Call, store: LayerStore) -> Tensor:
        """Subclasses say what the weights amount to."""


def last_row(call: Call, reduce: Reduce = "mean") -> Tensor:
    """Weights of the newest query over every slot, [B, G or 1, n]."""
    return reduce_group(call.probs(1)[:, :, :, 0], reduce)


@dataclass(frozen=True)
class LastRow:
    """Weights of the newest query alone (TOVA)."""

    reduce: Reduce = "mean"

    def observe(self, call: Call) -> None:
        """Nothing to remember."""

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """[B, G or 1, n]."""
        return last_row(call, self.reduce)


@dataclass(frozen=True)
class Newest:
    """The newer, the better."""

    def observe(self, call: Call) -> None:
        """Nothing to remember."""

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """[B, 1, n]."""
        del call
        return newest(store)


def newest(store: LayerStore) -> Tensor:
    """Positions of the dense slots as scores, [B, G or 1, n]."""
    return store.positions()[:, :, -store.dense.n :]
