"""Window: only the newest tokens, the control that every selection has to beat.

Each layer holds its newest `budget` tokens (per row of the batch) at every step. Keys stay rotated at their true
positions; rolling them to 0 ... n - 1 would change nothing, since rotary attention knows differences only. A forward
still sees what is held before it, so the token that leaves is read once more in its last step, as in every method here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from elision.kv.actions import Evict
from elision.kv.budgets import Even, over
from elision.kv.method import EvictingMethod, KVHost
from elision.kv.parts import Rule
from elision.kv.scorers import Newest
from elision.method import register


@register
@dataclass(frozen=True)
class Window(EvictingMethod):
    """Keep the newest tokens."""

    name: ClassVar[str] = "window"
    description: ClassVar[str] = "keeps only the newest tokens"
    control: ClassVar[bool] = True

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One: drop the oldest."""
        budget = Even(self.tokens)
        return [Rule(over(budget), Newest(), budget, Evict())]
