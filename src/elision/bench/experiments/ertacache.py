"""Claims of ERTACache (ICLR 2026, arXiv 2508.21091)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from torch import Tensor

from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.lab import Lab
from elision.bench.listed import spread
from elision.denoise.methods.ertacache import ERTACache

THRESHOLDS = (0.06, 0.1, 0.15)
CALIBRATION = 2  # batches of one image per class


def _arms(threshold: float) -> dict[str, ERTACache]:
    """The method without its corrections, with one of them, and with both; nothing of ours in between."""
    whole = ERTACache(threshold=threshold, max_frozen=999)
    return {
        "list": replace(whole, adjust=False, rectify="off"),
        "step": replace(whole, rectify="off"),
        "output": replace(whole, adjust=False),
        "both": whole,
    }


def _fitted(lab: Lab, threshold: float, steps: int) -> tuple[dict[str, ERTACache], str]:
    """All arms with one profile, and what to call the setting."""
    arms = _arms(threshold)
    if (arms["list"], steps) not in lab.profiles:
        lab.give(list(arms.values()), steps, lab.fit(arms["both"], steps, CALIBRATION))
    skipped = len(lab.profiles[arms["list"], steps].tensors["reused"])
    return arms, f"lambda {threshold:g}, {steps - skipped} computed"


def _gains(lab: Lab, steps: int, ours: str, theirs: str) -> Iterator[Measured]:
    for threshold in THRESHOLDS:
        arms, setting = _fitted(lab, threshold, steps)
        phi = lab.profiles[arms["list"], steps].tensors["phi"]
        frozen = f"{int((phi < 0.05).sum())} step factors are about 0" if "step" in (ours, theirs) else ""
        yield Measured(setting, lab.gain(arms[ours], arms[theirs], steps), frozen)


@claim(
    "ertacache/list",
    "At equal computed steps, the list found offline is better than even spreading",
    paper="Wan2.1-1.3B: PSNR 22.09 with the list, 13.76 uniform",
    metric="PSNR difference, dB",
    baseline="residual reuse at evenly spread steps, as many",
)
def list_against_uniform(lab: Lab, steps: int) -> Iterator[Measured]:
    """(a) alone minus even spreading of the same stand-in."""
    for threshold in THRESHOLDS:
        arms, setting = _fitted(lab, threshold, steps)
        yield Measured(setting, lab.gain_spread(arms["list"], steps))


@claim(
    "ertacache/step",
    "Shrinking the solver step of skipped steps improves the list",
    paper="Wan2.1-1.3B: PSNR 22.94 with it, 22.09 without",
    metric="PSNR difference, dB",
    baseline="the same list with nominal steps",
)
def step_against_list(lab: Lab, steps: int) -> Iterator[Measured]:
    """(a) + (b) minus (a)."""
    return _gains(lab, steps, "step", "list")


@claim(
    "ertacache/output",
    "Correcting the cached output improves the list",
    paper="no figure alone; on top of the step sizes PSNR 23.77 with it, 22.94 without",
    metric="PSNR difference, dB",
    baseline="the same list, uncorrected",
)
def output_against_list(lab: Lab, steps: int) -> Iterator[Measured]:
    """(a) + (c) minus (a)."""
    return _gains(lab, steps, "output", "list")


@claim(
    "ertacache/both",
    "Correcting the cached output improves the list with shrunken steps",
    paper="Wan2.1-1.3B: PSNR 23.77 with it, 22.94 without",
    metric="PSNR difference, dB",
    baseline="the same list and step sizes, uncorrected",
)
def both_against_step(lab: Lab, steps: int) -> Iterator[Measured]:
    """(a) + (b) + (c) minus (a) + (b)."""
    return _gains(lab, steps, "both", "step")


@claim(
    "ertacache/order",
    "The list is the largest single gain over even spreading",
    paper="Wan2.1-1.3B: of 10.01 dB over uniform, 8.33 come from the list",
    metric="PSNR gain of the list minus the larger gain of a correction, dB",
    baseline="the gain of the step sizes or of the output correction on top of the list",
)
def list_is_largest(lab: Lab, steps: int) -> Iterator[Measured]:
    """Per seed."""
    for threshold in THRESHOLDS:
        arms, setting = _fitted(lab, threshold, steps)
        even = [spread(n, steps) for n in lab.counts(arms["list"], steps)]
        plain, uniform = np.array(lab.psnr(arms["list"], steps)), np.array(lab.psnr_listed(even, "residual", steps))
        others = [np.array(lab.psnr(arms[name], steps)) - plain for name in ("step", "output")]
        yield Measured(setting, stats.difference((plain - uniform).tolist(), np.maximum(*others).tolist()))


@claim(
    "ertacache/fewer-steps",
    "At equal computed steps it is better than sampling with fewer steps",
    paper="no figure; the purpose of any step cache",
    metric="PSNR difference, dB",
    baseline="plain sampling with as many steps",
)
def against_fewer(lab: Lab, steps: int) -> Iterator[Measured]:
    """The list with the output correction, and the whole method, minus plain sampling."""
    for threshold in THRESHOLDS:
        arms, setting = _fitted(lab, threshold, steps)
        for name, told in (("output", "without step sizes"), ("both", "whole")):
            value = lab.gain_fewer(arms[name], lab.counts(arms[name], steps), steps)
            yield Measured(f"{setting}, {told}", value)


@claim(
    "ertacache/profile",
    "The errors over the steps are almost the same whatever is drawn",
    paper="shown as a figure: curves of different prompts coincide, so one list serves all",
    metric="spread of the relative error between runs, over its mean",
    direction="below",
    bound=0.2,
    baseline="a fifth of the error itself",
)
def curves_coincide(lab: Lab, steps: int) -> Iterator[Measured]:
    """Standard deviation between calibration runs over the mean, per step that may be skipped."""
    for threshold in THRESHOLDS:
        arms, setting = _fitted(lab, threshold, steps)
        errors: Tensor = lab.profiles[arms["list"], steps].tensors["relative_errors"][:, 1:]
        yield Measured(setting, stats.mean((errors.std(0) / errors.mean(0)).tolist()), "interval over steps")


@claim(
    "ertacache/published-models",
    "On Wan2.1-1.3B it is 2.17 times faster at PSNR 23.77, on FLUX.1-dev 1.86 times at 20.51",
    paper="Wan2.1-1.3B 2.17×, PSNR 23.77, LPIPS 0.1095; FLUX.1-dev 1.86×, 20.51, 0.3029 (A800)",
    metric="latency and PSNR",
    baseline="the uncached models",
    once=True,
)
def published_models(lab: Lab, steps: int) -> Iterator[Measured]:
    """Needs models and a data-centre GPU that this experiment does not assume."""
    yield Measured("", None, "it needs Wan2.1 or FLUX.1-dev weights and an 80 GB GPU")
