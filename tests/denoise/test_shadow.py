"""Shadow mode: the truth beside every stand-in, without changing what the run does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import elision
from elision.denoise.methods.taylorseer import TaylorSeer
from elision.denoise.methods.uniform import Uniform
from tests.conformance.settings import ACTIVE, AFTER_GUIDANCE, STEPS, Options, apply, cases
from tests.models import Loop

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, ("flux", "dit", "unet")))
def test_shadow_changes_nothing_and_measures_everything(method: str, options: Options, kind: str) -> None:
    loop = Loop(kind)
    with apply(loop, method, options) as run:
        want = loop(steps=STEPS, mode="sequential", name=run.step)
    plain = run.report()
    with apply(loop, method, options, shadow=True) as run:
        out = loop(steps=STEPS, mode="sequential", name=run.step)
    report = run.report()
    assert torch.equal(out, want)
    assert report.strip() == plain.strip()
    for name in ("calls", "calls_elided", "outputs_computed", "outputs_stood_in", "flops_elided", "bytes_peak"):
        assert getattr(report, name) == getattr(plain, name), name
    assert plain.shadow == []
    assert report.shadow
    assert all(row.error >= 0 and row.error == row.error for row in report.shadow)
    assert any(row.error > 1e-4 for row in report.shadow)
    rows = {(row.run, row.n, row.branch, row.site) for row in report.shadow}
    assert len(rows) == len(report.shadow)
    assert report.last is not None
    after = method in AFTER_GUIDANCE  # tokens that are left out have no truth of their own
    elided = [s.n for s in report.last.steps if s.state != "computed" and not (after and s.state == "mixed")]
    assert sorted({row.n for row in report.shadow}) == elided
    assert sorted(report.shadow_by_step()) == elided
    assert {row.branch for row in report.shadow} == ({""} if after else {"cond", "uncond"})
    assert "shadow" in str(report)


def test_the_error_is_the_relative_distance_to_the_truth() -> None:
    """Against a hand-rolled one at the model: the truth at a step, given the latent that the cached run had."""
    loop = Loop("flux")
    inputs: list[tuple[Tensor, Tensor]] = []
    outputs: list[Tensor] = []
    real = loop.call

    def noting(x: Tensor, t: Tensor, *args: object) -> Tensor:
        inputs.append((x, t))
        outputs.append(real(x, t, *args))  # type: ignore[arg-type]
        return outputs[-1]

    loop.call = noting  # type: ignore[method-assign, assignment]
    with apply(loop, "uniform", {"interval": 3, "site": "model"}, shadow=True) as run:
        loop(steps=6)
    report = run.report()
    with torch.no_grad():
        truth = [real(x, t, loop.kind.inputs(1, 4, 10)) for x, t in inputs]
    want = [(n, float((o - v).norm() / v.norm())) for n, (o, v) in enumerate(zip(outputs, truth, strict=True))]
    assert [row.n for row in report.shadow] == [1, 2, 4, 5]
    assert [row.error for row in report.shadow] == pytest.approx([e for n, e in want if n % 3], rel=1e-5)
    assert [want[0][1], want[3][1]] == [0.0, 0.0]


def test_the_truth_of_a_constant_denoiser_is_met() -> None:
    class Constant(torch.nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return torch.ones_like(hidden_states) + 0 * timestep

    model = Constant()
    with elision.apply(model, "stale", interval=3, steps=4, shadow=True) as run:
        for t in (1.0, 0.7, 0.4, 0.1):
            model(torch.full((1, 4), 3.0), torch.tensor(t))
    assert [row.error for row in run.report().shadow] == [0.0, 0.0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "pair",
    [
        [Uniform(interval=4, site="stack"), TaylorSeer(interval=2, first_enhance=1)],
        [Uniform(interval=3, site="model"), TaylorSeer(interval=2, first_enhance=1)],
        [TaylorSeer(interval=4, first_enhance=1, site="head"), Uniform(interval=2)],
    ],
)
def test_shadow_of_an_outer_site_does_not_feed_the_inner_one(pair: list[elision.Method]) -> None:
    """While the truth of the stack is computed, methods on its branches must look away."""
    loop = Loop("flux")
    with elision.apply(loop, pair) as run:
        want = loop(steps=STEPS)
    plain = run.report()
    with elision.apply(loop, pair, shadow=True) as run:
        out = loop(steps=STEPS)
    report = run.report()
    assert torch.equal(out, want)
    assert report.strip() == plain.strip()  # type: ignore[attr-defined]
    assert report.outputs_computed == plain.outputs_computed  # type: ignore[attr-defined]
    assert report.outputs_stood_in == plain.outputs_stood_in  # type: ignore[attr-defined]


def test_reset_forgets_the_errors() -> None:
    loop = Loop("flux")
    with apply(loop, "uniform", {}, shadow=True) as run:
        loop(steps=4)
        assert run.report().shadow
        run.reset()
        assert run.report().shadow == []
        loop(steps=4)
    assert {row.run for row in run.report().shadow} == {0}
