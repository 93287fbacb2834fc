"""H2O: heavy hitters and the newest tokens, per head, at every step.

"H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", NeurIPS 2023,
https://arxiv.org/abs/2306.14048.

Reproduced is the released real-drop code: every query row that ever attends adds its softmax weights to the score of
the tokens it sees, without decay; a forward sees everything that is held and then, per layer, row and KV head, all but
the `heavy` highest scores and the newest `recent` tokens leave for good, the victim being read once more in its last
step. The parts of a prompt that comes in chunks are one forward in this sense: nothing leaves before the last.
Differences: the released class sums over the batch and knows no grouped queries; here rows are apart and the query
heads of a KV head count by `reduce` (mean and sum rank alike; "first" is the port in Meta's cookbook). Scores are
float32. A share is of the prompt and at least one token (the code's int(ratio · S) may be none); every later turn of a
chat sets it anew, as a share of all tokens seen by then (the code knows single prompts only). The global-statistics
mask of the released lm-eval script sees the future and is not a cache, and its mask simulator is off by one token per
step.

Positions: `rolling=False` keeps keys rotated at their true positions (default). `rolling=True` keeps them unrotated and
turns them to the index of their slot at every step, for streams longer than the model's context. `room=True` also makes
space before a new turn of m tokens, as the port's streaming driver does: the best `heavy` of all but the newest
`recent - m` tokens stay, the new ones attend to those, and the cache ends the turn at exactly its budget. In a padded
batch m is the longest row's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from elision.errors import OptionError
from elision.kv.actions import Evict
from elision.kv.budgets import Even, exceeds
from elision.kv.method import EvictingMethod, KVHost, check_budget, tokens_of
from elision.kv.parts import Call, Keep, Rule
from elision.kv.scorers import ColumnSums
from elision.kv.store import LayerStore
from elision.method import Paper, option, register


@register
@dataclass(frozen=True)
class H2O(EvictingMethod):
    """Keep the tokens that received most attention so far, and the newest."""

    name: ClassVar[str] = "h2o"
    description: ClassVar[str] = "keeps heavy hitters by accumulated attention and the newest tokens, at every step"
    paper: ClassVar[Paper] = Paper(
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        "NeurIPS 2023",
        "https://arxiv.org/abs/2306.14048",
    )
    wants_lse: ClassVar[bool] = True

    budget: int | float | str = option(
        0.2, "heavy and recent tokens together, half each: tokens, a share of the prompt, or bytes ('64MiB')"
    )
    heavy: int | float | None = option(
        None, "heavy hitters instead of half the budget: tokens, or a share of the prompt"
    )
    recent: int | float | None = option(
        None, "newest tokens instead of half the budget: tokens, or a share of the prompt"
    )
    reduce: str = option("mean", "how the query heads of a KV head count", choices=("mean", "sum", "first"))
    rolling: bool = option(False, "rotate keys to the index of their slot instead of their true position")
    room: bool = option(False, "make room before a new turn, so that it never overflows the budget (streaming)")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heavy", "recent"):
            value = getattr(self, name)
            if value is not None and value != 0:
                check_budget(self.name, name, value)
        if (self.heavy is None) != (self.recent is None):
            raise OptionError(f"{self.name}: heavy={self.heavy!r} and recent={self.recent!r} go together: give both")
        if self.heavy == 0 and self.recent == 0:
            raise OptionError(f"{self.name}: heavy and recent are both 0, so nothing would be held")

    def raw(self) -> bool:
        """Unrotated keys are what rolling positions need."""
        return self.rolling

    def before(self, store: LayerStore, m: int) -> None:
        """Make room for a turn of m tokens."""
        if not self.room or "score" not in store.dense:
            return
        heavy, recent = store.state["heavy"], store.state["recent"]
        if isinstance(heavy, Tensor) or isinstance(recent, Tensor):
            raise OptionError(f"{self.name}: room=True needs one budget for all rows: give heavy and recent in tokens")
        if recent <= m:
            raise OptionError(
                f"{self.name}: a turn of {m} tokens does not fit into recent={recent}: give more recent tokens, or "
                "room=False"
            )
        if store.dense.n + m > heavy + recent:
            Evict(recent - m, order="time")(store, store.dense["score"], heavy + recent - m)

    def sizes(self, call: Call) -> tuple[Keep, Keep]:
        """Heavy and recent tokens at this call."""
        if self.heavy is None or self.recent is None:
            whole = self.tokens(call)
            return whole - whole // 2, whole // 2
        return tuple(tokens_of(x, call) if x else 0 for x in (self.heavy, self.recent))  # type: ignore[return-value]

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One: evict whenever more is held than heavy and recent together, but not between the parts of a prompt."""

        def total(call: Call) -> Keep:
            heavy, recent = self.sizes(call)
            call.store.state["heavy"], call.store.state["recent"] = heavy, recent
            return heavy + recent

        budget = Even(total)

        def over(call: Call) -> bool:
            return call.phase != "prompt_chunk" and exceeds(call.store.dense.n, budget.of(call))

        return [Rule(over, ColumnSums(self.reduce), budget, _Newest(self.rolling))]  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Newest:
    """Evict all but the best and the newest, whose number was set with the budget."""

    rolling: bool

    def __call__(self, store: LayerStore, score: Tensor, keep: Keep) -> None:
        Evict(store.state["recent"], order="time" if self.rolling else "any")(store, score, keep)
