"""EasyCache: skip the denoiser while its estimated output change, accumulated, stays below a threshold.

Paper: "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching", 2025,
https://arxiv.org/abs/2507.02860; the released code is H-EmbodVis/EasyCache.

With x_n the latent given to the network at step n, v_n its output, f the last computed step and f' the one before:

    D   = v_f - x_f                                  what is kept, one latent per guidance branch
    k   = |v_f - v_f'| / |x_f - x_f'|                transformation rate, renewed at every computed step
    E  += k |x_n - x_{n-1}| / |v_f|                  and the step is skipped while E < threshold
    v_n = x_n + D                                    on a skipped step

|.| is the mean of absolute values. The conditional branch owns k, E and the history; the other branches obey. Condition
channels behind the latent ones (image-to-video) belong neither to the statistics nor to D.

What differs from the released code: statistics are float32 at least; in a call that carries both guidance branches only
the conditional rows count; state is reset at every run (the released code keeps the tensors of the last video, and with
a warm-up of one step decides by them). ComfyUI's variant (`variant="comfyui"`) compares with the last computed latent
instead of the step before, so its sum grows faster, on latents subsampled by `subsample`, and its window is given in
fractions of the run. ComfyUI computes the window from the noise level, here it is counted in steps. With `order` above
0 (no paper) TaylorSeer's expansion of D over the computed steps stands in for the last D.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from elision.denoise.policy import Claims, DenoiseMethod, Group, Host, Plan
from elision.denoise.predictors import Residual, Reuse, Taylor
from elision.denoise.schedules import Criterion, mean_abs
from elision.denoise.sites import Call, Site, common
from elision.denoise.steps import Step
from elision.errors import OptionError
from elision.method import Paper, option, register
from elision.profile import Profile

Variant = Literal["official", "comfyui"]


class _EasyCacheCriterion(Criterion):
    """The accumulated estimate E and the statistics it is made of."""

    def __init__(self, threshold: float, warmup: int, tail: int, every_step: bool = True, subsample: int = 1) -> None:
        super().__init__(threshold, warmup, tail)
        self.every_step = every_step
        self.subsample = subsample
        self.k: Tensor | None = None
        self._x_prev: Tensor | None = None
        self._full: tuple[Tensor, Tensor] | None = None  # x and v of the last computed step
        self._norm: Tensor | None = None

    def _view(self, x: Tensor, step: Step) -> Tensor:
        """The part of a latent that statistics see: conditional rows, every `subsample`-th pixel."""
        rows = x if step.cond is None else x[step.cond]
        return rows[..., :: self.subsample, :: self.subsample] if self.subsample > 1 and x.ndim >= 4 else rows

    def _latent(self, call: Call, step: Step) -> Tensor:
        x = self._view(call.x, step).detach()
        return x if self._full is None else common(x, self._full[1])[0]

    def estimate(self, step: Step, site: Site, call: Call) -> float | None:
        """k |x - x_prev| / |v_f|; None before the second computed step."""
        if self.k is None or self._x_prev is None or self._norm is None:
            return None
        x = self._latent(call, step)
        return float(self.k * mean_abs(x - self._x_prev) / self._norm)

    def seen(self, step: Step, call: Call) -> None:
        """Remember the latent of this step, skipped or not."""
        if self.every_step:
            self._x_prev = self._keep(self._latent(call, step))

    def update(self, step: Step, site: Site, call: Call, out: Tensor, computed: bool) -> None:
        """Renew k, and with it the last computed latent and output."""
        super().update(step, site, call, out, computed)
        if not (computed and step.leads):
            return
        x, v = common(self._view(call.x, step).detach(), self._view(out, step).detach())
        if self._full is not None:
            moved, changed = mean_abs(x - self._full[0]), mean_abs(v - self._full[1])
            self.k = changed / moved
        rows = out if step.cond is None else out[step.cond]
        self._norm = mean_abs(common(call.x, rows.detach())[1])
        self._full = self._keep(x), self._keep(v)
        self._x_prev = self._full[0]

    @staticmethod
    def _keep(x: Tensor) -> Tensor:
        """A latent that nobody else writes into."""
        return x.clone()

    def tensors(self) -> Iterable[Tensor]:
        """The latents that are kept for the statistics."""
        return tuple(t for t in (self._x_prev, *(self._full or ())) if t is not None)


@register
@dataclass(frozen=True)
class EasyCache(DenoiseMethod):
    """Skip the denoiser while the estimated change of its output, accumulated, stays below `threshold`."""

    name: ClassVar[str] = "easycache"
    description: ClassVar[str] = "skip the denoiser while the accumulated estimate of its change is small"
    paper: ClassVar[Paper] = Paper(
        "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching",
        "arXiv 2025",
        "https://arxiv.org/abs/2507.02860",
    )

    threshold: float = option(0.05, "accumulated relative change at which a step is computed again", ge=0)
    warmup_steps: int = option(10, "steps that are always computed at the start (the papers' R)", ge=0)
    tail_steps: int = option(1, "steps that are always computed at the end", ge=0)
    order: int = option(0, "order of TaylorSeer's expansion of the residual that stands in; 0 reuses it", ge=0)
    variant: Variant = option("official", "which criterion", choices=("official", "comfyui"))
    subsample: int = option(8, "comfyui: statistics see every n-th pixel of rows and columns", ge=1)
    start: float = option(0.15, "comfyui: fraction of the run from which steps may be skipped", ge=0, le=1)
    end: float = option(0.95, "comfyui: fraction of the run from which no step is skipped", ge=0, le=1)

    def __post_init__(self) -> None:
        """The window must not be empty."""
        super().__post_init__()
        if self.start >= self.end:
            raise OptionError(f"easycache: start={self.start:g} must be below end={self.end:g}, or no step is skipped")
        foreign = ("subsample", "start", "end") if self.variant == "official" else ("warmup_steps", "tail_steps")
        for name in foreign:
            if getattr(self, name) != self.options()[name].default:
                raise OptionError(f"easycache: {name} has no meaning for variant={self.variant!r}; leave it out")

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """One decision per step at the denoiser itself; the residual stands in."""
        sites = host.site("model", self.name)
        group = Group(self.name, sites, self._schedule, lambda: Residual(Taylor(self.order) if self.order else Reuse()))
        return Plan([group], Claims(frozenset(sites), needs_total=self.variant == "comfyui" or self.tail_steps > 0))

    def _schedule(self) -> Criterion:
        if self.variant == "official":
            return _EasyCacheCriterion(self.threshold, self.warmup_steps, self.tail_steps)
        return _ComfyCriterion(self.threshold, self.start, self.end, self.subsample)


class _ComfyCriterion(_EasyCacheCriterion):
    """The criterion with a window in fractions of the run."""

    def __init__(self, threshold: float, start: float, end: float, subsample: int) -> None:
        super().__init__(threshold, 0, 0, every_step=False, subsample=subsample)
        self._window = start, end

    def decide(self, step, site, call):  # type: ignore[no-untyped-def]
        """Turn the window into steps once the total is known."""
        total = step.total or 0
        self.warmup = math.ceil(self._window[0] * total)
        self.tail = total - math.ceil(self._window[1] * total)
        return super().decide(step, site, call)

    def update(self, step: Step, site: Site, call: Call, out: Tensor, computed: bool) -> None:
        """Outside the window nothing is remembered, so its first two steps are computed."""
        if step.total is None or self.warmup <= step.n < step.total - self.tail:
            super().update(step, site, call, out, computed)
