"""Claims of WorldCache (ICML 2026, arXiv 2603.06331)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from elision.bench.claims import Measured, claim
from elision.bench.lab import Lab
from elision.denoise.methods.worldcache import Groups, WorldCache

STREAKS = (2, 4, 6)
THRESHOLDS = (0.2, 0.5, 1.0)


def _method(steps: int, **options: float) -> WorldCache:
    """The released warm-up is 5 of 50 steps; here a tenth of the run, and at least the three that curvature needs."""
    return WorldCache(warmup_steps=max(3, round(steps / 10)), **options)  # type: ignore[arg-type]


def _fixed(steps: int, n_max: int) -> WorldCache:
    """Without drift: computed every n_max + 1 steps, whatever the groups are."""
    return _method(steps, n_max=n_max, threshold=1e9)


def _setting(lab: Lab, method: WorldCache, steps: int) -> str:
    calls = np.mean(lab.counts(method, steps))
    drift = "" if method.threshold == 1e9 else f"threshold {method.threshold:g}, "
    return f"{drift}n_max {method.n_max}, {calls:.3g} computed"


def _groups_against(groups: Groups, what: str, psnr: float) -> None:
    @claim(
        f"worldcache/{groups}",
        f"On the same computed steps, groups by curvature are better than {what}",
        paper=f"PSNR 25.76 with the groups, {psnr:g} with {what}",
        metric="PSNR difference, dB",
        baseline=f"{what}, same steps computed",
    )
    def against(lab: Lab, steps: int) -> Iterator[Measured]:
        for n_max in STREAKS:
            ours = _fixed(steps, n_max)
            value = lab.gain(ours, replace(ours, groups=groups), steps)
            yield Measured(_setting(lab, ours, steps), value)


for _groups, _what, _psnr in (
    ("stable", "reusing every token", 22.74),
    ("linear", "extrapolating every token linearly", 18.01),
    ("chaotic", "damping every token", 23.76),
    ("random", "random groups of equal size", 22.59),
):
    _groups_against(_groups, _what, _psnr)  # type: ignore[arg-type]


@claim(
    "worldcache/drift",
    "At no more computed steps, deciding by the drift of chaotic tokens is better than a fixed interval",
    paper="no figure read; the second part of the method",
    metric="PSNR difference, dB",
    baseline="the same predictors with the longest interval that computes at least as many steps",
)
def drift_against_interval(lab: Lab, steps: int) -> Iterator[Measured]:
    """With the interval free (n_max = 6), at thresholds that make the drift decide."""
    first = lab.seeds[0]
    costs = {n: lab.counts_at(_fixed(steps, n), steps, first) for n in (1, 2, 3, 4, 5, 6)}
    for threshold in THRESHOLDS:
        ours = _method(steps, threshold=threshold)
        mine = float(np.mean(lab.counts(ours, steps)))
        fair = [n for n, cost in costs.items() if mine <= cost <= 1.4 * mine]
        if not fair:
            yield Measured(_setting(lab, ours, steps), None, "no fixed interval computes about as many steps")
            continue
        other = _fixed(steps, max(fair))
        yield Measured(f"{_setting(lab, ours, steps)}, interval {costs[max(fair)]}", lab.gain(ours, other, steps))


@claim(
    "worldcache/uniform",
    "At equal computed steps it is better than reusing at evenly spread steps",
    paper="Voyager: PSNR 23.49 at 3.65× against EasyCache 21.76 at 3.58× and TeaCache 16.25 at 3.38×",
    metric="PSNR difference, dB",
    baseline="residual reuse at evenly spread steps",
)
def against_uniform(lab: Lab, steps: int) -> Iterator[Measured]:
    """The whole method."""
    for threshold in THRESHOLDS:
        ours = _method(steps, threshold=threshold)
        yield Measured(_setting(lab, ours, steps), lab.gain_spread(ours, steps))


@claim(
    "worldcache/fewer-steps",
    "At equal computed steps it is better than sampling with fewer steps",
    paper="no figure; the purpose of any step cache",
    metric="PSNR difference, dB",
    baseline="plain sampling with as many steps",
)
def against_fewer(lab: Lab, steps: int) -> Iterator[Measured]:
    """The whole method."""
    for threshold in THRESHOLDS:
        ours = _method(steps, threshold=threshold)
        yield Measured(_setting(lab, ours, steps), lab.gain_fewer(ours, lab.counts(ours, steps), steps))


@claim(
    "worldcache/published-models",
    "On HunyuanVoyager it is 3.65 times faster at PSNR 23.49, on Aether 1.68 times at 31.87",
    paper="HunyuanVoyager-13B 3.65×, PSNR 23.49, LPIPS 0.176; Aether-5B 1.68×, 31.87, 0.066",
    metric="latency and PSNR",
    baseline="the uncached models",
    once=True,
)
def published_models(lab: Lab, steps: int) -> Iterator[Measured]:
    """Needs world models that this experiment does not assume."""
    yield Measured("", None, "it needs HunyuanVoyager or Aether weights and an 80 GB GPU")
