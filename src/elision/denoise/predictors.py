"""Predictors: how an output is stood in for. Each is a few lines of tensor algebra on one stream of one site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elision.denoise.policy import Predictor
from elision.denoise.sites import Call, channel_axis, common
from elision.denoise.steps import Step

Kind = Literal["reused", "predicted"]


class Reuse(Predictor):
    """The last computed output, as it was; with `first` the first one of the run forever (the `stale` control)."""

    def __init__(self, first: bool = False) -> None:
        self._first = first
        self._value: Tensor | None = None

    def ready(self, step: Step) -> bool:
        """Whether something was computed."""
        return self._value is not None

    def observe(self, step: Step, x: Tensor, call: Call, out: Tensor, computed: bool) -> None:
        """Keep a computed output."""
        if computed and not (self._first and self._value is not None):
            self._value = out.detach()

    def predict(self, step: Step, x: Tensor, call: Call) -> Tensor:
        """The kept output."""
        assert self._value is not None
        return self._value

    def tensors(self) -> Iterable[Tensor]:
        """The kept output."""
        return () if self._value is None else (self._value,)


class Taylor(Predictor):
    r"""Forecast from finite differences over the computed steps (TaylorSeer, arXiv 2503.06923).

    At a computed step s with output F, and d the gap to the last computed step, the factors become

        Y[0] = F,   Y[i+1] = (Y[i] - Yold[i]) / d        as far as Yold reaches, up to `order`

    and the forecast at a later step n is `sum_i Y[i] (n - s)^i / i!`. The Newton basis keeps true divided differences
    (the divisor of order i reaches back i + 1 computed steps) and weighs them by `prod_j (n - s_j)`, which is exact for
    polynomials of degree `order` on any spacing.

    Args:
        order: highest order m; 0 is plain reuse.
        first: differences are taken from this step on (the papers' warm-up gate).
        basis: "taylor" (the paper) or "newton".
        dtype: storage type of the factors; None keeps the outputs' own. A new difference is taken between the
            unrounded output and the rounded old factor, as diffusers does.
    """

    kind: ClassVar[Kind] = "predicted"

    def __init__(
        self,
        order: int = 1,
        first: int = 0,
        basis: Literal["taylor", "newton"] = "taylor",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.order = order
        self.first = first
        self.basis = basis
        self.dtype = dtype
        self.factors: list[Tensor] = []
        self.computed: list[int] = []  # steps of the last order + 1 computations, newest first
        self._out_dtype: torch.dtype | None = None

    def ready(self, step: Step) -> bool:
        """Whether something was computed at an earlier step."""
        return bool(self.factors)

    def observe(self, step: Step, x: Tensor, call: Call, out: Tensor, computed: bool) -> None:
        """Renew the factors from a computed output."""
        if computed:
            self.update(step.n, out.detach())

    def update(self, n: int, value: Tensor) -> None:
        """Renew the factors with the output `value` of step `n`."""
        old, fresh = self.factors, [value]
        if old and old[0].shape == value.shape and n >= self.first:
            for i in range(min(self.order, len(old))):
                back = self.computed[0 if self.basis == "taylor" else i]
                difference = torch.sub(fresh[i], old[i].to(value.dtype))
                fresh.append(difference.div_(n - back))
        self._out_dtype = value.dtype
        self.factors = fresh if self.dtype is None else [f.to(self.dtype) for f in fresh]
        self.computed = [n, *self.computed][: self.order + 1]

    def predict(self, step: Step, x: Tensor, call: Call) -> Tensor:
        """The forecast for step `step.n`."""
        return self.forecast(step.n)

    def weights(self, n: int) -> list[float]:
        """The weight of every factor at step `n`."""
        if self.basis == "taylor":
            return [(n - self.computed[0]) ** i / math.factorial(i) for i in range(len(self.factors))]
        return [math.prod(n - s for s in self.computed[:i]) for i in range(len(self.factors))]

    def forecast(self, n: int) -> Tensor:
        """The forecast for step `n`; order 0 alone is the kept tensor itself, which must not be written into."""
        factors = self.factors if self.dtype is None else [f.to(self._out_dtype) for f in self.factors]
        weights = self.weights(n)
        if len(factors) == 1:
            return factors[0]
        total = torch.add(factors[0], factors[1], alpha=weights[1])
        for factor, weight in zip(factors[2:], weights[2:], strict=True):
            total.add_(factor, alpha=weight)
        return total

    def tensors(self) -> Iterable[Tensor]:
        """The factors."""
        return self.factors


class Residual(Predictor):
    """Predict output minus input, on the channels that both have, and add the current input.

    Args:
        inner: what predicts the residual.
    """

    def __init__(self, inner: Predictor) -> None:
        self.inner = inner
        self.kind = inner.kind  # type: ignore[misc]
        self._dtype = torch.float32

    def ready(self, step: Step) -> bool:
        """Whether the inner predictor is."""
        return self.inner.ready(step)

    def observe(self, step: Step, x: Tensor, call: Call, out: Tensor, computed: bool) -> None:
        """Hand the residual to the inner predictor."""
        self._dtype = out.dtype  # under autocast not that of the input
        mine, _ = common(x, out)
        if mine.shape == out.shape:
            residual = out.detach() - mine.detach()
        else:
            residual = out.detach().clone()
            common(x, residual)[1].sub_(mine)
        self.inner.observe(step, x, call, residual, computed)

    def predict(self, step: Step, x: Tensor, call: Call) -> Tensor:
        """Input plus the predicted residual."""
        residual = self.inner.predict(step, x, call)
        axis = channel_axis(residual)
        if x.shape[axis] >= residual.shape[axis]:
            return (x.narrow(axis, 0, residual.shape[axis]) + residual).to(self._dtype)
        out = residual.clone()
        common(x, out)[1].add_(x)
        return out.to(self._dtype)

    def tensors(self) -> Iterable[Tensor]:
        """What the inner predictor keeps."""
        return self.inner.tensors()


class Decay(Predictor):
    """The last computed output, scaled by `factor(step, last)` where `last` is the step it was computed at."""

    kind: ClassVar[Kind] = "predicted"

    def __init__(self, factor: Callable[[Step, Step], float]) -> None:
        self._factor = factor
        self._kept: tuple[Step, Tensor] | None = None

    def ready(self, step: Step) -> bool:
        """Whether something was computed."""
        return self._kept is not None

    def observe(self, step: Step, x: Tensor, call: Call, out: Tensor, computed: bool) -> None:
        """Keep a computed output and its step."""
        if computed:
            self._kept = (step, out.detach())

    def predict(self, step: Step, x: Tensor, call: Call) -> Tensor:
        """The scaled output."""
        assert self._kept is not None
        last, value = self._kept
        return value * self._factor(step, last)

    def tensors(self) -> Iterable[Tensor]:
        """The kept output."""
        return () if self._kept is None else (self._kept[1],)


class Affine(Predictor):
    """`scale(step) * value + shift(step)` of the last computed output, with coefficients that broadcast against it."""

    kind: ClassVar[Kind] = "predicted"

    def __init__(
        self, scale: Callable[[Step], Tensor | float], shift: Callable[[Step], Tensor | float] = lambda step: 0.0
    ) -> None:
        self._scale = scale
        self._shift = shift
        self._value: Tensor | None = None

    def ready(self, step: Step) -> bool:
        """Whether something was computed."""
        return self._value is not None

    def observe(self, step: Step, x: Tensor, call: Call, out: Tensor, computed: bool) -> None:
        """Keep a computed output."""
        if computed:
            self._value = out.detach()

    def predict(self, step: Step, x: Tensor, call: Call) -> Tensor:
        """The transformed output."""
        assert self._value is not None
        return self._value * self._scale(step) + self._shift(step)

    def tensors(self) -> Iterable[Tensor]:
        """The kept output."""
        return () if self._value is None else (self._value,)
