"""First-block cache: run the first block; if its residual barely moved, reuse the residual of all the others.

Baseline. The idea is ParaAttention's FBCache; the rule here is diffusers' `FirstBlockCacheConfig`: with r the residual
of the first block's image tokens and r' the one of the last computed call of this guidance branch, the other blocks are
computed when `mean|r - r'| / mean|r'| > threshold`. No last step is forced; `warmup_steps` (0 there) and
`max_consecutive`, a limit of stand-ins in a row, are inferred from other ports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from elision.denoise.policy import Claims, Decision, DenoiseMethod, Group, Host, Plan, Schedule
from elision.denoise.predictors import Residual, Reuse
from elision.denoise.schedules import WARMUP, mean_abs
from elision.denoise.sites import Call, Level, Site
from elision.denoise.steps import Step
from elision.errors import UnsupportedTarget
from elision.method import Paper, option, register
from elision.profile import Profile


class _FirstBlockChange(Schedule):
    """The relative change of the first block's residual, per guidance branch."""

    scope: ClassVar[Literal["step", "branch", "site"]] = "branch"
    listens: ClassVar[bool] = True

    def __init__(self, threshold: float, warmup: int, most: int | None) -> None:
        self.threshold = threshold
        self.warmup = warmup
        self.most = most
        self._residual: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._row: dict[str, int] = {}
        self._changes: list[float] = []
        self._notes: list[str] = []

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Compare the residual with that of the last computed call."""
        assert call.entry is not None
        residual = (call.x - call.entry).detach()
        self._pending[step.branch] = residual
        last = self._residual.get(step.branch)
        if last is None or step.n < self.warmup or last.shape != residual.shape:
            return WARMUP
        change = float(mean_abs(residual - last) / mean_abs(last))
        if not math.isfinite(change):
            self._notes.append(f"step {step.n}: the first block's change is not finite, so the step was computed")
            return Decision(False, "not finite")
        self._changes.append(change)
        if self.most is not None and self._row.get(step.branch, 0) >= self.most:
            return Decision(False, "row is full")
        return (
            Decision(False, "change above threshold") if change > self.threshold else Decision(True, "below threshold")
        )

    def update(self, step: Step, site: Site, call: Call, out: Any, computed: bool) -> None:
        """Keep the residual of a computed call."""
        residual = self._pending.pop(step.branch)
        if computed:
            self._residual[step.branch] = residual
        self._row[step.branch] = 0 if computed else self._row.get(step.branch, 0) + 1

    def tensors(self) -> Iterable[Tensor]:
        """The kept residuals."""
        return self._residual.values()

    def numbers(self) -> str:
        """The smallest change."""
        smallest = f"the smallest change was {min(self._changes):.4g}" if self._changes else "no change was measured"
        return f"{smallest}, against threshold={self.threshold:g}"

    def notes(self) -> Iterable[str]:
        """Steps whose change was not finite."""
        return self._notes


@register
@dataclass(frozen=True)
class FirstBlock(DenoiseMethod):
    """Reuse the residual of all blocks but the first while the first one's residual barely moves."""

    name: ClassVar[str] = "first_block"
    description: ClassVar[str] = "baseline: skip all blocks but the first while its residual barely moves (FBCache)"
    paper: ClassVar[Paper] = Paper(
        "ParaAttention: first block cache", "software 2025", "https://github.com/chengzeyi/ParaAttention"
    )
    control: ClassVar[bool] = True
    levels: ClassVar[tuple[Level, ...]] = ("run",)

    threshold: float = option(0.05, "relative change of the first block's residual above which all is computed", ge=0)
    warmup_steps: int = option(0, "steps that are always computed at the start", ge=0)
    max_consecutive: int | None = option(None, "most stand-ins in a row; None for no limit (inferred)", ge=1)

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """One site over all blocks but the first, which shows its input as `call.entry`."""
        if not host.adapter.lists:
            host.site("stack", self.name)  # raises, naming the classes that have blocks
        paths = host.adapter.block_paths(host.model)
        if len(paths) < 2:
            raise UnsupportedTarget(
                f"first_block needs at least 2 blocks, {type(host.model).__name__} has {len(paths)}"
            )
        site = replace(host.adapter.run(host.model, 1, len(paths)), entry=paths[0])
        group = Group(
            self.name,
            [site],
            lambda: _FirstBlockChange(self.threshold, self.warmup_steps, self.max_consecutive),
            lambda: Residual(Reuse()),
        )
        return Plan([group], Claims(frozenset([site]), tolerates_gaps=True))
