"""A stale cache: after the warm-up the very first output is reused for ever. Negative control.

A comparison in which this does not lose badly measures nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.denoise.policy import Claims, DenoiseMethod, Group, Host, Plan
from elision.denoise.predictors import Residual, Reuse
from elision.denoise.schedules import Interval
from elision.method import option, register
from elision.profile import Profile


@register
@dataclass(frozen=True)
class Stale(DenoiseMethod):
    """Compute on a schedule like `uniform`, but always stand in with the first step's residual."""

    name: ClassVar[str] = "stale"
    description: ClassVar[str] = "control: compute like uniform, but reuse the first step's residual for ever"
    control: ClassVar[bool] = True

    interval: int = option(3, "steps from one computed step to the next; 1 computes all", ge=1)
    warmup_steps: int = option(1, "steps that are always computed at the start", ge=1)

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """One interval at the denoiser itself, with a predictor that never renews."""
        sites = host.site("model", self.name)
        group = Group(
            self.name,
            sites,
            lambda: Interval(self.interval, self.warmup_steps),
            lambda: Residual(Reuse(first=True)),
        )
        return Plan([group], Claims(frozenset(sites)))
