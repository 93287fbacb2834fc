"""The control for every cache: no cache, but fewer calls, each of which commits more tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from elision.dllm.decode import Decoding
from elision.dllm.model import MaskedLM
from elision.dllm.policy import DllmMethod, Nothing, Policy
from elision.errors import OptionError
from elision.method import option, register


@register
@dataclass(frozen=True)
class FewerSteps(DllmMethod):
    """Divides the number of scheduled calls."""

    name: ClassVar[str] = "fewer_steps"
    description: ClassVar[str] = "control: no cache, 1/factor of the calls"
    control: ClassVar[bool] = True

    factor: float = option(2.0, "how many times fewer calls; rounded to a number that the blocks can share", ge=1)

    def decoding(self, asked: Mapping[str, Any], lm: MaskedLM) -> dict[str, Any]:
        """The scheduled calls divided by `factor`, at least one per block."""
        settings = Decoding.of(**asked)
        if settings.threshold is not None:
            raise OptionError("fewer_steps divides scheduled calls; a threshold has none: lower the threshold instead")
        per_block = max(1, round(settings.calls / settings.blocks / self.factor))
        return {**asked, "steps": per_block * settings.blocks}

    def policy(self, lm: MaskedLM) -> Policy:
        """Nothing is kept."""
        return Nothing()
