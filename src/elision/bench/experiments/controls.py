"""Claims about baselines and negative controls: where one of these fails, a comparison measures nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.lab import Lab, random_steps
from elision.bench.listed import spread
from elision.denoise.methods.first_block import FirstBlock
from elision.denoise.methods.random_skip import RandomSkip
from elision.denoise.methods.stale import Stale
from elision.denoise.methods.teacache import TeaCache
from elision.denoise.methods.uniform import Uniform


@claim(
    "uniform/interval",
    "Reuse loses quality quickly as the interval grows",
    paper="FORA on DiT-XL/2: FID 3.55 at N = 3, 6.58 at N = 5",
    metric="PSNR difference, dB",
    baseline="N = 5",
)
def reuse_decays(lab: Lab, steps: int) -> Iterator[Measured]:
    """N = 3 minus N = 5."""
    yield Measured("N = 3 against 5", lab.gain(Uniform(interval=3), Uniform(interval=5), steps))


@claim(
    "random_skip/uniform",
    "Skipping at random loses to spreading the computed steps evenly",
    paper="no paper: a negative control",
    metric="PSNR difference, dB",
    direction="below",
    baseline="residual reuse at evenly spread steps, as many",
)
def random_loses(lab: Lab, steps: int) -> Iterator[Measured]:
    """The control's own draw, and fresh draws for every seed."""
    control = RandomSkip(rate=0.6)
    calls = np.mean(lab.counts(control, steps))
    yield Measured(f"rate 0.6, {calls:.3g} computed", lab.gain_spread(control, steps))
    count = steps // 3
    draws = [random_steps(count, steps, seed) for seed in lab.seeds]
    even = [spread(count, steps)] * len(lab.seeds)
    ours, theirs = (lab.psnr_listed(c, "residual", steps) for c in (draws, even))
    yield Measured(f"a draw per seed, {count} computed", stats.difference(ours, theirs))


@claim(
    "stale/uniform",
    "Reusing the first step's residual for ever loses to renewing it",
    paper="no paper: a negative control",
    metric="PSNR difference, dB",
    direction="below",
    baseline="uniform at the denoiser, same steps computed",
)
def stale_loses(lab: Lab, steps: int) -> Iterator[Measured]:
    """stale minus uniform."""
    for interval in (2, 3):
        ours, theirs = Stale(interval=interval), Uniform(interval=interval, site="model")
        yield Measured(f"N = {interval}", lab.gain(ours, theirs, steps))


@claim(
    "first_block/fewer-steps",
    "At equal cost it is better than sampling with fewer steps",
    paper="no paper; the purpose of any step cache",
    metric="PSNR difference, dB",
    baseline="plain sampling with at least as many denoiser FLOPs",
)
def first_block_against_fewer(lab: Lab, steps: int) -> Iterator[Measured]:
    """The first block always runs, so equal cost is counted in operations."""
    for threshold in (0.1, 0.2):
        ours = FirstBlock(threshold=threshold)
        counts = lab.equal_flops(ours, steps)
        setting = f"threshold {threshold:g}, cost of {np.mean(counts):.3g} steps"
        yield Measured(setting, lab.gain_fewer(ours, counts, steps))


@claim(
    "teacache/fewer-steps",
    "At equal cost it is better than sampling with fewer steps",
    paper="no figure; Wan2.1-1.3B reports PSNR 22.57 at 2.00× against the uncached run",
    metric="PSNR difference, dB",
    baseline="plain sampling with at least as many denoiser FLOPs",
)
def teacache_against_fewer(lab: Lab, steps: int) -> Iterator[Measured]:
    """Unfitted: thresholds mean input change."""
    for threshold in (0.1, 0.2):
        ours = TeaCache(threshold=threshold)
        counts = lab.equal_flops(ours, steps)
        setting = f"threshold {threshold:g}, cost of {np.mean(counts):.3g} steps"
        yield Measured(setting, lab.gain_fewer(ours, counts, steps))
