"""Budgets: how many dense slots a layer may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from elision.kv.parts import Call, Keep


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


def exceeds(store_n: int, keep: Keep) -> bool:
    """Whether `store_n` slots are more than any row may hold."""
    return store_n > (keep if isinstance(keep, int) else int(keep.max()))
