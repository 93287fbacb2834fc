"""Claims of TaylorSeer (ICCV 2025, arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.lab import Lab
from elision.denoise.methods.taylorseer import TaylorSeer
from elision.denoise.predictors import Taylor

INTERVALS = (3, 4, 5, 6)
FORECAST_INTERVALS = (3, 4, 5)
FIRST = 3  # first_enhance of the released FLUX code


def _method(interval: int, order: int) -> TaylorSeer:
    return TaylorSeer(interval=interval, max_order=order, first_enhance=FIRST)


def _setting(lab: Lab, interval: int, steps: int) -> str:
    return f"N = {interval}, {lab.counts(_method(interval, 1), steps)[0]} computed"


@claim(
    "taylorseer/reuse",
    "Forecasting to first order is better than reusing",
    paper="DiT-XL/2 FID at N = 3: 2.34 against FORA 3.55; at N = 5: 2.65 against 6.58",
    metric="PSNR difference, dB",
    baseline="m = 0 (FORA), same steps computed",
)
def against_reuse(lab: Lab, steps: int) -> Iterator[Measured]:
    """m = 1 minus m = 0."""
    for interval in INTERVALS:
        yield Measured(_setting(lab, interval, steps), lab.gain(_method(interval, 1), _method(interval, 0), steps))


@claim(
    "taylorseer/gap",
    "The advantage over reuse widens as the interval grows",
    paper="DiT-XL/2: FORA's FID exceeds TaylorSeer's by 1.21 at N = 3 and by 3.93 at N = 5",
    metric="slope of the difference in mean squared error over N, ×1e-3",
    baseline="m = 0 (FORA), N = 3 to 6",
)
def gap_widens(lab: Lab, steps: int) -> Iterator[Measured]:
    """Per seed, the slope of MSE(m = 0) - MSE(m = 1) over N."""
    gaps = np.array([np.subtract(lab.mse(_method(n, 0), steps), lab.mse(_method(n, 1), steps)) for n in INTERVALS])
    slopes = [float(np.polyfit(INTERVALS, gaps[:, i], 1)[0]) * 1e3 for i in range(gaps.shape[1])]
    told = ", ".join(f"{gap.mean() * 1e3:.3g}" for gap in gaps)
    yield Measured("N = 3, 4, 5, 6", stats.mean(slopes), f"differences ×1e-3: {told}")


@claim(
    "taylorseer/fewer-steps",
    "At equal computed steps it is better than sampling with fewer steps",
    paper="FLUX.1-dev, 50 steps: ImageReward 1.0039 at 4.99× (N = 6), 0.9898 uncached",
    metric="PSNR difference, dB",
    baseline="plain sampling with as many steps",
)
def against_fewer(lab: Lab, steps: int) -> Iterator[Measured]:
    """m = 1 minus plain sampling."""
    for interval in INTERVALS:
        ours = _method(interval, 1)
        value = lab.gain_fewer(ours, lab.counts(ours, steps), steps)
        yield Measured(_setting(lab, interval, steps), value)


class _Forecasts:
    """Forecast errors per site on the trajectory of an uncached run: nothing that is forecast is ever used."""

    def __init__(self, orders: tuple[int, ...]) -> None:
        self.orders = orders
        self._taylors: dict[tuple[str, int, int], Taylor] = {}
        self.errors: dict[tuple[int, int], dict[str, list[float]]] = {
            (n, m): {} for n in FORECAST_INTERVALS for m in orders
        }

    def seen(self, host: Any, step: Any, site: Any, call: Any, out: Any) -> None:
        """Renew the factors at the steps that the schedule computes, score the forecast at all others."""
        if not step.leads:
            return
        value = out.detach()
        scale = float(value.square().mean())
        for interval in FORECAST_INTERVALS:
            full = step.n < FIRST or (step.n - FIRST + 1) % interval == 0
            for order in self.orders:
                taylor = self._taylors.setdefault((site.key, interval, order), Taylor(order, FIRST - 1))
                if full:
                    taylor.update(step.n, value.clone())
                else:
                    error = float((taylor.forecast(step.n) - value).square().mean()) / scale
                    self.errors[interval, order].setdefault(site.key, []).append(error)

    def by_site(self, interval: int, order: int) -> dict[str, float]:
        """Mean relative squared error of every site."""
        return {site: float(np.mean(errors)) for site, errors in self.errors[interval, order].items()}


def _forecast_shares(lab: Lab, steps: int, better: int, worse: int) -> Iterator[Measured]:
    """The share of sites at which one order forecasts better than another, per interval, over seeds."""
    shares: dict[int, list[float]] = {n: [] for n in FORECAST_INTERVALS}
    errors: dict[int, list[tuple[float, float]]] = {n: [] for n in FORECAST_INTERVALS}
    for seed in lab.seeds[:4]:  # recording every branch is slow, and sites agree
        forecasts = _Forecasts((worse, better))
        lab.watch("branch", steps, seed, forecasts.seen)
        for n in FORECAST_INTERVALS:
            good, bad = forecasts.by_site(n, better), forecasts.by_site(n, worse)
            shares[n].append(float(np.mean([good[site] < bad[site] for site in good])))
            errors[n].append((float(np.mean(list(good.values()))), float(np.mean(list(bad.values())))))
    for n in FORECAST_INTERVALS:
        good_error, bad_error = np.mean(errors[n], axis=0)
        remark = f"mean relative error {good_error:.3g} with m = {better}, {bad_error:.3g} with m = {worse}"
        yield Measured(f"N = {n}", stats.mean(shares[n]), remark)


@claim(
    "taylorseer/forecast",
    "At most sites a first-order forecast is closer to the true output than the old output",
    paper="the method's premise: features move along smooth curves",
    metric="share of sites",
    bound=0.5,
    baseline="m = 0 on the same recorded trajectory",
)
def first_order_forecast(lab: Lab, steps: int) -> Iterator[Measured]:
    """Teacher-forced: m = 1 against m = 0."""
    return _forecast_shares(lab, steps, 1, 0)


@claim(
    "taylorseer/second-order",
    "At most sites a second-order forecast is closer still",
    paper="FLUX tables use m = 2, DiT tables m = 3 and 4",
    metric="share of sites",
    bound=0.5,
    baseline="m = 1 on the same recorded trajectory",
)
def second_order_forecast(lab: Lab, steps: int) -> Iterator[Measured]:
    """Teacher-forced: m = 2 against m = 1."""
    return _forecast_shares(lab, steps, 2, 1)


def _published_ratio(interval: int, published: float) -> None:
    @claim(
        f"taylorseer/ratio-{interval}",
        f"50 steps with f = 2 and N = {interval} cost 1/{published:g} of the uncached run",
        paper=f"DiT-XL/2: {published:g}× fewer FLOPs at N = {interval}",
        metric="steps over computed steps",
        direction="equal",
        bound=published,
        tolerance=0.01,
        baseline="the uncached run",
        once=True,
    )
    def ratio(lab: Lab, steps: int) -> Iterator[Measured]:
        method = TaylorSeer(interval=interval, max_order=1, first_enhance=2)
        _, sample, report = lab.run(method, 50, lab.seeds[0])
        remark = f"{sample.steps_decided:g} of 50 steps computed"
        if report.flops_computed and report.flops_elided is not None:
            whole = report.flops_computed + report.flops_elided
            remark += f"; FLOPs of this model, embeddings and heads included: {whole / report.flops_computed:.2f}×"
        yield Measured("T = 50, f = 2", stats.mean([50 / sample.steps_decided]), remark)


for _interval, _published in ((3, 2.77), (4, 3.57), (5, 4.53)):
    _published_ratio(_interval, _published)


@claim(
    "taylorseer/published-models",
    "On FLUX.1-dev ImageReward does not fall at 4.99 times fewer operations",
    paper="FLUX.1-dev, 50 steps: ImageReward 1.0039 at 4.99× (3.53× latency), 0.9898 uncached",
    metric="ImageReward",
    baseline="the uncached model",
    once=True,
)
def published_models(lab: Lab, steps: int) -> Iterator[Measured]:
    """Needs a model and a metric that this experiment does not assume."""
    yield Measured("", None, "it needs FLUX.1-dev weights, the ImageReward model and a large GPU")
