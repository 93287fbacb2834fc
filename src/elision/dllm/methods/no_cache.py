"""The baseline: every call computes every row. It warns of nothing, since eliding nothing is what it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.dllm.model import MaskedLM
from elision.dllm.policy import DllmMethod, Nothing, Policy
from elision.method import register


@register
@dataclass(frozen=True)
class NoCache(DllmMethod):
    """Computes everything at every call."""

    name: ClassVar[str] = "no_cache"
    description: ClassVar[str] = "baseline: every call computes every row"
    control: ClassVar[bool] = True
    elides: ClassVar[bool] = False

    def policy(self, lm: MaskedLM) -> Policy:
        """Nothing is kept."""
        return Nothing()
