"""The clock of denoisers that no scheduler is with: metadata, `steps=`, the time of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import elision
from elision.errors import ClockError, OptionError
from tests.denoise.clocks import Net, ns, watched
from tests.models import Loop

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


def test_metadata_tells_a_bare_denoiser() -> None:
    net = Net()
    with watched(net) as (_, steps):
        for run in range(2):
            for i in range(3):
                for name in ("cond", "uncond"):
                    with net.cache_context(name, step_index=i, num_inference_steps=3, timestep=9 - i, sigma=0.5):
                        net(torch.zeros(1, 4), torch.tensor(1.0))  # the argument says nothing
            assert steps[-1].run == run
    assert [(s.n, s.total, s.t, s.sigma) for s in steps[:6]] == [(i, 3, 9.0 - i, 0.5) for i in range(3) for _ in "cu"]
    assert [s.last for s in steps[:6]] == [False] * 4 + [True] * 2


def test_metadata_of_step_zero_again_is_a_new_run() -> None:
    """A run that broke off after its first step leaves nothing to the next one."""
    net = Net()
    with watched(net) as (_, steps):
        for i in (0, 0, 1, 2, 0, 1):
            with net.cache_context("cond", step_index=i, num_inference_steps=3):
                net(torch.zeros(1, 4), torch.tensor(1.0))
    assert ns(steps) == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]


def test_wan_pipelines_pass_metadata_as_tensors() -> None:
    net = Net()
    with watched(net) as (_, steps), net.cache_context("cond", step_index=2, timestep=torch.tensor(7)):
        net(torch.zeros(1, 4), torch.tensor(7.0))
    assert (steps[0].t, steps[0].n) == (7.0, 2)


@pytest.mark.parametrize("given", [4, [1.0, 0.75, 0.5, 0.25], torch.linspace(1, 0, 4), np.int64(4)])
@pytest.mark.parametrize("names", [("",), ("cond", "uncond")])
def test_steps_tells_where_a_run_ends(given: Any, names: Sequence[str]) -> None:
    net = Net()
    with watched(net, steps=given) as (run, steps):
        for _ in range(2):
            for t in (1.0, 0.75, 0.5, 0.25):
                for name in names:
                    with run.step(name) if name else contextlib.nullcontext():
                        net(torch.zeros(1, 4), torch.tensor([t]))
    assert ns(steps) == [(r, n) for r in range(2) for n in range(4) for _ in names]
    assert {s.total for s in steps} == {4}


def test_steps_makes_repeated_timesteps_countable() -> None:
    """Heun on a bare denoiser: the same time twice is two steps where the branch has a name and the total is known."""
    net = Net()
    with watched(net, steps=5) as (run, steps):
        for _ in range(2):
            for t in (1.0, 0.5, 0.5, 0.25, 0.25):
                with run.step("cond"):
                    net(torch.zeros(1, 4), torch.tensor([t]))
    assert ns(steps) == [(r, n) for r in range(2) for n in range(5)]


def test_repeated_timesteps_without_a_total_are_not_guessed() -> None:
    """It may be Heun's second stage, or a run of one step done twice."""
    net = Net()
    with watched(net) as (run, _):
        for again in (False, True):
            refused = pytest.raises(ClockError, match="steps=") if again else contextlib.nullcontext()
            with run.step("cond"), refused:
                net(torch.zeros(1, 4), torch.tensor([1.0]))


@pytest.mark.parametrize("times", [(1.0, 0.7, 0.3), (0.0, 0.4, 0.9), (1.0, 0.5)])
def test_the_timestep_argument_tells_of_a_new_run(times: Sequence[float]) -> None:
    net = Net()
    with watched(net) as (_, steps):
        for _ in range(3):
            for t in times:
                net(torch.zeros(1, 4), torch.tensor(t))
    assert ns(steps) == [(r, n) for r in range(3) for n in range(len(times))]
    assert {s.total for s in steps} == {None}
    assert not any(s.last for s in steps)


def test_a_new_shape_is_a_new_run() -> None:
    net = Net()
    with watched(net) as (_, steps):
        for size in (2, 3):
            for t in (1.0, 0.5):
                net(torch.zeros(1, size), torch.tensor(t))
    assert ns(steps) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_denoiser_without_time_counts_its_calls() -> None:
    with watched(nn.Identity(), steps=2) as (_, steps):
        pass
    net = nn.Identity()
    with watched(net, steps=2) as (_, steps):
        for _ in range(6):
            net(torch.zeros(1, 4))
    assert ns(steps) == [(r, n) for r in range(3) for n in range(2)]


def test_a_bare_transformer_in_a_pipeline_still_knows() -> None:
    """Applying to `pipe.transformer` loses the scheduler, and says so where it matters."""
    loop = Loop("flux")
    with pytest.raises(OptionError, match="steps="):
        elision.apply(loop.transformer, "easycache")  # type: ignore[attr-defined]
    with elision.apply(loop.transformer, "uniform", steps=6) as run:  # type: ignore[attr-defined]
        loop(steps=6, mode="sequential")
        loop(steps=6, mode="sequential", seed=1)
    report = run.report()
    assert [len(r.steps) for r in report.runs] == [6, 6]  # type: ignore[attr-defined]


@settings(max_examples=80, deadline=None)
@given(
    totals=st.lists(st.integers(2, 6), min_size=1, max_size=4),
    names=st.sampled_from([("",), ("cond", "uncond"), ("uncond", "cond")]),
    up=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_loops_without_a_scheduler(totals: list[int], names: Sequence[str], up: bool, seed: int) -> None:
    """Descending or ascending times of runs of at least two steps, each complete."""
    numbers = np.random.default_rng(seed)
    net = Net()
    want: list[tuple[int, int, str]] = []
    with watched(net) as (run, steps):
        for r, total in enumerate(totals):
            inside = sorted(0.1 + 0.8 * numbers.random(total - 2).astype(np.float32))
            times = [0.0, *inside, 1.0] if up else [1.0, *reversed(inside), 0.0]
            for n, t in enumerate(times):
                for name in names:
                    with run.step(name) if name else contextlib.nullcontext():
                        net(torch.zeros(1, 4), torch.tensor(float(t)))
                    want.append((r, n, name))
    assert [(s.run, s.n, s.branch) for s in steps] == want
