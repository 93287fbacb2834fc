"""SnapKV: what the last queries of a prompt attend to, smoothed, is kept once the prompt is through.

Baseline of CAKE, DapQ and others ("SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024,
https://arxiv.org/abs/2404.14469). Reproduced is the rule: the weights of the last `window` queries, summed over them,
one score per KV head, pooled over neighbouring tokens; the best `budget - window` earlier tokens and the window stay.
Nothing is dropped while decoding. Reference implementations keep one set per query head by repeating keys first, which
stores every KV head several times; here sets are per KV head, and query heads are reduced before pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elision.errors import OptionError
from elision.kv.actions import Evict
from elision.kv.budgets import Even, at_least
from elision.kv.method import EvictingMethod, KVHost
from elision.kv.parts import Call, Rule, prompt_end
from elision.kv.scorers import Reduce, Window, pool, reduce_group
from elision.kv.slicing import per_row, slot_order
from elision.kv.store import LayerStore
from elision.method import Paper, option, register


@dataclass(frozen=True)
class WindowSum(Window):
    """Weights of the last queries, summed over them, reduced to KV heads, pooled over tokens before the window."""

    reduce: Reduce = "mean"
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """[B, G, n]; the window itself is infinite."""
        state, n = call.store.state, store.dense.n
        rows = per_row(state["window"].shape[2], call.q)
        if state["window_valid"] is not None:
            rows = state["window_valid"].sum(1)  # a turn may be shorter than the window in some rows
        score = reduce_group(self.weights(call).sum(3), self.reduce)
        order = slot_order(store)
        score = score if order is None else score.gather(-1, order)  # neighbours in the text may lie anywhere by now
        window = torch.arange(n, device=score.device) >= (n - rows)[:, None, None]
        score = pool(score.masked_fill(window, 0.0), self.kernel, self.pooling).masked_fill(window, torch.inf)
        return score if order is None else torch.empty_like(score).scatter_(-1, order, score)


@register
@dataclass(frozen=True)
class SnapKV(EvictingMethod):
    """Keep what the prompt's last queries attend to."""

    name: ClassVar[str] = "snapkv"
    description: ClassVar[str] = "keeps what the last queries of the prompt attend to, pooled; once, after the prompt"
    paper: ClassVar[Paper] = Paper(
        "SnapKV: LLM Knows What You are Looking for Before Generation",
        "NeurIPS 2024",
        "https://arxiv.org/abs/2404.14469",
    )
    control: ClassVar[bool] = True

    window: int = option(32, "last queries of the prompt that observe it; their tokens always stay", ge=1)
    kernel: int = option(5, "tokens that scores are pooled over; 1 turns pooling off", ge=1)
    pooling: str = option("avg", "kind of pooling", choices=("avg", "max"))
    reduce: str = option("mean", "how the query heads of a KV head count", choices=("mean", "sum", "max"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.budget) is int and self.budget < self.window:
            raise OptionError(
                f"{self.name}: budget={self.budget} tokens is smaller than window={self.window}, which always stays: "
                "raise the budget or shrink the window"
            )

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One: evict when the prompt is through."""
        scorer = WindowSum(self.window, self.reduce, self.kernel, self.pooling)  # type: ignore[arg-type]
        return [
            Rule(prompt_end, scorer, Even(at_least(self.tokens, self.window)), Evict(recent=self.window, order="time"))
        ]
