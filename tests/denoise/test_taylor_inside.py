"""TaylorSeer's predictor inside the decisions of EasyCache and TeaCache: what stands in, step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from elision.denoise.predictors import Taylor
from tests.conformance.settings import STEPS, apply
from tests.models import Loop

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


class Noting(Loop):
    """Keeps what goes into the denoiser and what comes out, step by step."""

    def predict(self, x: Tensor, *args: Any) -> Tensor:
        out = super().predict(x, *args)
        self.seen: list[tuple[Tensor, Tensor]] = [*getattr(self, "seen", []), (x, out)]
        return out


@pytest.mark.parametrize("order", [1, 2])
def test_easycache_with_an_expansion_of_its_residual(order: int) -> None:
    """v = x + sum_i D_i k^i / i!, with D_i the differences of residuals over the gaps of computed steps."""
    loop = Noting("flux")
    with apply(loop, "easycache", {"threshold": 0.6, "warmup_steps": 3, "order": order}) as run:
        loop(steps=2 * STEPS)
    letters = run.report().strip()
    assert letters.count("p") >= 3
    factors: list[Tensor] = []
    last = 0
    for n, ((x, v), letter) in enumerate(zip(loop.seen, letters, strict=True)):
        if letter == "C":
            fresh = [v - x]
            for i in range(min(order, len(factors))):
                fresh.append((fresh[i] - factors[i]) / (n - last))
            factors, last = fresh, n
        else:
            want = x + sum(f * (n - last) ** i / math.factorial(i) for i, f in enumerate(factors))
            assert torch.allclose(v, want, atol=1e-5), n


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("easycache", {"threshold": 0.6, "warmup_steps": 2}),
        ("teacache", {"threshold": 0.5, "coefficients": (1.0, 0.0)}),
    ],
)
def test_order_zero_is_reuse_and_decisions_before_the_first_stand_in_stay(method: str, options: dict[str, Any]) -> None:
    loop = Loop("flux")
    outs, letters = [], []
    for order in (None, 0, 1):
        with apply(loop, method, options if order is None else {**options, "order": order}) as run:
            outs.append(loop(steps=STEPS))
        letters.append(run.report().strip())
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert letters[0] == letters[1]
    first = letters[0].index("r")
    assert letters[2][: first + 1] == letters[0][:first] + "p"


def test_teacache_keeps_the_expansion_of_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The predictor is TaylorSeer's own, told of computed steps only."""
    told: list[int] = []
    update = Taylor.update
    monkeypatch.setattr(Taylor, "update", lambda self, n, value: (told.append(n), update(self, n, value))[1])
    loop = Loop("flux")
    with apply(loop, "teacache", {"threshold": 0.5, "coefficients": (1.0, 0.0), "order": 1}) as run:
        loop(steps=STEPS)
    assert told == [n for n, letter in enumerate(run.report().strip()) if letter == "C"]
