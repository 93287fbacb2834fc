"""Watching a denoiser: every call of a site, computed as ever, shown to a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from elision.denoise.engine import DenoiseApplied
from elision.denoise.policy import COMPUTE, Claims, Decision, DenoiseMethod, Group, Host, Plan, Schedule
from elision.denoise.predictors import Reuse
from elision.denoise.sites import Call, Level, Site
from elision.denoise.steps import Step
from elision.errors import OptionError
from elision.hooks.diffusers import Target, inspect_target
from elision.profile import Profile

Seen = Callable[[Host, Step, Site, Call, Tensor], None]


class _Watch(Schedule):
    listens: ClassVar[bool] = True

    def __init__(self, host: Host, seen: Seen) -> None:
        self._host = host
        self._seen = seen

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        return COMPUTE

    def update(self, step: Step, site: Site, call: Call, out: Any, computed: bool) -> None:
        self._seen(self._host, step, site, call, out)


class _Nothing(Reuse):
    """A predictor that keeps nothing."""

    def observe(self, step: Step, x: Tensor, call: Call, out: Tensor, computed: bool) -> None:
        """Look away."""


@dataclass(frozen=True)
class _Recorder(DenoiseMethod):
    name: ClassVar[str] = "recorder"
    description: ClassVar[str] = "watches a site"

    level: Level = "model"
    seen: Seen = field(default=lambda *_: None)

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        sites = host.site(self.level, "fit")
        return Plan([Group("recorder", sites, lambda: _Watch(host, self.seen), _Nothing)], Claims(frozenset()))


class _Recording(DenoiseApplied):
    """A session that is expected to elide nothing."""

    def _warn_if_idle(self, run: Any, numbers: Any) -> None:
        del run, numbers


def record(target: Any, level: Level, calls: Sequence[Any], seen: Seen) -> Target:
    """Run `calls` on `target` and show every call of the sites of one level to `seen`; returns the target's parts."""
    found = inspect_target(target)
    session = _Recording(found, [_Recorder(level, seen)])
    with session:
        for call in calls:
            run_call(target, call)
    return found


def run_call(target: Any, call: Any) -> Any:
    """One call for `fit`: a function of the target, keyword arguments of it, or its first argument (a prompt)."""
    if callable(call):
        return call(target)
    if not callable(target):
        raise OptionError(f"{type(target).__name__} cannot be called: give fit functions that take it")
    return target(**call) if isinstance(call, dict) else target(call)
