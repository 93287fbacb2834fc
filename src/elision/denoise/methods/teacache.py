"""TeaCache: reuse the block stack's residual while the modulated input of the first block has barely moved.

Baseline. "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", CVPR 2025,
https://arxiv.org/abs/2411.19108. With m_n the first block's input after its own norm and modulation,

    E += p(|m_n - m_{n-1}| / |m_{n-1}|)        and the stack is skipped while E < threshold

where p is a polynomial that turns input change into output change; the first and the last step are computed and E
starts anew at every computed step. Each guidance branch decides by itself, as in the released code.

p is fitted per model (`elision.fit(pipe, "teacache", calls=...)`: a least-squares polynomial between the relative
changes of m and of the prediction, both measured step to step in uncached runs), or one of the published
`coefficients`. Without either p(x) = x, and thresholds then mean input change. With `order` above 0 (no paper)
TaylorSeer's expansion of the residual over the computed steps stands in for the last residual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from elision.denoise.policy import Claims, DenoiseMethod, Group, Host, Plan
from elision.denoise.predictors import Residual, Reuse, Taylor
from elision.denoise.schedules import Criterion, PerBranch, mean_abs
from elision.denoise.sites import Call, Level, Site
from elision.denoise.steps import Step
from elision.errors import OptionError, UnsupportedTarget
from elision.method import Paper, option, register
from elision.profile import Profile, fingerprint

PRESETS: dict[str, tuple[float, ...]] = {
    "flux": (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    "hunyuan-video": (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
    "ltx": (2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03),
    "lumina2": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "mochi": (-3.51241319e03, 8.11675948e02, -6.09400215e01, 2.42429681e00, 3.05291719e-03),
}


class _ModulatedChange(Criterion):
    """The accumulated, rescaled change of the first block's modulated input."""

    shared: ClassVar[bool] = False  # every branch has its own

    def __init__(self, threshold: float, warmup: int, tail: int, coefficients: Sequence[float], host: Host) -> None:
        super().__init__(threshold, warmup, tail)
        self._rescale = np.poly1d(coefficients)
        self._host = host
        self._last: Tensor | None = None

    def decide(self, step, site, call):  # type: ignore[no-untyped-def]
        """Form the indicator once, then decide as every criterion does."""
        self._now = indicator(self._host, call)
        return super().decide(step, site, call)

    def estimate(self, step: Step, site: Site, call: Call) -> float | None:
        """p of the relative change since the step before."""
        if self._last is None:
            return None
        return float(self._rescale(float(mean_abs(self._now - self._last) / mean_abs(self._last))))

    def seen(self, step: Step, call: Call) -> None:
        """Remember the indicator of this step, skipped or not."""
        self._last = self._now

    def tensors(self) -> tuple[Tensor, ...]:
        """The last indicator."""
        return () if self._last is None else (self._last,)


def indicator(host: Host, call: Call) -> Tensor:
    """The first block's input after its own norm and modulation."""
    assert host.adapter.modulated is not None
    with torch.no_grad():
        return host.adapter.modulated(call.module, call)


@register
@dataclass(frozen=True)
class TeaCache(DenoiseMethod):
    """Reuse the block stack's residual while the first block's modulated input has barely moved."""

    name: ClassVar[str] = "teacache"
    description: ClassVar[str] = "baseline: skip the blocks while the first modulated input barely moves (TeaCache)"
    paper: ClassVar[Paper] = Paper(
        "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
        "CVPR 2025",
        "https://arxiv.org/abs/2411.19108",
    )
    control: ClassVar[bool] = True
    levels: ClassVar[tuple[Level, ...]] = ("stack",)

    threshold: float = option(0.1, "accumulated, rescaled change at which a step is computed again", ge=0)
    coefficients: str | tuple[float, ...] | None = option(
        None, "polynomial, highest power first, or the name of a published one; None takes the profile's"
    )
    warmup_steps: int = option(1, "steps that are always computed at the start", ge=1)
    tail_steps: int = option(1, "steps that are always computed at the end", ge=0)
    order: int = option(0, "order of TaylorSeer's expansion of the residual that stands in; 0 reuses it", ge=0)
    degree: int = option(4, "degree of the polynomial that `fit` looks for", ge=1, le=8)

    def __post_init__(self) -> None:
        """A preset must exist, and a polynomial must be finite numbers."""
        super().__post_init__()
        given = self.coefficients
        if isinstance(given, str) and given not in PRESETS:
            raise OptionError(f"teacache: coefficients={given!r} is no preset; presets: {', '.join(PRESETS)}")
        if given is None or isinstance(given, str):
            return
        numbers = isinstance(given, (tuple, list)) and all(isinstance(c, (int, float)) for c in given)
        if not (numbers and given and all(math.isfinite(c) for c in given)):
            raise OptionError(f"teacache: coefficients={given!r} are not one or more finite numbers")

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """One criterion per guidance branch, at the block stack."""
        sites = host.site("stack", self.name)
        if host.adapter.modulated is None:
            raise UnsupportedTarget(
                f"teacache needs the modulated input of the first block, and {host.adapter.model_class} has none: "
                f"{host.adapter.lacks.get('modulated', 'unknown')}"
            )
        chosen: Sequence[float] = (1.0, 0.0)
        if isinstance(self.coefficients, str):
            chosen = PRESETS[self.coefficients]
        elif self.coefficients is not None:
            chosen = self.coefficients
        elif profile is not None:
            chosen = profile.tensors["coefficients"].tolist()
        group = Group(
            self.name,
            sites,
            lambda: PerBranch(
                lambda: _ModulatedChange(self.threshold, self.warmup_steps, self.tail_steps, chosen, host)
            ),
            lambda: Residual(Taylor(self.order) if self.order else Reuse()),
        )
        return Plan([group], Claims(frozenset(sites), needs_total=self.tail_steps > 0))

    def fit(self, target: Any, calls: Sequence[Any], **settings: Any) -> Profile:
        """Fit the polynomial on uncached runs of `calls`."""
        from elision.denoise.fit._record import record  # the recorder imports the engine

        last: dict[str, tuple[int, Tensor, Tensor]] = {}
        pairs: list[tuple[float, float]] = []
        seen_steps = [0]

        def seen(host: Host, step: Step, site: Site, call: Call, out: Tensor) -> None:
            now, before = indicator(host, call), last.get(step.branch)
            if before is not None and before[0] == step.n - 1:
                moved = float(mean_abs(now - before[1]) / mean_abs(before[1]))
                changed = float(mean_abs(out - before[2]) / mean_abs(before[2]))
                pairs.append((moved, changed))
            last[step.branch] = (step.n, now, out.detach().clone())
            seen_steps[0] = max(seen_steps[0], step.n + 1)

        found = record(target, "head", calls, seen, **settings)
        if len(pairs) <= self.degree:
            raise OptionError(
                f"teacache: {len(pairs)} step pairs cannot fix a polynomial of degree {self.degree}: give more calls"
            )
        x, y = np.asarray(pairs).T
        coefficients = torch.from_numpy(np.polyfit(x, y, self.degree))
        made_for = fingerprint(self.name, found.denoisers[0], found.scheduler, None)
        return Profile(
            made_for,
            {"coefficients": coefficients, "pairs": torch.from_numpy(np.asarray(pairs))},
            {"steps_seen": seen_steps[0]},
        )
