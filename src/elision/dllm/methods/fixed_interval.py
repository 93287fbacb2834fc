"""The baseline of both papers' idea: everything is computed every N calls, and in between only what is being decided.

Between two refreshes a call computes the positions that may be decided now (the current block, or the sliding window)
and those that the call before decided; everything else is read as the last refresh left it. Same rows as Elastic-Cache
without its tracked tokens, and its whole refresh by the clock instead of by drift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from elision.dllm.decode import Step
from elision.dllm.model import MaskedLM
from elision.dllm.policy import DllmMethod, Policy
from elision.method import option, register


@register
@dataclass(frozen=True)
class FixedInterval(DllmMethod):
    """Refreshes everything every `interval` calls."""

    name: ClassVar[str] = "fixed_interval"
    description: ClassVar[str] = "baseline: everything every N calls, in between only what is being decided"
    control: ClassVar[bool] = True

    interval: int = option(8, "a call that computes everything every so many calls", ge=1)
    window: int | None = option(
        None, "decode in a sliding window of the left-most masks; None leaves it to generate", ge=1
    )
    threshold: float | None = option(
        None, "commit every token of at least this probability; None leaves it to generate", ge=0
    )

    def decoding(self, asked: Mapping[str, Any], lm: MaskedLM) -> dict[str, Any]:
        """Window and threshold, where they are options of the method."""
        mine = {"window": self.window, "threshold": self.threshold}
        return self._prescribe(asked, **{name: value for name, value in mine.items() if value is not None})

    def policy(self, lm: MaskedLM) -> Policy:
        """Fresh state for one generation."""
        return _Clock(self.interval, lm.shift)


class _Clock(Policy):
    def __init__(self, interval: int, shift: bool) -> None:
        self.interval, self.shift = interval, shift

    def rows(self, step: Step) -> Tensor | None:
        if step.n % self.interval == 0:
            return None
        wanted = step.eligible | step.committed
        return wanted | wanted.roll(-1, dims=1) if self.shift else wanted  # the row before predicts it
