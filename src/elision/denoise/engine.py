"""The denoise engine: installs plans on a pipeline or a denoiser, keeps the clock and the books."""

from __future__ import annotations

import copy
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elision.denoise.adapters import Adapter, adapter_for
from elision.denoise.compose import check
from elision.denoise.control import Steering
from elision.denoise.flops import FlopBook
from elision.denoise.policy import DenoiseMethod, Host, Plan
from elision.denoise.report import DenoiseReport, RunRecord, StepRecord, Tally
from elision.denoise.runtime import HostRuntime
from elision.denoise.steps import Clock, Context, Step
from elision.errors import ClockError, ElisionWarning, OptionError, ProfileError, UnsupportedTarget
from elision.hooks.diffusers import (
    Target,
    inspect_target,
    is_set_up,
    is_stock,
    tap_cache_context,
    tap_scheduler,
    tappable,
    unwrap,
)
from elision.hooks.taps import Tap
from elision.method import Method
from elision.profile import Profile, fingerprint
from elision.session import Applied, Seconds, storage_bytes

_DETAILED_RUNS = 64


def attach(
    target: Any,
    methods: Sequence[Method],
    *,
    steps: int | Sequence[float] | None = None,
    cond: slice | None = None,
    profile: Profile | str | Path | Mapping[str, Profile | str | Path] | None = None,
    force: bool = False,
    shadow: bool = False,
    branches: Sequence[str] = (),
) -> DenoiseApplied:
    """Install methods on a diffusers pipeline or on its denoiser.

    Args:
        target: a pipeline (its `transformer`, `transformer_2`, `unet` or `prior`), or the denoiser itself.
        methods: option objects of this family.
        steps: number of steps (or the timesteps) of every run; needed for bare denoisers by methods that must know
            where the run ends, ignored where a scheduler tells.
        cond: conditional rows of calls that carry both guidance branches; by default found from the adapter.
        profile: what `elision.fit` made, or its path; with several methods a mapping from method name.
        force: use a profile although its fingerprint differs.
        shadow: also compute the true value at every stand-in and report the relative error.
        branches: names of the guidance branches in the order in which the denoiser is called for them at every step,
            for pipelines that call it several times without `cache_context`.
    """
    mine = [m for m in methods if isinstance(m, DenoiseMethod)]
    return DenoiseApplied(
        inspect_target(target),
        mine,
        steps=steps,
        cond=cond,
        profile=profile,
        force=force,
        shadow=shadow,
        branches=branches,
    )


class DenoiseApplied(Applied):
    """Denoise methods at work; see `elision.apply`."""

    def __init__(
        self,
        target: Target,
        methods: Sequence[DenoiseMethod],
        *,
        steps: int | Sequence[float] | None = None,
        cond: slice | None = None,
        profile: Any = None,
        force: bool = False,
        shadow: bool = False,
        branches: Sequence[str] = (),
    ) -> None:
        super().__init__(methods)
        self.target = target
        self.shadow = shadow
        self.seconds = Seconds()
        self.clock = Clock(steps, branches)
        if not (cond is None or isinstance(cond, slice)):
            raise OptionError(f"cond={cond!r} is no slice of rows: pass for instance cond=slice(2, None)")
        self._cond = cond
        self._notes: list[str] = []
        self._lasting: list[str] = []  # notes that outlive a reset
        self.hosts: list[HostRuntime] = []
        self.steering = Steering({}, self)
        self._run: RunRecord | None = None
        self._runs: deque[RunRecord] = deque(maxlen=_DETAILED_RUNS)
        self._run_count = self._held = self._peak = 0
        self._totals: dict[str, int] = {}
        self._final: DenoiseReport | None = None
        self._books: list[FlopBook] = []
        self._sites: Counter[str] = Counter()
        self._displaced: str | None = None
        self._needs_total = ""
        self._scheduler_taps: list[Tap] = []
        self._zero()
        if shadow:
            self._lasting.append("shadow: true values were computed, too; elided figures are those of a run without it")
        plans = [self._plan(module, profile, force) for module in target.denoisers]
        try:
            self._install(plans)
        except BaseException:
            self._closed = False
            self.remove()
            raise

    # -- installing ----------------------------------------------------------------------------------------------

    def _plan(self, module: torch.nn.Module, profile: Any, force: bool) -> tuple[Host, torch.nn.Module, list[Plan]]:
        model = unwrap(module)
        host = Host(model, adapter_for(model), self.target.scheduler)
        if not host.adapter.known:
            self._lasting.append(f"{type(model).__name__} has no adapter: only the site 'model' is available on it")
        plans: list[Plan] = []
        for method in self.methods:
            assert isinstance(method, DenoiseMethod)
            plan = method.plan(host, self._profile(method, host, profile, force))
            if plan.claims.needs_total and self.clock.given is None and not tappable(self.target.scheduler):
                raise OptionError(
                    f"{method.name} must know the number of steps, and a bare {type(model).__name__} cannot tell: "
                    f"pass steps=, as in elision.apply(model, {method.name!r}, steps=28)"
                )
            if plan.claims.needs_total:
                self._needs_total = method.name
            plans.append(plan)
        check([(m.name, plan.claims) for m, plan in zip(self.methods, plans, strict=True)])
        return host, module, plans

    def _profile(self, method: DenoiseMethod, host: Host, given: Any, force: bool) -> Profile | None:
        if isinstance(given, Mapping):
            given = given.get(method.name)
        if given is None:
            if method.wants_profile:
                raise ProfileError(
                    f"{method.name} needs a profile: make one with elision.fit(target, {method.name!r}, calls=...) "
                    "and pass it as profile="
                )
            return None
        loaded = given if isinstance(given, Profile) else Profile.load(given)
        here = fingerprint(method.name, host.model, host.scheduler, self.clock.given)
        for difference in loaded.check(here, force):
            self._lasting.append(f"profile used by force although it differs: {difference}")
        return loaded

    def _install(self, plans: list[tuple[Host, torch.nn.Module, list[Plan]]]) -> None:
        self.steering = Steering(dict(zip((m.name for m in self.methods), plans[0][2], strict=True)), self)
        self.steering.check(self.target.scheduler)
        if not self.clock.branches and is_stock(self.target.pipeline):
            self.clock.branches = plans[0][0].adapter.calls
        for host, module, mine in plans:
            self._own(host.model)
            groups = [group for plan in mine for group in plan.groups]
            for plan in mine:
                self._lasting.extend(plan.notes)
            self.hosts.append(HostRuntime(host, module, groups, self))
        self._books = [runtime.book for runtime in self.hosts]
        for group in (group for runtime in self.hosts for group in runtime.groups):
            self._sites[group.group.name] += len(group.group.sites)
        for runtime in self.hosts:
            try:
                runtime.install()
            finally:
                self._taps.extend(runtime.taps)
            self._taps.extend(tap_cache_context(runtime.model, self._enter_context))
        if self._follow_scheduler() and is_set_up(self.target.scheduler):
            self.clock.begin()

    def _follow_scheduler(self) -> bool:
        """Tap the pipeline's scheduler; true if it is another one than before (users swap it)."""
        scheduler = self.target.scheduler
        if scheduler is self.clock.scheduler or not tappable(scheduler):
            return False
        for tap in self._scheduler_taps:  # somebody else may use the old one, and it may come back
            tap.remove()
            self._taps.remove(tap)
        self.steering.check(scheduler)
        self.clock.scheduler = scheduler
        self._scheduler_taps = [  # the outermost first
            *tap_scheduler(scheduler, self._begin, self._advance),
            *self.steering.blanking(scheduler),
            *(tap for host in self.hosts for tap in host.step_taps(scheduler)),
            *self.steering.taps(scheduler),
        ]
        self._taps.extend(self._scheduler_taps)
        return True

    # -- told by taps --------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.clock.begin()

    def _advance(self) -> None:
        self.clock.advance()
        for host in self.hosts:
            host.check_in_place()
        run = self._run
        if run is not None and run.total is not None and len(run.steps) >= run.total:
            self._end_run()

    def _enter_context(self, name: str, metadata: dict[str, Any]) -> Callable[[], None]:
        before = self.clock.context
        time, sigma = (None if metadata.get(k) is None else float(metadata[k]) for k in ("timestep", "sigma"))
        self.clock.context = Context(name, metadata.get("step_index"), metadata.get("num_inference_steps"), time, sigma)

        def leave() -> None:
            self.clock.context = before

        return leave

    @contextmanager
    def step(self, branch: str) -> Iterator[None]:
        """Name the guidance branch of the denoiser calls in the body, for hand-written loops.

        Example:
            with run.step("cond"): v_cond = model(x, t, text)
            with run.step("uncond"): v_uncond = model(x, t, empty)
        """
        self._open("step()")
        leave = self._enter_context(branch, {})
        try:
            yield
        finally:
            leave()

    # -- asked by runtimes ---------------------------------------------------------------------------------------

    def tick(self, timestep: Any, x: Tensor) -> Step:
        """The step of a denoiser call; closes the books of the last run where a new one begins."""
        if (
            self.target.pipeline is not None
            and self._follow_scheduler()
            and getattr(self.target.scheduler, "timesteps", None) is not None
        ):
            self.clock.begin(late=True)  # the swapped-in scheduler was set up before we saw it
        step, new = self.clock.tick(timestep, x.shape)
        if new:
            self._end_run()
            self.clock.cond = self._rows(x, self.hosts[0].host.adapter)
            step = replace(step, cond=self.clock.cond)
            self._start_run(step)
        assert self._run is not None
        if not self._run.steps or self._run.steps[-1].n != step.n:
            self._run.steps.append(StepRecord(step.n, step.t, step.sigma))
        return step

    def _rows(self, x: Tensor, adapter: Adapter) -> slice | None:
        """The conditional rows of a call that carries both guidance branches, None if it carries one."""
        if self._cond is not None:
            if not range(*self._cond.indices(len(x))):
                raise OptionError(f"cond={self._cond} selects no row of a batch of {len(x)}")
            return self._cond
        half = len(x) // 2
        named = self.clock.context.name
        if not adapter.known or len(x) % 2 or named not in ("", "cond_uncond"):
            return None
        guided = getattr(self.target.pipeline, "do_classifier_free_guidance", True)  # not every pipeline tells
        if not guided or not torch.equal(x[:half], x[half:]):
            return None
        return slice(half, None) if adapter.batched == "uncond first" else slice(None, half)

    def stood_in(self, group: str) -> bool:
        """Whether a group stood in for anything in the current step."""
        tally = None if self._run is None else self._run.steps[-1].groups.get(group)
        return tally is not None and tally.stood_in > 0

    def tally(self, step: Step, group: str) -> Tally:
        """The tally of a group in the current step."""
        assert self._run is not None
        groups = self._run.steps[-1].groups
        if group not in groups:
            groups[group] = Tally()
        return groups[group]

    def weigh(self) -> None:
        """Count the bytes that are kept, after a call."""
        kept = chain(self.steering.tensors(), *(host.tensors() for host in self.hosts))
        self._held = storage_bytes(kept)
        self._peak = max(self._peak, self._held)

    # -- runs ----------------------------------------------------------------------------------------------------

    def _start_run(self, step: Step) -> None:
        self._run = RunRecord(self._run_count, step.total)
        self._run_count += 1
        self._runs.append(self._run)
        if step.total is None:
            if self._needs_total:
                raise ClockError(
                    f"{self._needs_total} must know the number of steps, and nothing tells it in this run: pass steps="
                )
            return
        for host in self.hosts:
            for group in host.groups:
                complaint = group.schedule.complaint(step.total)
                if complaint:
                    self._warn(f"{group.group.name}: {complaint}")

    def _end_run(self) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        for record in run.steps:
            _add(self._totals, record)
        for group in (group for host in self.hosts for group in host.groups):
            run.extra.update({group.group.name: shown} if (shown := group.schedule.extra()) else {})
        self._note_schedules()
        self._note_not_finite()
        numbers = {g.group.name: g.schedule.numbers() for h in self.hosts for g in h.groups}
        for host in self.hosts:
            host.forget()
        self.steering.forget()
        self._held = 0
        self._warn_if_idle(run, numbers)

    def _note_schedules(self) -> None:
        for host in self.hosts:
            for group in host.groups:
                for note in (*group.schedule.notes(), *group.notes):
                    self._note(f"{group.group.name}: {note}")
        for note in self.steering.notes():
            self._note(note)

    def _note_not_finite(self) -> None:
        for host in self.hosts:
            flags = torch.stack([flag for *_, flag in host.finite]).tolist() if host.finite else []
            bad = [where for (*where, _), finite in zip(host.finite, flags, strict=True) if not finite]
            host.finite.clear()
            if bad:
                run, n, branch = bad[0]
                where = f"step {n}" + (f" ({branch})" if branch else "")
                self._note(f"run {run}: {len(bad)} outputs of the denoiser were not finite, the first at {where}")

    def _warn_if_idle(self, run: RunRecord, numbers: Mapping[str, str]) -> None:
        if not run.steps or any(
            tally.stood_in or tally.partial for record in run.steps for tally in record.groups.values()
        ):
            return
        if self._broke_off or (run.total is not None and len(run.steps) < run.total):
            return  # it had no chance, and under -W error the warning would hide what really happened
        reasons: dict[str, dict[str, int]] = {}
        for record in run.steps:
            for name, tally in record.groups.items():
                for why, times in tally.reasons.items():
                    per = reasons.setdefault(name, {})
                    per[why] = per.get(why, 0) + times
        for name, per in reasons.items():
            why = ", ".join(f"{times} {reason}" for reason, times in per.items())
            extra = f" ({numbers[name]})" if numbers.get(name) else ""
            self._warn(f"{name} elided nothing in {len(run.steps)} steps: {why}{extra}")

    def _warn(self, text: str) -> None:
        self._note(text)
        warnings.warn(text, ElisionWarning, stacklevel=2)

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    # -- the face ------------------------------------------------------------------------------------------------

    def report(self) -> DenoiseReport:
        """What happened since `apply` or `reset()`, including the run in progress."""
        report = self._summary() if self._final is None else copy.copy(self._final)
        flops = [book.totals() for book in self._books]
        known = [f for f in flops if f is not None]
        if len(known) == len(flops):
            report.flops_computed, report.flops_elided = sum(f[0] for f in known), sum(f[1] for f in known)
        report.notes = [*self._lasting, *self._notes]
        return report

    def _summary(self) -> DenoiseReport:
        totals = dict(self._totals)
        for record in [] if self._run is None else self._run.steps:
            _add(totals, record)
        whole = ("guided", "model")
        elided = sum(n for book in self._books for (_, site), n in book.stood_in.items() if site.level in whole)
        return DenoiseReport(
            methods=[str(m) for m in self.methods],
            target=self.target.name,
            bytes_held=self._held,
            bytes_peak=self._peak,
            seconds=copy.copy(self.seconds),
            sites=dict(self._sites),
            runs=[copy.deepcopy(run) for run in self._runs],
            run_count=self._run_count,
            steps_computed=totals["computed"],
            steps_reused=totals["reused"],
            steps_predicted=totals["predicted"],
            steps_mixed=totals["mixed"],
            calls=sum(sum(book.calls.values()) for book in self._books),
            calls_elided=elided,
            outputs_computed=totals["outputs_computed"],
            outputs_stood_in=totals["outputs_stood_in"],
            shadow=[error for host in self.hosts for error in host.errors()],
        )

    def compile(self, **options: Any) -> None:
        """`torch.compile` the target strictly below the taps; undone by `remove()`.

        Args:
            **options: passed to `torch.compile`.
        """
        self._open("compile()")
        for host in self.hosts:
            if host.below:
                raise UnsupportedTarget(
                    f"{self.steering.holds('tokens')} reads keys and values inside attention, which a compiled region "
                    "would hide: run it uncompiled"
                )
            paths = host.inner_paths
            above = {path[:i] for path in paths for i, letter in enumerate(path) if letter == "."}
            finest = {id(host.module(path)) for path in paths - above} or {id(host.outer)}
            for tap in host.taps:
                if id(tap.owner) in finest:
                    finest.remove(id(tap.owner))
                    tap.swap_base(lambda inner: torch.compile(inner, **options))

    def _zero(self) -> None:
        self._run = None
        self._runs.clear()
        self._run_count = self._held = self._peak = 0
        names = ("computed", "reused", "predicted", "mixed", "outputs_computed", "outputs_stood_in")
        self._totals = dict.fromkeys(names, 0)
        self._final = None

    def _clear(self) -> None:
        self._zero()
        self.seconds.deciding = self.seconds.standing_in = self.seconds.computing = 0.0
        self.clock.reset()
        self.clock.run = -1
        self._notes.clear()
        self.steering.forget()
        for host in self.hosts:
            host.forget()
            host.book.clear()
            host.finite.clear()
            host.shadow_errors.clear()

    def _leave(self) -> None:
        complaints = (host.displaced() for host in self.hosts)
        self._displaced = next((complaint for complaint in complaints if complaint), None)

    def _finish(self) -> None:
        if self._displaced is not None and not self._broke_off:
            self._warn(self._displaced)
        self._end_run()
        if self._run_count == 0 and self.clock.advanced and not self._broke_off:
            self._warn(
                f"the scheduler went on, but {self.target.name}'s denoiser was never called through its taps: it was "
                "replaced, or compiled as part of something larger, after apply"
            )
        elif self._run_count == 0:
            self._note("the target was never called while the method was applied")
        self._final = self._summary()
        self.hosts = []
        self.steering = Steering({}, self)
        self.target = Target(self.target.name, ())
        self.clock.scheduler = None
        self._scheduler_taps = []


def _add(totals: dict[str, int], record: StepRecord) -> None:
    """Add one step to running totals."""
    totals[record.state] += 1
    for tally in record.groups.values():
        totals["outputs_computed"] += tally.computed
        totals["outputs_stood_in"] += tally.stood_in
