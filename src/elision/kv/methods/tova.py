"""TOVA: at every step the token that the newest query attends to least is dropped.

"Transformers are Multi-State RNNs", EMNLP 2024, https://arxiv.org/abs/2401.06104.

Reproduced is the released rule: once more than `budget` tokens are held, after the prompt and after every step, the
`budget` tokens with the highest softmax weight of the last query stay; weights are averaged over all heads of the
layer, so all heads hold the same tokens; nothing is protected, not even the newest token. `heads="group"` averages over
the query heads of each KV head instead, so that KV heads hold sets of their own (an option of this library), and
`recent` protects the newest tokens. Keys stay at their true positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from elision.kv.actions import Evict
from elision.kv.budgets import Even, at_least, over
from elision.kv.method import EvictingMethod, KVHost
from elision.kv.parts import Rule
from elision.kv.scorers import LastRow
from elision.method import Paper, option, register


@register
@dataclass(frozen=True)
class TOVA(EvictingMethod):
    """Drop what the newest query attends to least."""

    name: ClassVar[str] = "tova"
    description: ClassVar[str] = "drops the token that the newest query attends to least, at every step"
    paper: ClassVar[Paper] = Paper(
        "Transformers are Multi-State RNNs", "EMNLP 2024", "https://arxiv.org/abs/2401.06104"
    )
    control: ClassVar[bool] = True

    heads: str = option(
        "all", "whose weights count: those of all heads together, or of each KV head", choices=("all", "group")
    )
    recent: int = option(
        0, "newest tokens that always stay; they count towards the budget, which is at least this", ge=0
    )

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One: drop the lowest weights of the last row."""
        budget = Even(at_least(self.tokens, self.recent))
        scorer = LastRow("all" if self.heads == "all" else "mean")
        return [Rule(over(budget), scorer, budget, Evict(recent=self.recent))]
