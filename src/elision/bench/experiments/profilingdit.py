"""Claims of ProfilingDiT (arXiv 2504.03140), made of video models and tested here on an image model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import avg_pool2d

from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.lab import Lab
from elision.bench.listed import spread
from elision.denoise.fit.profilingdit import Masked
from elision.denoise.methods.profilingdit import PRESETS, ProfilingDiT
from elision.denoise.schedules import shrinking
from elision.profile import Profile

SHARES = (1 / 3, 1 / 2)
PATCH = 4  # of the garment models
_SETS = 4  # random sets of blocks that the profiled one is compared with


def _start(steps: int) -> int:
    """The released s0 is 6 of 50."""
    return max(1, round(steps * 6 / 50))


def _intervals(steps: int) -> dict[str, tuple[int, ...]]:
    """Refresh lists of equal length: shrinking by the formula with 12 and 2 of 50 steps, even, and the reverse."""
    start = _start(steps)
    falling = shrinking(start, steps, max(2, round(12 * steps / 50)), max(1, round(2 * steps / 50)))
    gaps = [b - a for a, b in pairwise([*falling, steps])]
    rising = np.cumsum([start, *reversed(gaps)])[:-1].tolist()
    even = [start + n for n in spread(len(falling), steps - start)]
    return {"decreasing": tuple(falling), "uniform": tuple(even), "increasing": tuple(rising)}


def _masks(images: Tensor) -> Tensor:
    """Where the garment is, on the token grid, from images [B, 1, H, W] in [0, 1]: [B, 1, tokens]."""
    return (avg_pool2d((images.mean(1, keepdim=True) > 0.1).float(), PATCH) >= 0.5).flatten(2)


def _profile(lab: Lab, steps: int) -> Profile:
    """One profile for all claims, from two runs; on the garment models with true masks."""
    key = ProfilingDiT(warmup_steps=_start(steps), refresh=(_start(steps),))
    if (key, steps) not in lab.profiles:
        lab.told(f"fitting profilingdit, {steps} steps")
        calls = [_call(lab, steps, max(lab.seeds) + 1000 + i) for i in range(2)]
        lab.give([key], steps, key.fit(lab.subject.pipe, calls))
    return lab.profiles[key, steps]


def _call(lab: Lab, steps: int, seed: int) -> Any:
    run: Callable[[Any], Any] = lambda pipe: lab.subject.sample(steps, seed)  # noqa: E731
    if type(lab.subject.pipe).__name__ != "GarmentsPipeline":
        return run
    return Masked(run, _masks(lab.subject.sample(steps, seed)[0]))


def _method(blocks: Sequence[int], refresh: tuple[int, ...]) -> ProfilingDiT:
    return ProfilingDiT(blocks=tuple(sorted(blocks)), warmup_steps=refresh[0], refresh=refresh)


def _sets(lab: Lab, steps: int, share: float) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """As many background as foreground blocks, and R of every block in words."""
    ratio = _profile(lab, steps).tensors["ratio"]
    background = ProfilingDiT(share=share).chosen(ratio)
    foreground = ProfilingDiT(share=1 - len(background) / ratio.shape[1], cached="foreground").chosen(ratio)
    told = ", ".join(f"{r:.2f}" for r in ratio.nanmean(0).tolist())
    return background, foreground, f"R by block: {told}"


def _parts(lab: Lab, ours: ProfilingDiT, theirs: ProfilingDiT, steps: int) -> str:
    """The difference apart for garment and ground, from the first seed on, in words."""
    gains: dict[str, list[float]] = {"foreground": [], "background": []}
    for seed in lab.seeds:
        truth = lab.plain(steps, seed)
        inside = truth.mean(1, keepdim=True) > 0.1
        for name, where in (("foreground", inside), ("background", ~inside)):
            if where.any():
                errors = [float((lab.run(m, steps, seed)[0] - truth)[where].square().mean()) for m in (ours, theirs)]
                gains[name].append(10 * float(np.log10(max(errors[1], 1e-12) / max(errors[0], 1e-12))))
    return "; ".join(f"on the {name} {np.mean(g):+.2f} dB" for name, g in gains.items() if g)


@claim(
    "profilingdit/background",
    "At equal numbers, caching background blocks is better than caching foreground blocks",
    paper="HunyuanVideo: LPIPS .1203 at 1.87× with background, .1449 at 1.57× with foreground blocks",
    metric="PSNR difference, dB",
    baseline="as many blocks of the largest R, same refresh steps",
)
def against_foreground(lab: Lab, steps: int) -> Iterator[Measured]:
    """Lowest R minus highest R."""
    refresh = _intervals(steps)["decreasing"]
    for share in SHARES:
        background, foreground, told = _sets(lab, steps, share)
        ours, theirs = _method(background, refresh), _method(foreground, refresh)
        setting = f"blocks {background} against {foreground}"
        yield Measured(setting, lab.gain(ours, theirs, steps), f"{told}; {_parts(lab, ours, theirs, steps)}")


@claim(
    "profilingdit/random",
    "At equal numbers, caching background blocks is better than caching random ones",
    paper="HunyuanVideo: LPIPS .1203; split and alternating mixes .175 to .188",
    metric="PSNR difference, dB",
    baseline=f"the mean over {_SETS} random sets of as many blocks, same refresh steps",
)
def against_random(lab: Lab, steps: int) -> Iterator[Measured]:
    """Lowest R minus random sets."""
    refresh = _intervals(steps)["decreasing"]
    for share in SHARES:
        background, _, _ = _sets(lab, steps, share)
        depth, draw = _profile(lab, steps).tensors["ratio"].shape[1], random.Random(0)
        others = [_method(draw.sample(range(depth), len(background)), refresh) for _ in range(_SETS)]
        rivals = np.mean([lab.psnr(other, steps) for other in others], axis=0).tolist()
        value = stats.difference(lab.psnr(_method(background, refresh), steps), rivals)
        yield Measured(f"blocks {background}", value)


def _schedule_gains(lab: Lab, steps: int, ours: str, theirs: str, which: str) -> Iterator[Measured]:
    refresh = _intervals(steps)
    for share in SHARES:
        background, foreground, _ = _sets(lab, steps, share)
        blocks = background if which == "background" else foreground
        value = lab.gain(_method(blocks, refresh[ours]), _method(blocks, refresh[theirs]), steps)
        yield Measured(f"blocks {blocks}, {len(refresh[ours])} refreshes", value)


@claim(
    "profilingdit/decreasing-uniform",
    "With as many refreshes, shrinking intervals are better than even ones",
    paper="HunyuanVideo, background blocks: LPIPS .1203 decreasing, .1571 uniform",
    metric="PSNR difference, dB",
    baseline="evenly spread refresh steps, background blocks",
)
def decreasing_against_uniform(lab: Lab, steps: int) -> Iterator[Measured]:
    """Decreasing minus uniform."""
    return _schedule_gains(lab, steps, "decreasing", "uniform", "background")


@claim(
    "profilingdit/decreasing-increasing",
    "With as many refreshes, shrinking intervals are better than growing ones",
    paper="HunyuanVideo, background blocks: LPIPS .1203 decreasing, .2529 increasing",
    metric="PSNR difference, dB",
    baseline="the same intervals in reverse, background blocks",
)
def decreasing_against_increasing(lab: Lab, steps: int) -> Iterator[Measured]:
    """Decreasing minus increasing."""
    return _schedule_gains(lab, steps, "decreasing", "increasing", "background")


@claim(
    "profilingdit/foreground-uniform",
    "For foreground blocks even intervals are better than shrinking ones",
    paper="HunyuanVideo, foreground blocks: LPIPS .1303 uniform, .1449 decreasing",
    metric="PSNR difference, dB",
    baseline="shrinking intervals, foreground blocks",
)
def uniform_for_foreground(lab: Lab, steps: int) -> Iterator[Measured]:
    """Uniform minus decreasing."""
    return _schedule_gains(lab, steps, "uniform", "decreasing", "foreground")


@claim(
    "profilingdit/stable",
    "The background blocks of single steps are those of all steps",
    paper="shown as figures: R of a block is consistent over steps",
    metric="share of a step's background blocks that are in the list, over what chance gives",
    bound=1.0,
    baseline="a random list of as many blocks",
)
def lists_are_stable(lab: Lab, steps: int) -> Iterator[Measured]:
    """Overlap of each step's lowest blocks with the list, from the profile; each step is one value."""
    ratio = _profile(lab, steps).tensors["ratio"]
    depth = ratio.shape[1]
    for share in SHARES:
        whole = set(ProfilingDiT(share=share).chosen(ratio))
        kept = [set(ProfilingDiT(share=share).chosen(row[None])) for row in ratio if not row.isnan().any()]
        overlap = [len(mine & whole) / len(whole) / (len(whole) / depth) for mine in kept]
        yield Measured(f"{len(whole)} of {depth} blocks", stats.mean(overlap), "over steps, not seeds")


@claim(
    "profilingdit/fewer-steps",
    "At equal cost it is better than sampling with fewer steps",
    paper="no figure; the purpose of any cache",
    metric="PSNR difference, dB",
    baseline="plain sampling with at least as many denoiser FLOPs",
)
def against_fewer(lab: Lab, steps: int) -> Iterator[Measured]:
    """Background blocks, shrinking intervals."""
    refresh = _intervals(steps)["decreasing"]
    for share in SHARES:
        ours = _method(_sets(lab, steps, share)[0], refresh)
        counts = lab.equal_flops(ours, steps)
        setting = f"blocks {ours.blocks}, cost of {np.mean(counts):.3g} steps"
        yield Measured(setting, lab.gain_fewer(ours, counts, steps))


@claim(
    "profilingdit/ratio-wan",
    "The released Wan2.1-14B configuration computes half of the blocks of 50 steps",
    paper="Wan2.1-14B: 2.01× measured",
    metric="blocks of the uncached run over computed blocks",
    direction="equal",
    bound=2.01,
    tolerance=0.01,
    baseline="the uncached run",
    once=True,
)
def wan_ratio(lab: Lab, steps: int) -> Iterator[Measured]:
    """Counted with the preset's own schedule."""
    (part,) = PRESETS["wan2.1-14b"]
    whole = [n < part.refresh.start or part.refresh.due(n, 50) for n in range(50)]
    computed = sum(part.depth if full else part.depth - len(part.blocks) for full in whole)
    yield Measured("T = 50", stats.mean([50 * part.depth / computed]), f"{sum(whole)} of 50 steps compute all blocks")


@claim(
    "profilingdit/published-models",
    "On HunyuanVideo it is 1.87 times faster at LPIPS .1203, on Wan2.1 2.01 times at .1256",
    paper="HunyuanVideo 1.87×, LPIPS .1203, PSNR 26.44; Wan2.1 2.01×, .1256, 22.02",
    metric="latency and LPIPS on VBench prompts",
    baseline="the uncached models",
    once=True,
)
def published_models(lab: Lab, steps: int) -> Iterator[Measured]:
    """Needs models that this experiment does not assume."""
    yield Measured("", None, "it needs HunyuanVideo and Wan2.1-14B weights, SAM2 and a large GPU")
