"""Watching a denoiser at work, and changing what it returns: how offline parts see their calibration runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from elision.denoise.control import Control
from elision.denoise.engine import DenoiseApplied
from elision.denoise.policy import COMPUTE, Claims, Decision, DenoiseMethod, Group, Host, Plan, Schedule
from elision.denoise.predictors import Reuse
from elision.denoise.runtime import HostRuntime
from elision.denoise.sites import Call, Level, Site, argument, parameter_names
from elision.denoise.steps import Step
from elision.errors import OptionError
from elision.hooks.diffusers import Form, Target, inspect_target
from elision.hooks.taps import Inner, tap_call
from elision.profile import Profile

Seen = Callable[[Host, Step, Site, Call, Tensor], None]
Change = Callable[[Host, Step, Tensor, Tensor], Tensor]


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
    steer: Callable[[], Control] | None = None

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        sites = host.site(self.level, "fit")
        groups = [Group("recorder", sites, lambda: _Watch(host, self.seen), _Nothing)]
        make = self.steer
        if make is None:
            return Plan(groups, Claims(frozenset()))
        return Plan(groups, Claims(frozenset(), frozenset({"dt", "time"})), control=lambda _: make())


class _Recording(DenoiseApplied):
    """A session that is expected to elide nothing."""

    def _warn_if_idle(self, run: Any, numbers: Any) -> None:
        del run, numbers


def record(target: Any, level: Level, calls: Sequence[Any], seen: Seen, *, branches: Sequence[str] = ()) -> Target:
    """Run `calls` on `target` and show every call of the sites of one level to `seen`; returns the target's parts.

    `branches` are the guidance branches in the order of their calls, where the calls do not name them.
    """
    found = inspect_target(target)
    session = _Recording(found, [_Recorder(level, seen)], branches=branches)
    with session:
        for call in calls:
            run_call(target, call)
    return found


def rewrite(
    target: Any,
    calls: Sequence[Any],
    change: Change,
    *,
    first: int = 0,
    control: Callable[[], Control] | None = None,
    branches: Sequence[str] = (),
) -> Target:
    """Run `calls` on `target` with every output of its denoiser passed through `change`; returns the target's parts.

    Every pass over the same calls draws the same noise: generators among the arguments are put back to where they
    stood, and global random numbers are seeded by the number of the call, outside of the caller's sequence.

    Args:
        target: a pipeline or a denoiser.
        calls: as `fit` takes them.
        change: given the host, the step, the latent and the output, returns what the sampler gets instead.
        first: number of the first call.
        control: makes a control of the sampler's step sizes and of the network's time for each run.
        branches: the guidance branches in the order of their calls, where the calls do not name them.
    """
    found = inspect_target(target)
    session = _Recording(found, [_Recorder(steer=control)], branches=branches)
    with session:
        taps = [tap_call(host.outer, _changing(host, change)) for host in session.hosts]
        try:
            for number, call in enumerate(calls, first):
                with _same_noise(call, number):
                    run_call(target, call)
        finally:
            for tap in taps:
                tap.remove()
    return found


def _changing(host: HostRuntime, change: Change) -> Callable[..., Any]:
    names = parameter_names(host.model)

    def wrap(inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        adapter = host.host.adapter
        x = adapter.show(argument(names, args, kwargs, adapter.latent))
        value, form = Form.split(inner(*args, **kwargs))
        return form.join(adapter.give(change(host.host, host.step, x, adapter.show(value))))

    return wrap


@contextmanager
def _same_noise(call: Any, number: int) -> Iterator[None]:
    values = list(call.values()) if isinstance(call, dict) else []
    given = [g for v in values for g in (v if isinstance(v, (list, tuple)) else [v]) if isinstance(g, torch.Generator)]
    before = [g.get_state() for g in given]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(number)
        try:
            yield
        finally:
            for generator, state in zip(given, before, strict=True):
                generator.set_state(state)


def run_call(target: Any, call: Any) -> Any:
    """One call for `fit`: a function of the target, keyword arguments of it, or its first argument (a prompt)."""
    if callable(call):
        return call(target)
    if not callable(target):
        raise OptionError(f"{type(target).__name__} cannot be called: give fit functions that take it")
    return target(**call) if isinstance(call, dict) else target(call)
