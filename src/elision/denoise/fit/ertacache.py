"""ERTACache's offline part: simulated cached runs that find the skip list, the step factors and the corrections.

In a simulated run the network is called at every step, so that the error of a skipped step is known, but where a step
is listed the sampler continues with the cached output. All runs of a pass share one list, and the pass measures which
steps would be listed. Errors depend on earlier decisions alone, so the two agree up to some step, and what was measured
there is right as well. When they agree everywhere, the list is the one that deciding step by step, on all runs at once,
would have given. Where they do not, the first run goes on from there by its own decisions, which is a good guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from elision.denoise.control import Control
from elision.denoise.fit._record import rewrite
from elision.denoise.methods.ertacache import ERTACache, StepSizes
from elision.denoise.policy import Host
from elision.denoise.predictors import Residual, Reuse
from elision.denoise.sites import Call, channel_axis, common
from elision.denoise.steps import Step
from elision.errors import OptionError, UnsupportedTarget
from elision.hooks.diffusers import inspect_target, unwrap
from elision.profile import Profile, fingerprint

_NO_CALL = cast(Call, None)  # residuals do not look at it


@dataclass
class Moments:
    """Sums over runs, samples, places and passes of cached outputs and their errors, per channel [C], in float64."""

    count: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, 1, dtype=torch.float64))  # v, e, vv, ve

    def add(self, v: Tensor, e: Tensor) -> None:
        """Add elements whose channel axis comes first [C, n]."""
        v, e = v.double(), e.double()
        self.sums = self.sums + torch.stack([v.sum(1), e.sum(1), (v * v).sum(1), (v * e).sum(1)])
        self.count += v.shape[1]

    def line(self, pooled: bool) -> tuple[Tensor, Tensor]:
        """K and B: one number each if pooled over channels, else one per channel [C]."""
        sums, count = (
            (self.sums.sum(1, keepdim=True), self.count * self.sums.shape[1]) if pooled else (self.sums, self.count)
        )
        return line(*(sums / count))


def line(mean_v: Tensor, mean_e: Tensor, mean_vv: Tensor, mean_ve: Tensor) -> tuple[Tensor, Tensor]:
    """K and B of the least squares fit `e = (K v + B) / 4 + 1/2` from means over all elements."""
    variance = (mean_vv - mean_v * mean_v).clamp_min(0)
    slope = torch.where(variance > 1e-12 * mean_vv, (mean_ve - mean_v * mean_e) / variance, 0.0).nan_to_num(0.0)
    K = 4 * slope
    return K, 4 * (mean_e - 0.5) - K * mean_v


def l1(x: Tensor) -> float:
    """Sum of absolute values."""
    return float(x.double().abs().sum())


class Simulation:
    """One pass over calibration runs in which the listed steps continue with the cached output.

    Args:
        reused: the list.
        own: adds a step to the list, given its error; for guesses from a single run.

    Attributes:
        errors: |v~ - v|_1 of the conditional branch, per run and step.
        changes: |v_i - v_(i-1)|_1 likewise.
        norms: |v_i - x_i|_1 likewise.
        moments: of the cached outputs, by ("cond" or "rest", step).
    """

    def __init__(self, reused: frozenset[int], own: Callable[[int, float], bool] | None = None) -> None:
        self.reused = reused
        self._own = own
        self.errors: list[dict[int, float]] = []
        self.changes: list[dict[int, float]] = []
        self.norms: list[dict[int, float]] = []
        self.moments: dict[tuple[str, int], Moments] = {}
        self.steps: list[list[Step]] = []
        self._kept: dict[str, Residual] = {}
        self._before: Tensor | None = None

    def change(self, host: Host, step: Step, x: Tensor, out: Tensor) -> Tensor:
        """Measure what the cache would have returned, and return it where the step is listed."""
        if len(self.steps) <= step.run:
            for rows in (self.errors, self.changes, self.norms):
                rows.append({})
            self.steps.append([])
            self._kept, self._before = {}, None
        out = out.detach()
        kept = self._kept.setdefault(step.branch, Residual(Reuse()))
        cached = kept.predict(step, x, _NO_CALL) if kept.ready(step) else None
        if step.leads:
            self.steps[-1].append(step)
            self._measure(step, x, out, cached)
        if cached is not None:
            self._sum(step, cached, out)
            if step.leads and self._own is not None and self._own(step.n, self.errors[-1][step.n]):
                self.reused |= {step.n}
            if step.n in self.reused:
                return cached
        kept.observe(step, x, _NO_CALL, out.clone(), True)
        return out

    def _measure(self, step: Step, x: Tensor, out: Tensor, cached: Tensor | None) -> None:
        rows = slice(None) if step.cond is None else step.cond
        mine, v = (t[rows] for t in common(x, out))
        self.norms[-1][step.n] = l1(v - mine)
        if cached is not None:
            self.errors[-1][step.n] = l1(common(x, cached)[1][rows] - v)
        if self._before is not None:
            self.changes[-1][step.n] = l1(v - self._before)
        self._before = v.clone()

    def _sum(self, step: Step, cached: Tensor, out: Tensor) -> None:
        for name, rows in step.rows(len(out)).items():
            v, truth = (t[rows].movedim(channel_axis(out), 0).flatten(1) for t in (cached, out))
            self.moments.setdefault((name, step.n), Moments()).add(v, v.double() - truth.double())


@dataclass(frozen=True)
class _Search:
    """What every pass needs to know."""

    method: ERTACache
    target: Any
    calls: Sequence[Any]
    norms: list[dict[int, float]]
    total: int
    branches: Sequence[str]

    def simulate(
        self, reused: frozenset[int], only: int | None = None, phi: dict[int, float] | None = None
    ) -> Simulation:
        """One pass, over all calls or one; with step factors the sampler's steps are shrunk as they will be."""
        simulation = Simulation(reused)
        first, calls = (0, self.calls) if only is None else (only, self.calls[only : only + 1])
        control: Callable[[], Control] | None = None
        if phi is not None:
            control = lambda: StepSizes(phi, self.method.feed == "reached", always=reused)  # noqa: E731
        rewrite(self.target, calls, simulation.change, first=first, control=control, branches=self.branches)
        return simulation

    def relative(self, simulation: Simulation, only: int | None = None) -> Tensor:
        """The relative errors [runs, T]: over the norm of the uncached run's residual; infinite where none is known."""
        norms = self.norms if only is None else self.norms[only : only + 1]
        rows = [
            [errors.get(n, float("inf")) / max(norm[n], 1e-300) for n in range(self.total)]
            for errors, norm in zip(simulation.errors, norms, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def below(self, relative: Tensor) -> frozenset[int]:
        """The steps that may be skipped and whose mean relative error is below the threshold."""
        last = self.total - self.method.tail_steps
        mean = relative.mean(0).tolist()
        return frozenset(n for n in range(self.method.warmup_steps, last) if mean[n] < self.method.threshold)

    def search(self, only: int | None = None) -> tuple[frozenset[int], Tensor, int]:
        """The list, the relative errors along it, and the number of passes that it took."""
        reused, passes = self.guess(frozenset(), -1, only or 0), 0
        while True:
            relative, passes = self.relative(self.simulate(reused, only), only), passes + 1
            found = self.below(relative)
            if found == reused:
                return reused, relative, passes
            reused = self.guess(found, min(found ^ reused), only or 0)

    def guess(self, right: frozenset[int], until: int, number: int) -> frozenset[int]:
        """A list that is `right` up to step `until`, and what one run decides by itself after it."""
        norms = self.norms[number]
        allowed = range(max(self.method.warmup_steps, until + 1), self.total - self.method.tail_steps)

        def own(n: int, error: float) -> bool:
            return n in allowed and error < self.method.threshold * norms[n]

        simulation = Simulation(frozenset(n for n in right if n <= until), own)
        calls = self.calls[number : number + 1]
        rewrite(self.target, calls, simulation.change, first=number, branches=self.branches)
        return simulation.reused


def calibrate(method: ERTACache, target: Any, calls: Sequence[Any], *, branches: Sequence[str] = ()) -> Profile:
    """Make the profile of `method` on `target` from `calls`: list, step factors and corrections."""
    found = inspect_target(target)
    if len(found.denoisers) != 1:
        raise UnsupportedTarget(
            f"{found.name} has {len(found.denoisers)} denoisers, and a profile belongs to one: fit each by itself"
        )
    uncached = Simulation(frozenset())
    rewrite(target, calls, uncached.change, branches=branches)
    total = _total(uncached, len(calls))
    work = _Search(method, target, calls, uncached.norms, total, branches)
    if method.reused is not None:
        last = total - method.tail_steps
        reused = frozenset(n for n in method.reused if method.warmup_steps <= n < last)
        relative, passes = work.relative(work.simulate(reused)), 0
    elif method.pool == "together":
        reused, relative, passes = work.search()
    else:
        alone = [work.search(only) for only in range(len(calls))]
        relative, passes = torch.cat([row for _, row, _ in alone]), max(p for *_, p in alone)
        reused = work.below(relative)
    measured = work.simulate(reused)
    phi = step_factors(measured, reused, method.average == "ratios")
    if method.refit:
        measured = work.simulate(reused, phi={n: float(phi[n]) for n in reused})
    steps = uncached.steps[0]
    levels = [*(s.sigma for s in steps), steps[-1].next_sigma]
    return Profile(
        fingerprint(method.name, unwrap(found.denoisers[0]), found.scheduler, total),
        {
            "reused": torch.tensor(sorted(reused), dtype=torch.int64),
            "phi": phi,
            "sigmas": torch.tensor([float("nan") if s is None else s for s in levels], dtype=torch.float64),
            "relative_errors": relative,
            **corrections(measured, reused, total),
        },
        {"threshold": method.threshold, "steps": total, "calls": len(calls), "passes": passes},
    )


def _total(simulation: Simulation, calls: int) -> int:
    """The number of steps, which must be that of every run."""
    lengths = [len(steps) for steps in simulation.steps]
    if len(lengths) != calls:
        raise OptionError(f"ertacache: {calls} calls made {len(lengths)} runs of the denoiser; each call must make one")
    if len(set(lengths)) != 1:
        raise OptionError(
            f"ertacache: the calls have {sorted(set(lengths))} steps; a profile is for one number of them"
        )
    return lengths[0]


def step_factors(simulation: Simulation, reused: frozenset[int], ratios: bool) -> Tensor:
    """The factors [T] of a pass along the list; 1 where nothing is skipped."""
    phi = torch.ones(len(simulation.steps[0]), dtype=torch.float64)
    for n in reused:
        pairs = [(e[n], c[n]) for e, c in zip(simulation.errors, simulation.changes, strict=True)]
        if not ratios:
            pairs = [(sum(e for e, _ in pairs), sum(c for _, c in pairs))]
        phi[n] = sum(factor(error, change) for error, change in pairs) / len(pairs)
    return phi


def factor(error: float, change: float) -> float:
    """`1 - error / change` within 0 and 1; where nothing changes, 1 if there is no error either."""
    if change == 0:
        return 1.0 if error == 0 else 0.0
    return min(max(1 - error / change, 0.0), 1.0)


def corrections(simulation: Simulation, reused: frozenset[int], total: int) -> dict[str, Tensor]:
    """K and B as `K.cond.channel` [T, C], `K.cond.scalar` [T, 1] and so on; no correction where nothing is skipped."""
    out: dict[str, Tensor] = {}
    names = sorted({name for name, _ in simulation.moments})
    for name in names:
        channels = max(m.sums.shape[1] for (key, _), m in simulation.moments.items() if key == name)
        for kind, width in (("scalar", 1), ("channel", channels)):
            K, B = torch.zeros(total, width, dtype=torch.float64), torch.full((total, width), -2.0, dtype=torch.float64)
            for n in reused:
                K[n], B[n] = simulation.moments[name, n].line(kind == "scalar")
            out[f"K.{name}.{kind}"], out[f"B.{name}.{kind}"] = K, B
    return out
