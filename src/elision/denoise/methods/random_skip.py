"""Random skipping: the residual of the denoiser stands in at steps drawn without any information. Negative control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.denoise.policy import Claims, DenoiseMethod, Group, Host, Plan
from elision.denoise.predictors import Residual, Reuse
from elision.denoise.schedules import Random
from elision.method import option, register
from elision.profile import Profile


@register
@dataclass(frozen=True)
class RandomSkip(DenoiseMethod):
    """Skip each step with probability `rate`."""

    name: ClassVar[str] = "random_skip"
    description: ClassVar[str] = "control: skip steps at random, reuse the residual"
    control: ClassVar[bool] = True

    rate: float = option(0.5, "probability of skipping a step", ge=0, le=1)
    warmup_steps: int = option(1, "steps that are always computed at the start", ge=1)
    tail_steps: int = option(0, "steps that are always computed at the end", ge=0)
    seed: int = option(0, "seed of the draw; every run repeats it", ge=0)

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """One draw per step at the denoiser itself."""
        sites = host.site("model", self.name)
        group = Group(
            self.name,
            sites,
            lambda: Random(self.rate, self.warmup_steps, self.tail_steps, self.seed),
            lambda: Residual(Reuse()),
        )
        return Plan([group], Claims(frozenset(sites), needs_total=self.tail_steps > 0))
