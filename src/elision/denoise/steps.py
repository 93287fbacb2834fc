"""The clock of a run: which step, which branch, which rows.

Sources, in order: the scheduler's own `set_timesteps` and `step` (tapped by the engine), the metadata of diffusers'
`cache_context`, `steps=` given to `apply`, the timestep argument of the call. Call parity is never used.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor

from elision.errors import ClockError, OptionError


@dataclass(frozen=True, slots=True)
class Step:
    """Where a denoiser call stands.

    Attributes:
        n: ordinal of the step in this run, from 0 (warm-up counts use this).
        i: index into the full timestep grid, `n` plus the begin index of image-to-image runs (tables use this).
        total: steps of this run; None when nothing tells.
        t: timestep as the scheduler or the call has it.
        sigma: noise level of this step and
        next_sigma: of the next one, where the scheduler has them.
        branch: name of the guidance branch, empty where there is one call per step.
        leads: whether this branch owns the statistics that all branches of the step share.
        cond: the conditional rows of a call that carries both branches; None means all rows.
        run: number of the run since `apply`.
    """

    n: int
    i: int
    total: int | None
    t: float
    sigma: float | None = None
    next_sigma: float | None = None
    branch: str = ""
    leads: bool = True
    cond: slice | None = None
    run: int = 0

    @property
    def last(self) -> bool:
        """Whether this is the last step of the run (False when the total is unknown)."""
        return self.total is not None and self.n >= self.total - 1

    def rows(self, batch: int) -> dict[str, list[int]]:
        """The rows of a call that belong to the leading guidance branch ("cond") and to the others ("rest")."""
        everything = list(range(batch))
        if self.cond is None:
            return {"cond" if self.leads else "rest": everything}
        cond = everything[self.cond]
        return {"cond": cond, "rest": sorted(set(everything) - set(cond))}


@dataclass(frozen=True)
class Context:
    """What diffusers' `cache_context` (or `Applied.step`) said around a call."""

    name: str = ""
    step_index: int | None = None
    num_inference_steps: int | None = None
    timestep: float | None = None
    sigma: float | None = None


def step_names(scheduler: Any) -> tuple[str, ...]:
    """Parameter names of the scheduler class's own `step`."""
    return tuple(inspect.signature(type(scheduler).step).parameters)[1:]


def _number(value: Any) -> float | None:
    """First entry of a tensor or a plain number, as float."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return float(value.reshape(-1)[0]) if value.numel() else None
    return float(value)


def _length(steps: Any) -> int:
    """The number of steps that the user's `steps=` says: a number, or the timesteps."""
    if isinstance(steps, (bool, str)) or not (isinstance(steps, Integral) or hasattr(steps, "__len__")):
        raise OptionError(f"steps={steps!r} is neither a number of steps nor the list of timesteps")
    length = int(steps) if isinstance(steps, Integral) else len(steps)
    if length < 1:
        raise OptionError(f"steps={steps!r} is out of range; it must be at least 1, or name at least 1 timestep")
    return length


class Clock:
    """Counts steps from whatever source the call has, and finds where a run begins."""

    def __init__(self, steps: int | Sequence[float] | None = None, branches: Sequence[str] = ()) -> None:
        self.given = None if steps is None else _length(steps)
        self.branches = tuple(branches)
        if isinstance(branches, str) or len(set(self.branches)) != len(self.branches):
            raise OptionError(f"branches={branches!r} is no list of different names, as in ('cond', 'uncond')")
        self.context = Context()
        self.scheduler: Any = None
        self.cond: slice | None = None
        self.run = -1
        self.advanced = False  # whether the scheduler ever took a step
        self._fresh = self._late = False
        self._returned = 0
        self._index: int | None = None
        self.restart()

    def reset(self) -> None:
        """Make the next call the first of a new run, at the step where the scheduler stands if one is under way."""
        self._fresh = self._fresh or self._under_way
        self.restart()

    def restart(self) -> None:
        """Forget the run."""
        self._step: Step | None = None
        self._seen: set[str] = set()
        self._key: float | None = None
        self._direction = 0
        self._shape: tuple[int, ...] | None = None
        self._leader: str | None = None
        self._grid: list[float] = []
        self._sigmas: list[float] = []
        self._begin = 0

    # -- told by the scheduler taps ------------------------------------------------------------------------------

    def begin(self, late: bool = False) -> None:
        """`set_timesteps` returned: the next call starts a run.

        Args:
            late: the scheduler is only followed from now on, within the first denoiser call of the run. In
                `scheduler.step(model(...), ...)` Python has already looked `step` up, so that first one goes unseen.
        """
        self._fresh = True
        self._late = late
        self._returned = 0
        self._index = None

    def advance(self) -> None:
        """`scheduler.step` returned; once more for the same step where the pipeline had set the step index back."""
        index = getattr(self.scheduler, "step_index", None)
        again = index is not None and index == self._index
        self._late = False
        self.advanced = True
        self._index = index
        self._returned += not again

    @property
    def _under_way(self) -> bool:
        """Whether a scheduler tells the steps and has some left."""
        return bool(self._grid) and self._returned < len(self._grid) - self._begin

    # -- asked by the engine -------------------------------------------------------------------------------------

    @property
    def sigmas(self) -> Sequence[float]:
        """Noise levels of the full grid, one more than there are steps; empty where the scheduler has none."""
        return self._sigmas

    @property
    def pending(self) -> Step | None:
        """The step that a coming `scheduler.step` ends; None if the denoiser was not called for it."""
        step = self._step
        return step if step is not None and step.n == self._returned and not self._fresh else None

    def tick(self, timestep: Any, shape: Sequence[int]) -> tuple[Step, bool]:
        """The step of the call that is about to run, and whether it is the first of a new run.

        Args:
            timestep: the timestep argument of the call, None if it has none.
            shape: shape of the latent.

        Raises:
            ClockError: a second call in one step has no branch name.
        """
        if self._fresh or self._under_way:
            return self._tick_scheduler(timestep, tuple(shape))
        return self._tick_call(timestep, tuple(shape))

    def _tick_scheduler(self, timestep: Any, shape: tuple[int, ...]) -> tuple[Step, bool]:
        if self._late and not self._fresh and self._locate(_number(timestep)) == self._begin + 1:
            self.advance()
        first = self._step is None or self._step.n != self._returned  # later calls may have other shapes: branches
        new = self._fresh or (first and self._shape != shape)
        if new:
            self._fresh = False
            self.restart()
            self._shape = shape
            self._read_grid(timestep)
            self.run += 1
        n = self._returned
        if first:
            self._seen = set()
        elif self._name() is None:
            self._refuse("in one step (a step ends when scheduler.step returns)")
        i = n + self._begin
        sigma = self._sigmas[i] if i < len(self._sigmas) else None
        following = self._sigmas[i + 1] if i + 1 < len(self._sigmas) else None
        t = self._grid[i] if i < len(self._grid) else float("nan")
        return self._make(n, i, len(self._grid) - self._begin, t, sigma, following), new

    def _read_grid(self, timestep: Any) -> None:
        scheduler = self.scheduler
        self._grid = [float(t) for t in torch.as_tensor(scheduler.timesteps).tolist()]
        sigmas = getattr(scheduler, "sigmas", None)
        aligned = sigmas is not None and len(sigmas) in (len(self._grid), len(self._grid) + 1)
        self._sigmas = [float(s) for s in torch.as_tensor(sigmas).tolist()] if aligned else []
        begin = getattr(scheduler, "begin_index", None)
        if begin is None:
            begin = max(0, self._locate(_number(timestep)) - self._returned)
        self._begin = int(begin)

    def _locate(self, t: float | None) -> int:
        """Where an image-to-image run enters the grid when the scheduler was not told; 0 if `t` is not on it.

        Flow pipelines feed the network t / 1000, so 1.0 may be the first timestep of a grid or its last: the earlier
        one is meant. The tolerance covers times in bfloat16.
        """
        found: list[int] = []
        for scale in (1.0, 1000.0) if t is not None and self._grid else ():
            assert t is not None
            gaps = [abs(entry - t * scale) for entry in self._grid]
            nearest = min(range(len(gaps)), key=gaps.__getitem__)
            if gaps[nearest] <= 2.5e-3 * max(1.0, abs(self._grid[nearest])):
                found.append(nearest)
        return min(found, default=0)

    def _tick_call(self, timestep: Any, shape: tuple[int, ...]) -> tuple[Step, bool]:
        context = self.context
        key = float(context.step_index) if context.step_index is not None else _number(timestep)
        previous = self._step
        total = context.num_inference_steps or self.given
        new = previous is None or self._shape != shape or self._grid != []
        same = not new and (key == self._key or key is None)
        if not new and not same:
            assert previous is not None
            n = previous.n + 1
            way = 0 if key is None or self._key is None else (1 if key > self._key else -1)
            turned = self._direction != 0 and way not in (0, self._direction)
            new = turned or (total is not None and n >= total)
            self._direction = self._direction or way
        elif same and self._name() is None:
            assert previous is not None
            if key is None and total is None:
                raise ClockError(
                    "the denoiser is called without a timestep, so steps and runs cannot be told apart: pass steps="
                )
            done = context.step_index is not None or (total is not None and previous.n + 1 >= total)
            if key is not None and not done and not self.branches and not (context.name and total is not None):
                self._refuse("at one timestep" if total is not None else "at one timestep without steps=")
            n, new, same = previous.n + 1, done, False
        else:
            n = 0 if previous is None else previous.n
        if new:
            self.restart()
            self._shape = shape
            self.run += 1
            n = 0
        elif not same:
            self._seen = set()
        self._key = key
        t = context.timestep if context.timestep is not None else (float("nan") if key is None else key)
        if context.step_index is not None:
            n = context.step_index
        return self._make(n, n, total, t, context.sigma, None), new

    def _make(self, n: int, i: int, total: int | None, t: float, sigma: float | None, following: float | None) -> Step:
        branch = self._name() or ""
        self._seen.add(branch)
        if self._leader is None and (not branch.removeprefix("pred_").startswith(("uncond", "neg")) or n > 0):
            self._leader = branch
        self._step = Step(n, i, total, t, sigma, following, branch, branch == self._leader, self.cond, self.run)
        return self._step

    def _name(self) -> str | None:
        """The branch of the coming call: its context's, else the next of `branches`; None if it had its turn."""
        if self.context.name or not self.branches:
            return None if self.context.name in self._seen else self.context.name
        left = self.branches[len(self._seen) :]
        return left[0] if left else None

    def _refuse(self, where: str) -> NoReturn:
        name = self.context.name
        if self.branches and not name:
            raise ClockError(f"more than the {len(self.branches)} calls of branches={self.branches!r} {where}")
        what = f"branch {name!r} was called twice {where}" if name else f"a second call {where} has no branch name"
        raise ClockError(
            f"{what}: with guidance in two calls, wrap each in model.cache_context('cond') / ('uncond') "
            "or in `with run.step('cond'):` / `with run.step('uncond'):`, or say their order, as in "
            "apply(..., branches=('cond', 'uncond')); after a run that broke off call run.reset()"
        )
