"""The clock: every source of the step, in order, and what it refuses to guess."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from elision.denoise.steps import Clock, Context
from elision.errors import ClockError, ElisionWarning
from tests.denoise.clocks import Net, ns, watched
from tests.models import Loop, draw

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


@dataclass
class Pipe:
    """A pipeline of nothing but its parts."""

    scheduler: Any = field(default_factory=FlowMatchEulerDiscreteScheduler)
    transformer: nn.Module = field(default_factory=Net)

    def __call__(self, steps: int = 4, names: Sequence[str] = ("",), shape: tuple[int, ...] = (1, 4, 2, 2)) -> None:
        self.scheduler.set_timesteps(steps)
        x = torch.zeros(shape)
        for t in self.scheduler.timesteps:
            for name in names:
                with self.transformer.cache_context(name) if name else contextlib.nullcontext():  # type: ignore[operator]
                    v = self.transformer(x, t.expand(len(x)))
            x = self.scheduler.step(v, t, x)[0]


SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    DDIMScheduler,
    UniPCMultistepScheduler,
]


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("names", [("",), ("cond", "uncond"), ("uncond", "cond")])
def test_scheduler_tells_step_total_time_and_sigma(make: Any, names: Sequence[str]) -> None:
    pipe = Pipe(make())
    with watched(pipe) as (_, steps):
        pipe(4, names)
        timesteps = [float(t) for t in pipe.scheduler.timesteps]
        pipe(3, names)
    total = len(timesteps)
    first = steps[: total * len(names)]
    assert [s.n for s in first] == [n for n in range(total) for _ in names]
    assert [s.i for s in first] == [s.n for s in first]
    assert [s.t for s in first] == [t for t in timesteps for _ in names]
    assert {s.total for s in first} == {total}
    assert [s.branch for s in first] == list(names) * total
    assert {s.run for s in first} == {0}
    assert [s.last for s in first] == [s.n == total - 1 for s in first]
    assert {s.run for s in steps[len(first) :]} == {1}
    assert steps[len(first)].n == 0
    if make is FlowMatchEulerDiscreteScheduler:
        assert [s.sigma for s in first] == pytest.approx([t / 1000 for t in timesteps for _ in names])
        assert first[-1].next_sigma == 0.0
        assert all(a.next_sigma == b.sigma for a, b in zip(first, first[len(names) :], strict=False) if a.n < b.n)
    if make is DDIMScheduler:
        assert {s.sigma for s in first} == {None}


def test_heun_repeats_timesteps_and_every_one_is_a_step() -> None:
    pipe = Pipe(HeunDiscreteScheduler())
    with watched(pipe) as (_, steps):
        pipe(4)
    assert len(steps) == 7
    assert len({s.t for s in steps}) == 4
    assert [s.n for s in steps] == list(range(7))


def test_a_step_that_is_taken_twice_is_one() -> None:
    """Cosmos asks the scheduler for the denoised latent first, sets its index back, and then steps."""
    pipe = Pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with watched(pipe) as (run, steps):
        pipe.scheduler.set_timesteps(3)
        x = torch.zeros(1, 4, 2, 2)
        for t in pipe.scheduler.timesteps:
            v = pipe.transformer(x, t)
            pipe.scheduler.step(v, t, x)
            pipe.scheduler._step_index -= 1
            x = pipe.scheduler.step(v, t, x).prev_sample
    assert [s.n for s in steps] == [0, 1, 2]
    assert run.report().run_count == 1


@pytest.mark.parametrize("steps_given", [None, 17])
def test_scheduler_comes_before_metadata_and_steps(steps_given: int | None) -> None:
    pipe = Pipe()
    pipe.scheduler.set_timesteps(3)
    with watched(pipe, steps=steps_given) as (_, steps):
        pipe.scheduler.set_timesteps(3)
        for t in pipe.scheduler.timesteps:
            with pipe.transformer.cache_context("cond", step_index=40, num_inference_steps=99):  # type: ignore[operator]
                pipe.transformer(torch.zeros(1, 4, 2, 2), t)
            pipe.scheduler.step(torch.zeros(1, 4, 2, 2), t, torch.zeros(1, 4, 2, 2))
    assert [(s.n, s.total, s.branch) for s in steps] == [(0, 3, "cond"), (1, 3, "cond"), (2, 3, "cond")]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("begin", [0, 1, 5, 7])
def test_image_to_image_counts_from_zero_and_indexes_the_grid(told: bool, scale: float, begin: int) -> None:
    """n counts the steps of the run, i indexes the grid; the begin is read from the scheduler or found by timestep."""
    pipe = Pipe(FlowMatchEulerDiscreteScheduler(shift=12.0))
    with watched(pipe) as (_, steps):
        pipe.scheduler.set_timesteps(8)
        if told:
            pipe.scheduler.set_begin_index(begin)
        x = torch.zeros(1, 4, 2, 2)
        for t in pipe.scheduler.timesteps[begin:]:
            v = pipe.transformer(x, (t / scale).expand(1))
            x = pipe.scheduler.step(v, t, x)[0]
        grid = [float(t) for t in pipe.scheduler.timesteps]
    assert [s.n for s in steps] == list(range(8 - begin))
    assert [s.i for s in steps] == list(range(begin, 8))
    assert [s.t for s in steps] == grid[begin:]
    assert {s.total for s in steps} == {8 - begin}
    assert [s.last for s in steps] == [False] * (7 - begin) + [True]


@pytest.mark.parametrize("begin", [0, 1, 2, 40, 98])
def test_the_begin_is_found_on_a_dense_grid(begin: int) -> None:
    """With a large shift, neighbours at the noisy end differ by less than a thousandth."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
    scheduler.set_timesteps(100)
    clock = Clock()
    clock.scheduler = scheduler
    clock.begin()
    step, new = clock.tick(scheduler.timesteps[begin] / 1000, (1, 4))
    assert (step.i, step.n, new) == (begin, 0, True)


def test_timesteps_set_before_apply_are_known() -> None:
    """A hand-written loop may set the scheduler up first and apply just around the loop."""
    pipe = Pipe()
    pipe.scheduler.set_timesteps(5)
    x = torch.zeros(1, 4, 2, 2)
    with watched(pipe) as (_, steps):
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.transformer(x, t), t, x)[0]
    assert [(s.n, s.total) for s in steps] == [(n, 5) for n in range(5)]


@pytest.mark.parametrize("make", [FlowMatchEulerDiscreteScheduler, DDIMScheduler])
def test_a_swapped_scheduler_is_followed(make: Any) -> None:
    """Users assign another scheduler between calls, and back; a swapped-out one no longer counts."""
    pipe = Pipe()
    first, second = pipe.scheduler, make()
    with watched(pipe) as (_, steps):
        for n, scheduler in ((4, first), (3, second), (4, first), (5, second)):
            pipe.scheduler = scheduler
            pipe(n, ("cond", "uncond"))
    want = [(run, n) for run, total in enumerate((4, 3, 4, 5)) for n in range(total) for _ in range(2)]
    assert ns(steps) == want
    assert [s.total for s in steps] == [t for t in (4, 3, 4, 5) for _ in range(2 * t)]
    for scheduler in (first, second):
        assert "step" not in vars(scheduler)
        assert "set_timesteps" not in vars(scheduler)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, DDIMScheduler])
def test_a_swapped_scheduler_whose_step_was_looked_up_first(make: Any, dtype: torch.dtype) -> None:
    """In `scheduler.step(model(x), t, x)` the method is looked up before the call that notices the swap."""
    pipe = Pipe()
    with watched(pipe) as (_, steps):
        pipe(2)
        pipe.scheduler = make()
        for _ in range(2):
            pipe.scheduler.set_timesteps(5)
            x = torch.zeros(1, 4, 2, 2)
            scale = 1000 if make is FlowMatchEulerDiscreteScheduler else 1
            for t in pipe.scheduler.timesteps:
                x = pipe.scheduler.step(pipe.transformer(x, (t / scale).to(dtype)), t, x)[0]
        total = len(pipe.scheduler.timesteps)
    assert ns(steps[2:]) == [(run, n) for run in (1, 2) for n in range(total)]
    assert {s.total for s in steps[2:]} == {total}


def test_a_swapped_out_scheduler_that_somebody_else_uses_is_not_ours() -> None:
    one, other = Pipe(), Pipe()
    with watched(one) as (_, steps):
        one(2)
        one.scheduler, other.scheduler = DDIMScheduler(), one.scheduler
        one.scheduler.set_timesteps(3)
        x = torch.zeros(1, 4, 2, 2)
        for t in one.scheduler.timesteps:
            other(2)
            x = one.scheduler.step(one.transformer(x, t), t, x)[0]
    assert ns(steps) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def test_two_pipelines_interleaved_step_by_step() -> None:
    pipes = [Pipe(), Pipe(DDIMScheduler())]
    with watched(pipes[0]) as (_, one), watched(pipes[1]) as (_, two):
        x = torch.zeros(1, 4, 2, 2)
        for pipe, total in zip(pipes, (4, 6), strict=True):
            pipe.scheduler.set_timesteps(total)
        for n in range(6):
            for pipe in pipes:
                if n < len(pipe.scheduler.timesteps):
                    t = pipe.scheduler.timesteps[n]
                    pipe.scheduler.step(pipe.transformer(x, t), t, x)
    assert ns(one) == [(0, n) for n in range(4)]
    assert ns(two) == [(0, n) for n in range(6)]
    assert {s.total for s in one} == {4}
    assert {s.total for s in two} == {6}


def test_a_second_unnamed_call_is_refused_and_says_how_to_name_it() -> None:
    pipe = Pipe()
    with watched(pipe), pytest.raises(ClockError, match=r"cache_context\('cond'\).*run\.step\('cond'\)"):
        pipe(4, ("", ""))
    with watched(pipe), pytest.raises(ClockError, match="'cond' was called twice in one step"):
        pipe(4, ("cond", "cond"))
    with watched(pipe.transformer), pytest.raises(ClockError, match=r"run\.step"):
        pipe(4, ("", ""))


def test_a_second_unnamed_call_of_another_shape_is_refused_too() -> None:
    """Skip-layer guidance calls the denoiser once more with half the batch: no new run, no guess."""
    pipe = Pipe()
    with watched(pipe):
        pipe.scheduler.set_timesteps(3)
        pipe.transformer(torch.zeros(2, 4, 2, 2), pipe.scheduler.timesteps[0])
        with pytest.raises(ClockError, match=r"run\.step"):
            pipe.transformer(torch.zeros(1, 4, 2, 2), pipe.scheduler.timesteps[0])
    with watched(pipe) as (run, steps):
        pipe.scheduler.set_timesteps(3)
        for t in pipe.scheduler.timesteps:
            pipe.transformer(torch.zeros(2, 4, 2, 2), t)
            with run.step("skip"):
                pipe.transformer(torch.zeros(1, 4, 2, 2), t)
            pipe.scheduler.step(torch.zeros(2, 4, 2, 2), t, torch.zeros(2, 4, 2, 2))
    assert [(s.run, s.n, s.branch) for s in steps] == [(0, n, b) for n in range(3) for b in ("", "skip")]


def test_a_shape_that_changes_from_step_to_step_starts_anew_at_that_step() -> None:
    """Progressive resolution: what was kept no longer fits, but the schedule goes on."""
    pipe = Pipe()
    with watched(pipe) as (_, steps):
        pipe.scheduler.set_timesteps(4)
        for n, t in enumerate(pipe.scheduler.timesteps):
            x = torch.zeros(1, 4, 2 + 2 * (n // 2), 2)
            pipe.scheduler.step(pipe.transformer(x, t), t, x)
    assert ns(steps) == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert [s.i for s in steps] == [0, 1, 2, 3]
    assert {s.total for s in steps} == {4}


def test_run_step_names_branches_and_ends() -> None:
    pipe = Pipe(transformer=nn.Identity())
    with watched(pipe) as (run, steps):
        pipe.scheduler.set_timesteps(2)
        x = torch.zeros(1, 4, 2, 2)
        for t in pipe.scheduler.timesteps:
            for name in ("cond", "uncond"):
                with run.step(name):
                    pipe.transformer(x)
            pipe.scheduler.step(x, t, x)
        with pytest.raises(RuntimeError), run.step("cond"):
            raise RuntimeError
        assert run.clock.context == Context()
        with run.step("outer"):
            with run.step("inner"):
                assert run.clock.context.name == "inner"
            assert run.clock.context.name == "outer"
    assert [(s.n, s.branch, s.leads) for s in steps] == [
        (0, "cond", True),
        (0, "uncond", False),
        (1, "cond", True),
        (1, "uncond", False),
    ]


@pytest.mark.parametrize(
    ("names", "leader"),
    [
        (("cond", "uncond"), "cond"),
        (("uncond", "cond"), "cond"),
        (("uncond", "text", "cond"), "text"),
        (("negative", "positive"), "positive"),
        (("pred_uncond", "pred_cond"), "pred_cond"),
        (("",), ""),
        (("cond_uncond",), "cond_uncond"),
    ],
)
def test_who_leads(names: Sequence[str], leader: str) -> None:
    pipe = Pipe()
    with watched(pipe) as (_, steps):
        pipe(3, names)
    assert {s.branch for s in steps if s.leads} == {leader}
    assert sum(s.leads for s in steps) == 3


@pytest.mark.parametrize(
    ("kind", "given", "want"),
    [
        ("flux", None, slice(2, None)),
        ("dit", None, slice(None, 2)),
        ("unet", None, None),
        ("unet", slice(2, None), slice(2, None)),
        ("dit", slice(0, 1), slice(0, 1)),
    ],
)
def test_conditional_rows(kind: str, given: slice | None, want: slice | None) -> None:
    loop = Loop(kind)
    with watched(loop, cond=given) as (_, steps):
        loop(steps=3, batch=2, mode="batched")
        assert {(s.cond is None, s.cond and s.cond.start, s.cond and s.cond.stop) for s in steps} == {
            (want is None, want and want.start, want and want.stop)
        }
        steps.clear()
        if given is None:
            loop(steps=3, batch=2, mode="distilled")
            assert steps
            assert all(s.cond is None for s in steps)


def test_rows_are_not_taken_from_one_branch_of_two() -> None:
    """Two samples from one seed in a named branch are two samples, not two branches."""
    pipe = Pipe(transformer=Loop("flux").model)
    x = draw(1, 16, 4, seed=0).repeat(2, 1, 1)
    inputs = Loop("flux").kind.inputs(2, 4, 0)
    with watched(pipe) as (run, steps):
        pipe.scheduler.set_timesteps(1)
        for name in ("cond", "uncond"):
            with run.step(name), torch.no_grad():
                pipe.transformer(x, timestep=torch.ones(2), **inputs)
    assert [s.cond for s in steps] == [None, None]


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Runs of a pipeline: set up, steps with some branches, sometimes broken off, sometimes at another size."""
    events: list[tuple[str, Any]] = []
    for _ in range(draw(st.integers(1, 4))):
        total = draw(st.integers(1, 5))
        done = draw(st.integers(0, total)) if draw(st.booleans()) else total
        names = draw(st.sampled_from([("",), ("cond", "uncond"), ("uncond", "cond"), ("a", "b", "c")]))
        events.append(("run", (total, done, names, draw(st.sampled_from([2, 4])), draw(st.integers(0, total - 1)))))
    return events


@settings(max_examples=80, deadline=None)
@given(plan=plans(), which=st.sampled_from(SCHEDULERS))
def test_random_loops_with_a_scheduler(plan: list[tuple[str, Any]], which: Any) -> None:
    pipe = Pipe(which())
    want: list[tuple[int, int, int, int, str]] = []
    run_number = -1
    with watched(pipe) as (_, steps):
        for _, (total, done, names, size, begin) in plan:
            pipe.scheduler.set_timesteps(total)
            grid = pipe.scheduler.timesteps
            begin = begin if hasattr(pipe.scheduler, "set_begin_index") else 0
            if begin:
                pipe.scheduler.set_begin_index(begin)
            live = list(grid[begin:])[:done]
            run_number += bool(live)
            x = torch.zeros(1, 4, size, 2)
            for n, t in enumerate(live):
                for name in names:
                    with pipe.transformer.cache_context(name) if name else contextlib.nullcontext():  # type: ignore[operator]
                        v = pipe.transformer(x, t.expand(1))
                    want.append((run_number, n, n + begin, len(grid) - begin, name))
                x = pipe.scheduler.step(v, t, x)[0]
    assert [(s.run, s.n, s.i, s.total, s.branch) for s in steps] == want


def test_the_recorder_is_expected_to_warn_outside_fit() -> None:
    """The session of these tests elides nothing, which an ordinary session says."""
    pipe = Pipe()
    with pytest.warns(ElisionWarning, match="elided nothing in 4 steps"), watched(pipe):
        pipe(4)
