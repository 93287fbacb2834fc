"""Predictors and schedules on their own: closed forms and equivalences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from elision.denoise.policy import Predictor
from elision.denoise.predictors import Affine, Decay, Residual, Reuse, Taylor
from elision.denoise.schedules import Interval, PerBranch, Random, SiteSteps, Steps
from elision.denoise.sites import Call, Site, common
from elision.denoise.steps import Step

SITE = Site("x", "branch", "x")
CALL = Call(torch.zeros(1), (), (), {}, nn.Identity())


def at(n: int, total: int | None = 30, branch: str = "") -> Step:
    return Step(n, n, total, 0.0, branch=branch)


def see(predictor: Predictor, n: int, x: Tensor, out: Tensor) -> None:
    predictor.observe(at(n), x, CALL, out, True)


def test_reuse_keeps_the_last_or_the_first() -> None:
    last, first = Reuse(), Reuse(first=True)
    for predictor in (last, first):
        assert not predictor.ready(at(0))
        for n in range(3):
            see(predictor, n, torch.zeros(1), torch.tensor([float(n)]))
    assert last.predict(at(3), torch.zeros(1), CALL).item() == 2.0
    assert first.predict(at(3), torch.zeros(1), CALL).item() == 0.0


def test_decay_and_affine() -> None:
    decay = Decay(lambda step, last: 0.5 ** (step.n - last.n))
    see(decay, 2, torch.zeros(1), torch.tensor([8.0]))
    assert decay.predict(at(5), torch.zeros(1), CALL).item() == 1.0
    affine = Affine(lambda step: float(step.n), lambda step: torch.tensor([10.0]))
    see(affine, 0, torch.zeros(1), torch.tensor([2.0]))
    assert affine.predict(at(3), torch.zeros(1), CALL).item() == 16.0
    for predictor in (decay, affine):
        assert [t.numel() for t in predictor.tensors()] == [1]


@pytest.mark.parametrize(
    ("x_shape", "out_shape"),
    [((2, 4, 3, 3), (2, 4, 3, 3)), ((2, 6, 3, 3), (2, 4, 3, 3)), ((2, 4, 3, 3), (2, 8, 3, 3)), ((2, 5, 7), (2, 5, 7))],
)
def test_residual_on_common_channels(x_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
    """What both have moves with the input; what only the output has is reused; what only the input has is left out."""
    torch.manual_seed(0)
    x, out, later = torch.randn(x_shape), torch.randn(out_shape), torch.randn(x_shape)
    residual = Residual(Reuse())
    see(residual, 0, x, out)
    got = residual.predict(at(1), later, CALL)
    assert got.shape == out.shape
    expected = out.clone()
    common(x, expected)[1].add_(common(later, out)[0] - common(x, out)[0])
    torch.testing.assert_close(got, expected)
    assert torch.equal(residual.predict(at(1), x, CALL).round(decimals=5), out.round(decimals=5))


def test_residual_of_taylor_is_exact_for_linear_residuals() -> None:
    predictor = Residual(Taylor(1))
    f = lambda n: torch.full((1, 2, 2), 3.0 * n - 1)  # noqa: E731
    xs = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for n in (0, 2):
        see(predictor, n, xs[n], xs[n] + f(n))
    torch.testing.assert_close(predictor.predict(at(5), xs[5], CALL), xs[5] + f(5))
    assert predictor.kind == "predicted"


@given(interval=st.integers(1, 9), warmup=st.integers(1, 9), total=st.integers(1, 40))
def test_interval_is_the_closed_form(interval: int, warmup: int, total: int) -> None:
    schedule = Interval(interval, warmup)
    computed = [n for n in range(total) if not schedule.decide(at(n), SITE, CALL).stand_in]
    assert computed == [n for n in range(total) if n < warmup or (n - warmup + 1) % interval == 0]


def test_lists() -> None:
    schedule = Steps([0, 3])
    assert [schedule.decide(at(n), SITE, CALL).stand_in for n in range(5)] == [False, True, True, False, True]
    assert schedule.complaint(30) is None
    assert "none of the listed steps" in str(Steps([40]).complaint(30))
    per_site = SiteSteps({"x": [0], "y": [0, 1]})
    other = Site("y", "branch", "y")
    assert per_site.decide(at(1), SITE, CALL).stand_in
    assert not per_site.decide(at(1), other, CALL).stand_in


@given(rate=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_random_draws_the_same_in_every_run(rate: float, seed: int) -> None:
    draws = []
    for _ in range(2):
        schedule = Random(rate, warmup=2, tail=1, seed=seed)
        draws.append([schedule.decide(at(n, 30), SITE, CALL).stand_in for n in range(30)])
    assert draws[0] == draws[1]
    assert not any(draws[0][:2])
    assert not draws[0][-1]
    assert sum(draws[0]) == (27 if rate == 1.0 else 0 if rate == 0.0 else sum(draws[0]))


def test_per_branch_keeps_branches_apart() -> None:
    schedule = PerBranch(lambda: Interval(2))
    seen = [schedule.decide(at(n, branch=b), SITE, CALL).stand_in for n in range(3) for b in ("cond", "uncond")]
    assert seen == [False, False, True, True, False, False]
