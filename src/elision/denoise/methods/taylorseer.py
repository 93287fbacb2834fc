"""TaylorSeer: forecast every sub-block's output from finite differences instead of reusing it.

Paper: "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", ICCV 2025,
https://arxiv.org/abs/2503.06923; the released code is Shenyi-Z/TaylorSeer.

At the sites (attention and MLP outputs of every block, before their gates) a computed step s renews the factors
Y[0] = F, Y[i+1] = (Y[i] - Yold[i]) / d, with d the real gap to the computed step before, and a later step n contributes
`sum_i Y[i] (n - s)^i / i!` under a fresh gate. Steps are computed during the warm-up (`first_enhance`) and every
`interval` steps after it; modulation, norms, embedding and head always run.

Where paper and code differ the code is the default: the divisor is the real gap (the paper's N mixes spacings at the
end of the warm-up), and no last step is forced. Differences start at step `first_enhance - 1`. Options beyond both:
`basis="newton"` keeps true divided differences (exact for polynomials on any spacing), `site="stack"` keeps one
forecast of the whole block stack's residual and `site="head"` one of the output projection (diffusers' lite mode):
far less memory, but gates are then part of the forecast. `schedule="diffusers"` is the rule of diffusers'
`TaylorSeerCacheConfig`: computed when `s < first_enhance` or `(s - first_enhance - 1) % interval == 0` or
`s >= compute_after`, differences from the second computed step on; where diffusers raises because it is asked for a
forecast before anything was computed (`first_enhance=0`), the step is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from elision.denoise.policy import STAND_IN, Claims, Decision, DenoiseMethod, Group, Host, Plan, Predictor, Schedule
from elision.denoise.predictors import Residual, Taylor
from elision.denoise.schedules import INTERVAL, TAIL, WARMUP, Interval
from elision.denoise.sites import Call, Level, Site
from elision.denoise.steps import Step
from elision.errors import OptionError
from elision.method import Paper, option, register
from elision.profile import Profile

DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _DiffusersInterval(Schedule):
    """The step rule of diffusers' hook."""

    def __init__(self, interval: int, before: int, after: int | None) -> None:
        self.interval = interval
        self.before = before
        self.after = after

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Warm-up, on the grid, or behind `after`."""
        if step.n < self.before:
            return WARMUP
        if self.after is not None and step.n >= self.after:
            return TAIL
        return INTERVAL if (step.n - self.before - 1) % self.interval == 0 else STAND_IN


@register
@dataclass(frozen=True)
class TaylorSeer(DenoiseMethod):
    """Compute every `interval`-th step and forecast the sub-block outputs of the others by a Taylor expansion."""

    name: ClassVar[str] = "taylorseer"
    description: ClassVar[str] = "forecast sub-block outputs by a finite-difference Taylor expansion"
    paper: ClassVar[Paper] = Paper(
        "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers",
        "ICCV 2025",
        "https://arxiv.org/abs/2503.06923",
    )
    levels: ClassVar[tuple[Level, ...]] = ("branch", "stack", "head")

    interval: int = option(5, "steps from one computed step to the next (N); 1 computes all", ge=1)
    max_order: int = option(1, "highest order of the expansion (m); 0 is plain reuse", ge=0)
    first_enhance: int = option(3, "warm-up steps that are always computed (f)", ge=0)
    basis: Literal["taylor", "newton"] = option("taylor", "weights of the factors", choices=("taylor", "newton"))
    site: Literal["branch", "stack", "head"] = option("branch", "what is forecast", choices=("branch", "stack", "head"))
    schedule: Literal["official", "diffusers"] = option(
        "official", "which step rule", choices=("official", "diffusers")
    )
    compute_after: int | None = option(None, "diffusers' schedule: compute every step from this one on", ge=0)
    factors_dtype: str | None = option(
        None, "type the factors are stored in; None keeps that of the outputs", choices=tuple(DTYPES)
    )

    def __post_init__(self) -> None:
        """Rules between options."""
        super().__post_init__()
        if self.compute_after is not None and self.schedule != "diffusers":
            raise OptionError("taylorseer: compute_after belongs to schedule='diffusers'; set that or leave it out")
        if self.first_enhance < 1 and self.schedule == "official":
            raise OptionError("taylorseer: first_enhance=0 leaves nothing to forecast from; it must be at least 1")

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """One schedule for all sites, one expansion per site, branch and stream."""
        sites = host.site(self.site, self.name)
        group = Group(self.name, sites, self._schedule, self._predictor)
        return Plan([group], Claims(frozenset(sites), tolerates_gaps=True))

    def _schedule(self) -> Schedule:
        if self.schedule == "diffusers":
            return _DiffusersInterval(self.interval, self.first_enhance, self.compute_after)
        return Interval(self.interval, self.first_enhance)

    def _predictor(self) -> Predictor:
        first = 0 if self.schedule == "diffusers" else self.first_enhance - 1
        taylor = Taylor(self.max_order, first, self.basis, DTYPES[self.factors_dtype])
        return Residual(taylor) if self.site == "stack" else taylor
