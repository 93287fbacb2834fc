"""Schedules: when to compute. Each is a rule on the step alone, or a criterion on what the run has shown so far."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from elision.denoise.policy import STAND_IN, Decision, Schedule
from elision.denoise.sites import Call, Site
from elision.denoise.steps import Step
from elision.errors import ProfileMismatch

WARMUP, TAIL = Decision(False, "warm-up"), Decision(False, "last steps")
INTERVAL = Decision(False, "interval over")
LISTED, UNLISTED = Decision(False, "listed step"), Decision(False, "outside the list")


class Interval(Schedule):
    """Compute the first `warmup` steps, then every step that is `interval` away from the last computed one.

    Steps that something further out skipped do not count as computed, so the distance stays true under composition.
    """

    def __init__(self, interval: int, warmup: int = 1) -> None:
        self.interval = interval
        self.warmup = warmup
        self._last = -1

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Warm-up, interval over, or stand in."""
        if step.n >= self.warmup and step.n - self._last < self.interval:
            return STAND_IN
        self._last = step.n
        return WARMUP if step.n < self.warmup else INTERVAL

    def complaint(self, total: int) -> str | None:
        """A run whose interval never ends again after the warm-up."""
        if self.warmup < total <= self.warmup - 1 + self.interval:
            return (
                f"interval={self.interval} computes only the {self.warmup} warm-up steps of {total}: "
                f"every later step is a stand-in; use an interval below {total - self.warmup + 1}"
            )
        return None


class Steps(Schedule):
    """Compute exactly the steps of a list (a static table, anchors, a profile's skip set turned round)."""

    def __init__(self, computed: Iterable[int]) -> None:
        self.computed = frozenset(computed)

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Listed or not."""
        return LISTED if step.n in self.computed else STAND_IN

    def complaint(self, total: int) -> str | None:
        """A list that ends long before the run does."""
        inside = [n for n in self.computed if n < total]
        return None if inside else f"none of the listed steps lies in a run of {total} steps"


class Skips(Schedule):
    """Stand in exactly at the listed steps, outside of warm-up and tail.

    Args:
        skipped: the steps.
        warmup: steps that are computed at the start whatever the list says, and
        tail: at the end.
        sigmas: noise levels of the grid that the list was made for (one more than its steps, NaN where unknown); runs
            on another one are refused.
    """

    def __init__(
        self, skipped: Iterable[int], warmup: int = 0, tail: int = 0, sigmas: Sequence[float] | None = None
    ) -> None:
        self.skipped = frozenset(skipped)
        self.warmup = warmup
        self.tail = tail
        self.sigmas = sigmas

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Listed or not."""
        if self.sigmas is not None:
            self._check(step, self.sigmas)
        if step.n < self.warmup:
            return WARMUP
        if step.total is not None and step.n >= step.total - self.tail:
            return TAIL
        return STAND_IN if step.n in self.skipped else LISTED

    @staticmethod
    def _check(step: Step, sigmas: Sequence[float]) -> None:
        total = len(sigmas) - 1
        if step.n >= total or step.total not in (None, total):
            raise ProfileMismatch(
                f"the profile is for runs of {total} steps, this one has {step.total or 'more'}: fit another"
            )
        there, here = sigmas[step.n], step.sigma
        if here is not None and abs(there - here) > 1e-4 * max(1.0, abs(there)):  # never true of NaN
            raise ProfileMismatch(
                f"the profile has noise level {there:g} at step {step.n}, this run has {here:g} (another shift or "
                "resolution, or image-to-image): fit another"
            )


class SiteSteps(Schedule):
    """Compute every site at its own list of steps (BAC's per-branch update steps).

    A site without steps is always computed, one whose list starts late is computed until then, and from step `until` on
    all are.
    """

    scope: ClassVar[Literal["step", "branch", "site"]] = "site"

    def __init__(self, computed: Mapping[str, Iterable[int]], until: int | None = None) -> None:
        self.computed = {key: frozenset(steps) for key, steps in computed.items()}
        self.until = until

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Listed or not, for this site."""
        mine = self.computed[site.key]
        if step.n in mine:
            return LISTED
        if not mine or step.n < min(mine) or (self.until is not None and step.n >= self.until):
            return UNLISTED
        return STAND_IN


class Random(Schedule):
    """Stand in with probability `rate` outside warm-up and tail (a control: no information at all)."""

    def __init__(self, rate: float, warmup: int, tail: int, seed: int) -> None:
        self.rate = rate
        self.warmup = warmup
        self.tail = tail
        self._random = random.Random(seed)

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Throw the dice."""
        drawn = self._random.random() < self.rate
        if step.n < self.warmup:
            return WARMUP
        if step.total is not None and step.n >= step.total - self.tail:
            return TAIL
        return Decision(True, "drawn") if drawn else Decision(False, "drawn")


class Criterion(Schedule):
    """A threshold on an error that accumulates over the stand-ins since the last computation.

    A step is computed during warm-up and at the tail (the sum starts anew), when the estimate is unknown (the sum is
    untouched), when it is not a finite number, and when the sum reaches the threshold (strictly below stands in).
    `shared` says whether all guidance branches share the decision, so that only the leading one starts the sum anew.
    """

    listens: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    def __init__(self, threshold: float, warmup: int, tail: int) -> None:
        self.threshold = threshold
        self.warmup = warmup
        self.tail = tail
        self.total = 0.0
        self.tested: list[float] = []
        self._notes: list[str] = []

    def numbers(self) -> str:
        """The smallest sum that was compared with the threshold."""
        if not self.tested:
            return f"no sum was compared with threshold={self.threshold:g}"
        return f"the smallest accumulated estimate was {min(self.tested):.4g}, against threshold={self.threshold:g}"

    def notes(self) -> Iterable[str]:
        """Steps whose statistic was not finite."""
        return self._notes

    @abstractmethod
    def estimate(self, step: Step, site: Site, call: Call) -> float | None:
        """Estimated relative change since the step before; None while unknown."""

    def seen(self, step: Step, call: Call) -> None:
        """Called after every decision, whatever it was."""

    def update(self, step: Step, site: Site, call: Call, out: Tensor, computed: bool) -> None:
        """A computed step starts the sum anew, also where the engine overruled the decision."""
        if computed and (step.leads or not self.shared):
            self.total = 0.0

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Compare the accumulated estimate with the threshold."""
        decision = self._decide(step, site, call)
        self.seen(step, call)
        return decision

    def _decide(self, step: Step, site: Site, call: Call) -> Decision:
        at_tail = step.total is not None and step.n >= step.total - self.tail
        if step.n < self.warmup or at_tail:
            self.total = 0.0
            return TAIL if at_tail and step.n >= self.warmup else WARMUP
        change = self.estimate(step, site, call)
        if change is None:
            return Decision(False, "no estimate yet")
        self.total += change
        if not self.total < float("inf"):  # also true of NaN
            self.total = 0.0
            self._notes.append(
                f"step {step.n}: the criterion read a value that is not finite, so the step was computed"
            )
            return Decision(False, "not finite")
        self.tested.append(self.total)
        if self.total < self.threshold:
            return Decision(True, "below threshold")
        self.total = 0.0
        return Decision(False, "threshold reached")


def mean_abs(x: Tensor) -> Tensor:
    """Mean of absolute values over all elements, as a scalar of at least float32 on the tensor's device."""
    return x.abs().mean() if x.dtype.itemsize >= 4 else x.float().abs_().mean()


class PerBranch(Schedule):
    """A schedule of its own for every guidance branch."""

    scope: ClassVar[Literal["step", "branch", "site"]] = "branch"
    listens: ClassVar[bool] = True

    def __init__(self, make: Callable[[], Schedule]) -> None:
        self._make = make
        self._parts: dict[str, Schedule] = {}

    def _part(self, step: Step) -> Schedule:
        if step.branch not in self._parts:
            self._parts[step.branch] = self._make()
        return self._parts[step.branch]

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Ask the branch's own schedule."""
        return self._part(step).decide(step, site, call)

    def update(self, step: Step, site: Site, call: Call, out: Tensor, computed: bool) -> None:
        """Tell the branch's own schedule."""
        self._part(step).update(step, site, call, out, computed)

    def tensors(self) -> Iterable[Tensor]:
        """What the parts keep."""
        return [tensor for part in self._parts.values() for tensor in part.tensors()]

    def numbers(self) -> str:
        """The numbers of every branch."""
        return "; ".join(f"{branch or 'run'}: {part.numbers()}" for branch, part in self._parts.items())

    def notes(self) -> Iterable[str]:
        """The notes of every branch."""
        return [note for part in self._parts.values() for note in part.notes()]


@dataclass(frozen=True)
class Refresh:
    """When something kept is renewed, from step `start` on (ProfilingDiT).

    Attributes:
        kind: "list", "uniform" or "formula".
        start: s0.
        steps: the list.
        interval: of "uniform".
        ends: T_max and T_min of "formula".
    """

    kind: Literal["list", "uniform", "formula"]
    start: int
    steps: tuple[int, ...] = ()
    interval: int = 1
    ends: tuple[float, float] = (1.0, 1.0)

    def due(self, n: int, total: int | None) -> bool:
        """Whether step `n` of `total` is a refresh step."""
        if self.kind == "list":
            return n in self.steps
        if self.kind == "uniform":
            return (n - self.start) % self.interval == 0
        assert total is not None
        return n in shrinking(self.start, total, *self.ends)


def interval_at(s: int, start: int, total: int, longest: float, shortest: float) -> float:
    """ProfilingDiT's T_s: `longest` at step `start`, `shortest` at step `total`, linear in between."""
    return longest - (longest - shortest) * (s - start) / (total - start)


def shrinking(start: int, total: int, longest: float, shortest: float) -> list[int]:
    """Refresh steps `start, ..., s, s + round(T_s), ...` below `total`; halves round to even, at least one step on."""
    steps, s = [], start
    while s < total:
        steps.append(s)
        s += max(1, round(interval_at(s, start, total, longest, shortest)))
    return steps


class Refreshed(Schedule):
    """Compute all until `start`, then every site at the refresh steps of its own rule."""

    scope: ClassVar[Literal["step", "branch", "site"]] = "site"

    def __init__(self, rules: Mapping[str, Refresh]) -> None:
        self.rules = rules

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Early, due, or stand in."""
        rule = self.rules[site.key]
        if step.n < rule.start:
            return WARMUP
        if rule.due(step.n, step.total):
            return LISTED if rule.kind == "list" else INTERVAL
        return STAND_IN
