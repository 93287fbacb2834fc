"""Uniform reuse: compute every N-th step and reuse in between (FORA's rule), at a site of your choice.

Baseline. FORA ("Fast-Forward Caching in Diffusion Transformer Acceleration", https://arxiv.org/abs/2407.01425) reuses
attention and MLP outputs of every block for N - 1 steps: `site="branch"`. Elsewhere the residual is reused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from elision.denoise.policy import Claims, DenoiseMethod, Group, Host, Plan, Predictor
from elision.denoise.predictors import Residual, Reuse
from elision.denoise.schedules import Interval
from elision.denoise.sites import Level
from elision.method import Paper, option, register
from elision.profile import Profile


@register
@dataclass(frozen=True)
class Uniform(DenoiseMethod):
    """Compute every `interval`-th step, reuse in between."""

    name: ClassVar[str] = "uniform"
    description: ClassVar[str] = "baseline: compute every n-th step, reuse in between (FORA)"
    paper: ClassVar[Paper] = Paper(
        "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration",
        "arXiv 2024",
        "https://arxiv.org/abs/2407.01425",
    )
    control: ClassVar[bool] = True
    levels: ClassVar[tuple[Level, ...]] = ("model", "stack", "branch")

    interval: int = option(3, "steps from one computed step to the next; 1 computes all", ge=1)
    warmup_steps: int = option(1, "steps that are always computed at the start", ge=1)
    site: Literal["branch", "stack", "model"] = option("branch", "what is reused", choices=("branch", "stack", "model"))

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """One interval for all sites."""
        sites = host.site(self.site, self.name)
        group = Group(self.name, sites, lambda: Interval(self.interval, self.warmup_steps), self._predictor)
        return Plan([group], Claims(frozenset(sites), tolerates_gaps=True))

    def _predictor(self) -> Predictor:
        return Reuse() if self.site == "branch" else Residual(Reuse())
