"""Claims of EasyCache (arXiv 2507.02860)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.lab import Lab
from elision.denoise.methods.easycache import EasyCache
from elision.denoise.methods.teacache import TeaCache
from elision.denoise.schedules import mean_abs

THRESHOLDS = (0.02, 0.05, 0.1)
SWEEP = (0.01, 0.02, 0.05, 0.1, 0.2)
_TEACACHE = (0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.3, 0.4, 0.6)


def _method(threshold: float, steps: int) -> EasyCache:
    """The released warm-up is 5 (HunyuanVideo) or 10 (Wan2.1) of 50 steps; here a tenth of the run."""
    return EasyCache(threshold=threshold, warmup_steps=max(2, round(steps / 10)))


def _setting(lab: Lab, threshold: float, steps: int) -> str:
    calls = np.mean(lab.counts(_method(threshold, steps), steps))
    return f"threshold {threshold:g}, {calls:.3g} computed"


@claim(
    "easycache/uniform",
    "At equal computed steps, deciding by the criterion is better than spreading them evenly",
    paper="Wan2.1-1.3B: PSNR 25.24 at 2.54× against PAB 18.84 at 1.72×",
    metric="PSNR difference, dB",
    baseline="residual reuse at evenly spread steps",
)
def against_uniform(lab: Lab, steps: int) -> Iterator[Measured]:
    """EasyCache minus even spreading of the same stand-in."""
    for threshold in THRESHOLDS:
        yield Measured(_setting(lab, threshold, steps), lab.gain_spread(_method(threshold, steps), steps))


@claim(
    "easycache/teacache",
    "At no more computed steps it is better than TeaCache",
    paper="Wan2.1-1.3B: PSNR 25.24 at 2.54× against TeaCache 22.57 at 2.00×",
    metric="PSNR difference, dB",
    baseline="TeaCache (unfitted) at the next larger number of computed steps",
)
def against_teacache(lab: Lab, steps: int) -> Iterator[Measured]:
    """TeaCache's threshold is chosen on the first seed: the cheapest that computes at least as many steps.

    One that computes over a quarter more is no counterpart, above all one that skips nothing.
    """
    costs = {t: lab.counts_at(TeaCache(threshold=t), steps, lab.seeds[0]) for t in _TEACACHE}
    for threshold in THRESHOLDS:
        ours = _method(threshold, steps)
        mine = float(np.mean(lab.counts(ours, steps)))
        fair = [t for t, cost in costs.items() if mine <= cost <= 1.25 * mine]
        if not fair:
            yield Measured(_setting(lab, threshold, steps), None, "no TeaCache threshold computes as many steps")
            continue
        other = TeaCache(threshold=min(fair, key=lambda t: costs[t]))
        theirs = np.mean(lab.counts(other, steps))
        setting = f"{_setting(lab, threshold, steps)}, TeaCache {theirs:.3g}"
        yield Measured(setting, lab.gain(ours, other, steps))


@claim(
    "easycache/fewer-steps",
    "At equal computed steps it is better than sampling with fewer steps",
    paper="no figure; the purpose of any step cache",
    metric="PSNR difference, dB",
    baseline="plain sampling with as many steps",
)
def against_fewer(lab: Lab, steps: int) -> Iterator[Measured]:
    """EasyCache minus plain sampling."""
    for threshold in THRESHOLDS:
        ours = _method(threshold, steps)
        value = lab.gain_fewer(ours, lab.counts(ours, steps), steps)
        yield Measured(_setting(lab, threshold, steps), value)


@claim(
    "easycache/residual",
    "On the same skipped steps, reusing output minus input is better than reusing the output",
    paper="no figure; the design of the method (D = v - x is what is kept)",
    metric="PSNR difference, dB",
    baseline="plain output reuse on the same steps",
)
def against_output(lab: Lab, steps: int) -> Iterator[Measured]:
    """Both stand-ins on the skip set that EasyCache chose."""
    for threshold in THRESHOLDS:
        computed = lab.computed(_method(threshold, steps), steps)
        residual = lab.psnr_listed(computed, "residual", steps)
        output = lab.psnr_listed(computed, "output", steps)
        yield Measured(_setting(lab, threshold, steps), stats.difference(residual, output))


@claim(
    "easycache/monotone",
    "The number of computed steps falls as the threshold grows",
    paper="no figure; one threshold trades speed for quality",
    metric="largest rise from one threshold to the next, steps",
    direction="at most",
    baseline="the next smaller threshold",
)
def falls_with_threshold(lab: Lab, steps: int) -> Iterator[Measured]:
    """The worst neighbouring pair; averages over seeds, as skip sets need not nest."""
    counts = [lab.counts(_method(threshold, steps), steps) for threshold in SWEEP]
    rises = [stats.difference(after, before) for before, after in itertools.pairwise(counts)]
    told = ", ".join(f"{np.mean(c):.3g}" for c in counts)
    thresholds = ", ".join(f"{t:g}" for t in SWEEP)
    yield Measured(f"thresholds {thresholds}", max(rises, key=lambda r: r.mean), f"computed {told}")


@claim(
    "easycache/rate",
    "The transformation rate k is nearly constant after the first steps",
    paper="shown as a figure: k settles after the first steps of a 50-step run",
    metric="coefficient of variation of k, late over early",
    direction="below",
    bound=1.0,
    baseline="the first fifth of the run",
)
def rate_is_flat(lab: Lab, steps: int) -> Iterator[Measured]:
    """k_n = |v_n - v_(n-1)| / |x_n - x_(n-1)| of the conditional branch in uncached runs."""
    edge, tail = max(4, steps // 5), steps - steps // 5
    rates = [transformation_rates(lab, steps, seed) for seed in lab.seeds]  # k of step n at index n - 1
    early = [variation(k[: edge - 1]) for k in rates]
    for stop in (steps, tail):
        late = [variation(k[edge - 1 : stop - 1]) for k in rates]
        remark = f"variation {np.mean(early):.2g} before step {edge}, {np.mean(late):.2g} from there to {stop - 1}"
        yield Measured(f"steps {edge} to {stop - 1} over 1 to {edge - 1}", stats.ratio(late, early), remark)


def transformation_rates(lab: Lab, steps: int, seed: int) -> list[float]:
    """k at every step but the first."""
    rates: list[float] = []
    last: list[tuple[object, object]] = []

    def seen(host, step, site, call, out):  # type: ignore[no-untyped-def]
        if not step.leads:
            return
        x, v = call.x.detach().clone(), out.detach().clone()
        if last:
            before_x, before_v = last.pop()
            rates.append(float(mean_abs(v - before_v) / mean_abs(x - before_x)))
        last.append((x, v))

    lab.watch("model", steps, seed, seen)
    return rates


def variation(values: list[float]) -> float:
    """Standard deviation over mean."""
    return float(np.std(values) / np.mean(values))


@claim(
    "easycache/published-models",
    "On HunyuanVideo it is 2.21 times faster at PSNR 32.66, on Wan2.1-1.3B 2.54 times at 25.24",
    paper="HunyuanVideo 2.21×, PSNR 32.66, LPIPS 0.0533; Wan2.1-1.3B 2.54×, 25.24, 0.0952 (A800)",
    metric="latency and PSNR on VBench prompts",
    baseline="the uncached models",
    once=True,
)
def published_models(lab: Lab, steps: int) -> Iterator[Measured]:
    """Needs models and a data-centre GPU that this experiment does not assume."""
    why = "it needs HunyuanVideo or Wan2.1 weights and an 80 GB GPU: `elision compare denoise --model ...` there"
    yield Measured("", None, why)
