"""Claims of RegionE (ICLR 2026, arXiv 2510.25590), on an editor whose true edit regions are known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.lab import Lab
from elision.bench.listed import spread
from elision.bench.measure import regions_of
from elision.denoise.methods.regione import PRESETS, RegionE
from elision.errors import UnsupportedTarget

MODEL = "garments-edit"
DELTAS = (0.04, 0.02)  # Kontext's and Step1X-Edit's
T, W, Q, FORCED = 28, 6, 2, 16  # of the paper
PAPER = "Step1X-Edit: PSNR 30.52"
ALONE: dict[str, Any] = {"metric": "PSNR difference, dB"}


def _method(lab: Lab, steps: int, delta: float = DELTAS[0]) -> RegionE:
    """The paper's course, in proportion for other numbers of steps, with gammas fitted on other noise."""
    warmup, post, forced = (max(1, round(n * steps / T)) for n in (W, Q, FORCED))
    ours = RegionE(
        delta=delta,
        eta=PRESETS["kontext"].eta,
        warmup_steps=warmup,
        post_steps=post,
        forced=(forced,),
    )
    return _given(lab, steps, ours)


def _given(lab: Lab, steps: int, *arms: RegionE) -> RegionE:
    """The last of some variants, all of them with one profile."""
    base = RegionE()
    if (base, steps) not in lab.profiles:
        lab.give([base], steps, lab.fit(base, steps, 1))
    lab.give([arm for arm in arms if arm.wants_profile], steps, lab.profiles[base, steps])
    return arms[-1]


def _setting(lab: Lab, method: RegionE, steps: int) -> str:
    """The threshold, the cost in plain steps, and the share of edited tokens."""
    runs = [lab.run(method, steps, seed) for seed in lab.seeds]
    cost = np.mean([sample.steps_computed for _, sample, _ in runs])
    share = np.mean([float(_region(report).float().mean()) for *_, report in runs])
    return f"delta {method.delta:g}, cost of {cost:.3g} steps, {share:.0%} edited"


def _region(report: Any) -> Tensor:
    found = regions_of(report)
    if found is None:
        raise UnsupportedTarget("the method found no region")
    return found


def _part(key: str, what: str, published: str, **without: Any) -> None:
    """A claim that the method is better than itself without one part."""

    @claim(
        f"regione/{key}",
        f"The method is better than without {what}",
        paper=f"{PAPER} with it, {published} without",
        baseline=f"RegionE without {what}; it may cost less",
        **ALONE,
    )
    def against(lab: Lab, steps: int) -> Iterator[Measured]:
        ours = _method(lab, steps)
        theirs = _given(lab, steps, replace(ours, **without))
        setting = f"{_setting(lab, ours, steps)}, {_cost(lab, theirs, steps):.3g} without"
        yield Measured(setting, lab.gain(ours, theirs, steps))


def _cost(lab: Lab, method: RegionE, steps: int) -> float:
    return float(np.mean([lab.run(method, steps, seed)[1].steps_computed for seed in lab.seeds]))


_part("keys", "kept keys and values", "22.868", keep_kv=False)
_part("stabilise", "the warm-up (one full step)", "21.441", warmup_steps=1)
_part("smooth", "the full steps at the end", "28.857", post_steps=0)
_part("forced", "the forced step", "28.452", forced=())


@claim(
    "regione/decay",
    "Reusing decaying velocities saves compute on top of the region",
    paper="Step1X-Edit: 2.572 times faster with it, 1.733 times without",
    metric="FLOPs without it over FLOPs with it",
    bound=1.0,
    baseline="RegionE with delta = 0",
)
def decay_saves(lab: Lab, steps: int) -> Iterator[Measured]:
    """FLOPs of the denoiser, per seed."""
    for delta in DELTAS:
        ours = _method(lab, steps, delta)
        theirs = _given(lab, steps, replace(ours, delta=0))
        over, under = ([lab.run(m, steps, seed)[1].steps_computed for seed in lab.seeds] for m in (theirs, ours))
        yield Measured(_setting(lab, ours, steps), stats.ratio(over, under))


@claim(
    "regione/decay-quality",
    "Reusing decaying velocities costs less than 1 dB",
    paper="Step1X-Edit: PSNR 30.52 with it, 31.139 without",
    metric="PSNR difference, dB",
    bound=-1.0,
    baseline="RegionE with delta = 0",
)
def decay_costs_little(lab: Lab, steps: int) -> Iterator[Measured]:
    """PSNR with it minus without."""
    for delta in DELTAS:
        ours = _method(lab, steps, delta)
        theirs = _given(lab, steps, replace(ours, delta=0))
        yield Measured(_setting(lab, ours, steps), lab.gain(ours, theirs, steps))


@claim(
    "regione/order",
    "Of the parts after the warm-up, kept keys and values matter most",
    paper="PSNR lost without them 7.65 dB, without the forced step 2.07, without the end 1.66, without decay -0.62",
    metric="PSNR lost without them minus the most that is lost without another part, dB",
    baseline="RegionE without the forced step, without full steps at the end, or with delta = 0",
)
def keys_matter_most(lab: Lab, steps: int) -> Iterator[Measured]:
    """Per seed."""
    ours = _method(lab, steps)
    kv = np.array(lab.psnr(_given(lab, steps, replace(ours, keep_kv=False)), steps))
    parts: tuple[dict[str, Any], ...] = ({"forced": ()}, {"post_steps": 0}, {"delta": 0})
    others = [np.array(lab.psnr(_given(lab, steps, replace(ours, **part)), steps)) for part in parts]
    yield Measured(_setting(lab, ours, steps), stats.difference(np.minimum.reduce(others).tolist(), kv.tolist()))


@claim(
    "regione/factor",
    "Decaying by the product since the last computed step (the paper) is better than by the last decay (the code)",
    paper="no figure; equation 9 against the released code",
    baseline="factor='last'",
    **ALONE,
)
def product_against_last(lab: Lab, steps: int) -> Iterator[Measured]:
    """Both make the same decisions."""
    ours = _method(lab, steps)
    theirs = _given(lab, steps, replace(ours, factor="last"))
    yield Measured(_setting(lab, ours, steps), lab.gain(ours, theirs, steps))


@claim(
    "regione/region",
    "The region found after the warm-up is that of the edit",
    paper="shown as figures; an edit of everything is everything",
    metric="intersection over union with the true mask, minus that of a random region of the same size",
    baseline="as many tokens, drawn at random for every image",
)
def region_is_true(lab: Lab, steps: int) -> Iterator[Measured]:
    """The true mask in tokens: those with any pixel of it."""
    ours, masks = _method(lab, steps), lab.subject.masks
    if masks is None:
        raise UnsupportedTarget(f"{lab.subject.name} has no true masks")
    values, lucky = [], []
    for seed in lab.seeds:
        mine = _region(lab.run(ours, steps, seed)[2])
        true = torch.nn.functional.adaptive_max_pool2d(masks.float(), mine.shape[-2:]).bool()
        order = torch.randperm(mine[0].numel(), generator=torch.Generator().manual_seed(seed))
        drawn = mine.flatten(1)[:, order].view_as(mine)
        values.append(_overlap(mine, true))
        lucky.append(_overlap(drawn, true))
    yield Measured(
        _setting(lab, ours, steps), stats.difference(values, lucky), f"it is {np.mean(values):.2f} on average"
    )


def _overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union, the mean over images."""
    both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
    return float((both / either.clamp_min(1)).mean())


@claim(
    "regione/edit",
    "The edit is followed as often as without the method",
    paper="GPT-4o overall: Step1X-Edit 6.906 to 6.948, Kontext 6.497 to 6.538, Qwen 7.700 to 7.731",
    metric="difference in the share of edits followed",
    direction="above",
    bound=-0.1,
    baseline="plain sampling with all steps",
)
def edits_are_followed(lab: Lab, steps: int) -> Iterator[Measured]:
    """By the subject's judge."""
    yield from _scores(lab, steps, "edit followed")


@claim(
    "regione/kept",
    "What is not edited is kept as well as without the method",
    paper="unedited regions stay as they are: the purpose of the jump",
    metric="difference in PSNR of the unedited half against the picture, dB",
    direction="above",
    bound=-1.0,
    baseline="plain sampling with all steps",
)
def the_rest_is_kept(lab: Lab, steps: int) -> Iterator[Measured]:
    """By the subject's judge."""
    yield from _scores(lab, steps, "PSNR unedited")


def _scores(lab: Lab, steps: int, name: str) -> Iterator[Measured]:
    for delta in DELTAS:
        ours = _method(lab, steps, delta)
        value = stats.difference(lab.score(ours, steps, name), lab.score_plain(steps, name))
        yield Measured(_setting(lab, ours, steps), value)


@claim(
    "regione/uniform",
    "At equal FLOPs it is better than reusing at evenly spread steps",
    paper="Step1X-Edit: PSNR 30.52 at 2.572 times against 28.262 at 2.493 times of TeaCache, the best baseline",
    baseline="residual reuse at evenly spread steps, FLOPs rounded up in its favour",
    **ALONE,
)
def against_uniform(lab: Lab, steps: int) -> Iterator[Measured]:
    """The whole method."""
    for delta in DELTAS:
        ours = _method(lab, steps, delta)
        even = [spread(n, steps) for n in lab.equal_flops(ours, steps)]
        theirs = lab.psnr_listed(even, "residual", steps)
        yield Measured(_setting(lab, ours, steps), stats.difference(lab.psnr(ours, steps), theirs))


@claim(
    "regione/fewer-steps",
    "At equal FLOPs it is better than sampling with fewer steps",
    paper="no figure; the purpose of any step cache",
    baseline="plain sampling with as many steps, FLOPs rounded up in its favour",
    **ALONE,
)
def against_fewer(lab: Lab, steps: int) -> Iterator[Measured]:
    """The whole method."""
    for delta in DELTAS:
        ours = _method(lab, steps, delta)
        yield Measured(_setting(lab, ours, steps), lab.gain_fewer(ours, lab.equal_flops(ours, steps), steps))


@claim(
    "regione/published-models",
    "On Step1X-Edit it is 2.572 times faster at PSNR 30.52, on FLUX.1 Kontext 2.409 times at 32.13",
    paper="H800, 28 steps: Step1X-Edit 2.572×, 30.520; FLUX.1 Kontext 2.409×, 32.133; Qwen-Image-Edit 2.059×, 31.115",
    metric="latency and PSNR",
    baseline="the uncached models",
    once=True,
)
def published_models(lab: Lab, steps: int) -> Iterator[Measured]:
    """Needs models and a data-centre GPU that this experiment does not assume."""
    yield Measured("", None, "it needs the weights of an editing model and an 80 GB GPU")
