"""StreamingLLM: the first tokens of a stream as attention sinks, and the newest ones.

"Efficient Streaming Language Models with Attention Sinks", ICLR 2024, https://arxiv.org/abs/2309.17453.

Reproduced is the rule and the positions: each layer holds the `sinks` oldest and the newest `budget - sinks` tokens of
each row; keys are kept unrotated and turned to their index among the tokens held (`rolling=True`, default), so streams
may be longer than the model's context. `rolling=False` leaves keys at their true positions. `room=True` makes space
before a new turn of m tokens, as the released driver does for each prompt: sinks and the newest `budget - sinks - m`
tokens stay, so that the turn ends within the budget; a turn that is longer than that sees the sinks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from elision.errors import OptionError
from elision.kv.actions import Evict
from elision.kv.budgets import Even, at_least, over
from elision.kv.method import EvictingMethod, KVHost
from elision.kv.parts import Rule
from elision.kv.scorers import Newest, newest
from elision.kv.store import LayerStore
from elision.method import Paper, option, register


@register
@dataclass(frozen=True)
class StreamingLLM(EvictingMethod):
    """Keep attention sinks and the newest tokens."""

    name: ClassVar[str] = "streaming_llm"
    description: ClassVar[str] = "keeps the first tokens (attention sinks) and the newest, with rolling positions"
    paper: ClassVar[Paper] = Paper(
        "Efficient Streaming Language Models with Attention Sinks", "ICLR 2024", "https://arxiv.org/abs/2309.17453"
    )
    control: ClassVar[bool] = True

    sinks: int = option(4, "oldest tokens that always stay; they count towards the budget", ge=0)
    rolling: bool = option(True, "rotate keys to their index among the tokens held instead of their true position")
    room: bool = option(False, "make room before a new turn, so that it ends within the budget")

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.budget) is int and self.budget <= self.sinks:
            raise OptionError(
                f"{self.name}: budget={self.budget} tokens leaves no room beside sinks={self.sinks}: raise the budget "
                "or keep fewer sinks"
            )

    def raw(self) -> bool:
        """Unrotated keys are what rolling positions need."""
        return self.rolling

    def before(self, store: LayerStore, m: int) -> None:
        """Make room for a turn of m tokens."""
        keep = store.state.get("budget")
        if self.room and keep is not None:
            left = keep - m
            left = left.clamp(min=self.sinks) if isinstance(left, Tensor) else max(left, self.sinks)
            Evict(first=self.sinks)(store, newest(store), left)

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One: drop the oldest token that is no sink."""
        budget = Even(at_least(self.tokens, self.sinks + 1))
        return [Rule(over(budget), Newest(), budget, Evict(first=self.sinks))]
