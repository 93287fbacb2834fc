"""One tapped denoiser at work: what it is called with, its sites, and the books of the session."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elision.denoise.acting import Args, GroupRuntime, Kwargs, SiteRuntime
from elision.denoise.flops import FlopBook
from elision.denoise.guided import GuidedRuntime
from elision.denoise.policy import Group, Host
from elision.denoise.report import ShadowError, Tally
from elision.denoise.sites import argument, parameter_names
from elision.denoise.steps import Step
from elision.errors import TapDisplaced, UnsupportedTarget
from elision.hooks.diffusers import Form, unwrap
from elision.hooks.taps import Inner, Tap, is_compiled, tap_call, tap_method

if TYPE_CHECKING:
    from elision.denoise.engine import DenoiseApplied


class HostRuntime:
    """One denoiser, its groups and sites, and the counters of the session."""

    def __init__(self, host: Host, outer: nn.Module, groups: Iterable[Group], session: DenoiseApplied) -> None:
        self.host = host
        self.outer = outer
        self.model = host.model
        self.session = session
        self.seconds = session.seconds
        self.shadow = session.shadow
        self.passive = False
        self.renewed = False  # whether something was computed, and therefore kept, in this call
        self.visit = 0
        self.run = -1
        self.step = Step(0, 0, None, 0.0)
        self.signature = 0
        self.entries: dict[str, Tensor] = {}
        self.book = FlopBook(host.model)
        self.shadow_errors: list[tuple[int, int, str, str, Tensor]] = []
        self.finite: list[tuple[int, int, str, Tensor]] = []
        self.taps: list[Tap] = []
        self.below: set[str] = set()  # paths that the control taps inside
        self._branches: dict[str, int] = {}
        self._names = parameter_names(self.model)
        self.groups = [GroupRuntime(group, self) for group in groups]
        self.sites = [
            (GuidedRuntime if site.level == "guided" else SiteRuntime)(site, group)
            for group in self.groups
            for site in group.group.sites
        ]
        self.check_not_compiled()

    def module(self, path: str) -> nn.Module:
        """The module at `path` of the denoiser."""
        return self.model.get_submodule(path)

    def tally(self, group: str) -> Tally:
        """The tally of a group in the current step."""
        return self.session.tally(self.step, group)

    def tensors(self) -> Iterable[Tensor]:
        """Everything that is kept between calls."""
        for site in self.sites:
            yield from site.tensors()
        for group in self.groups:
            yield from group.schedule.tensors()

    # -- taps ----------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Tap the denoiser and its sites, the outermost first, so that an inner tap runs inside an outer one."""
        self.taps.append(tap_call(self.outer, self._on_call))
        order = ("guided", "model", "head", "stack", "run", "branch")
        for site in sorted(self.sites, key=lambda s: order.index(s.site.level)):
            if site.site.entry:
                self._tap(site.site.entry, self._on_entry(site.site.entry))
            for path in site.site.blocks:
                if path != site.site.tail:
                    self._tap(path, site.on_block(path))
            for path in site.site.feeders:
                self._tap(path, site.on_feeder(path))
            self._tap(site.site.tail, site.on_tail(site.site.tail))
        self.taps += self.session.steering.tap_call(self)
        self.check_not_compiled()

    def step_taps(self, scheduler: Any) -> list[Tap]:
        """The taps of its `guided` sites on the scheduler."""
        guided = [site for site in self.sites if isinstance(site, GuidedRuntime)]
        return [tap_method(scheduler, "step", site.on_step) for site in guided]

    def _tap(self, path: str, wrap: Callable[[Inner, Args, Kwargs], Any]) -> None:
        self.taps.append(tap_call(self.outer if path == "" else self.module(path), wrap))

    def _on_entry(self, path: str) -> Callable[[Inner, Args, Kwargs], Any]:
        names = parameter_names(self.module(path))

        def wrap(inner: Inner, args: Args, kwargs: Kwargs) -> Any:
            self.entries[path] = argument(names, args, kwargs, self.host.adapter.image)
            return inner(*args, **kwargs)

        return wrap

    @property
    def inner_paths(self) -> set[str]:
        """Paths of all tapped modules below the denoiser itself."""
        paths = {path for site in self.sites for path in (*site.site.modules, site.site.entry)}
        return (paths | self.below) - {""}

    def check_not_compiled(self) -> None:
        """Refuse a tap inside a compiled region: it would never be reached."""
        above = {""} if self.inner_paths else set()
        for path in self.inner_paths:
            parts = path.split(".")
            above |= {".".join(parts[:i]) for i in range(1, len(parts))}
        for path in sorted(above):
            module = self.outer if path == "" else self.module(path)
            if is_compiled(module) or (path == "" and unwrap(module) is not module):
                raise UnsupportedTarget(
                    f"{path or type(self.model).__name__} is compiled as a whole, and the method replaces outputs "
                    "inside it: apply to the uncompiled model and call run.compile(), which compiles below the taps"
                )

    def displaced(self) -> str | None:
        """What to say if something replaced a tap after `apply`, None if all are in place."""
        lost = next((tap for tap in self.taps if not tap.in_place), None)
        if lost is None:
            return None
        return (
            f"a tap on {type(lost.owner).__name__} was replaced after apply (usually by compile()), so the method "
            "would silently do nothing: compile first, or use run.compile()"
        )

    def check_in_place(self) -> None:
        """Raise if something replaced a tap after `apply`."""
        complaint = self.displaced()
        if complaint is not None:
            raise TapDisplaced(complaint)

    # -- calls ---------------------------------------------------------------------------------------------------

    def _on_call(self, inner: Inner, args: Args, kwargs: Kwargs) -> Any:
        if self.passive:
            return inner(*args, **kwargs)
        started = perf_counter()
        seconds = self.seconds
        before = seconds.deciding + seconds.standing_in
        self._tick(args, kwargs)
        seconds.deciding += perf_counter() - started
        try:
            out = inner(*args, **kwargs)
            closing = perf_counter()
            self._after(out)
            seconds.deciding += perf_counter() - closing
        except BaseException:
            self.session.clock.reset()  # what came of this call is unknown: the next one starts a run
            raise
        finally:
            self.entries.clear()
            others = seconds.deciding + seconds.standing_in - before
            seconds.computing += perf_counter() - started - others
        return out

    def _tick(self, args: Args, kwargs: Kwargs) -> None:
        adapter = self.host.adapter
        for name, why in adapter.refused.items():
            if argument(self._names, args, kwargs, name) is not None:
                raise UnsupportedTarget(f"{type(self.model).__name__} was called with {name}, and then {why}")
        x = adapter.show(argument(self._names, args, kwargs, adapter.latent))
        if not isinstance(x, Tensor):
            raise UnsupportedTarget(
                f"{type(self.model).__name__} was called with {adapter.latent}={type(x).__name__}, not a tensor"
            )
        time = None if adapter.timestep is None else argument(self._names, args, kwargs, adapter.timestep)
        step = self.session.tick(time, x)
        self.visit += 1
        if step.run != self.run:
            self._restart(step.run)
        self.step = step
        if step.branch not in self._branches:
            self._branches[step.branch] = self.book.sign(args, kwargs)
        self.signature = self._branches[step.branch]
        self.book.calls[self.signature] += 1

    def _restart(self, run: int) -> None:
        self.check_in_place()
        self.check_not_compiled()
        self.run = run
        self._branches = {}
        for group in self.groups:
            group.restart()
        for site in self.sites:
            site.restart()

    def forget(self) -> None:
        """Free what the run kept."""
        self.run = -1
        for group in self.groups:
            group.restart()
        for site in self.sites:
            site.restart()

    def _after(self, out: Any) -> None:
        value = self.host.adapter.show(Form.split(out)[0])
        if isinstance(value, Tensor):
            self.finite.append((self.step.run, self.step.n, self.step.branch, torch.isfinite(value).all()))
        if self.renewed:
            self.renewed = False
            self.session.weigh()

    # -- books ---------------------------------------------------------------------------------------------------

    def muted(self) -> Muted:
        """A context in which no tap of this denoiser acts."""
        return Muted(self)

    def errors(self) -> list[ShadowError]:
        """The shadow errors so far, as numbers."""
        return [ShadowError(run, n, branch, site, float(e)) for run, n, branch, site, e in self.shadow_errors]


class Muted:
    """While entered, the taps of one denoiser pass everything through."""

    def __init__(self, host: HostRuntime) -> None:
        self._host = host
        self._before = False

    def __enter__(self) -> None:
        self._before, self._host.passive = self._host.passive, True

    def __exit__(self, *error: object) -> None:
        self._host.passive = self._before
