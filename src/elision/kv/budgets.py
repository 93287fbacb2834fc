"""Budgets: how many dense slots a layer may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from elision.kv.parts import Call, Keep, Trigger


@dataclass(frozen=True)
class Even:
    """The same for every layer: `tokens(call)`, set at the end of each prompt and kept while decoding.

    With `growing` it is asked anew at every call.
    """

    tokens: Callable[[Call], Keep]
    growing: bool = False

    def of(self, call: Call) -> Keep:
        """What this layer may hold now."""
        state = call.store.state
        if self.growing:
            return self.tokens(call)
        if "budget" not in state or call.phase == "prompt_end":
            state["budget"] = self.tokens(call)
        keep: Keep = state["budget"]
        return keep

    def allot(self, call: Call) -> Mapping[int, Keep]:
        """This layer alone."""
        return {call.layer: self.of(call)}


def at_least(tokens: Callable[[Call], Keep], least: int) -> Callable[[Call], Keep]:
    """`tokens`, but never fewer than `least`, which are protected anyway."""

    def enough(call: Call) -> Keep:
        keep = tokens(call)
        return keep.clamp(min=least) if isinstance(keep, Tensor) else max(keep, least)

    return enough


def over(budget: Even) -> Trigger:
    """Due whenever a layer holds more than `budget` allows, but not between the parts of a prompt."""

    def due(call: Call) -> bool:
        if call.phase == "prompt_chunk":
            return False
        keep = budget.of(call)
        return isinstance(keep, Tensor) or call.store.dense.n > keep  # rows differ: the action knows what each holds

    return due


def exceeds(store_n: int, keep: Keep) -> bool:
    """Whether `store_n` slots are more than any row may hold."""
    return store_n > (keep if isinstance(keep, int) else int(keep.max()))
