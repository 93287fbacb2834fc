"""One run of one arm: the images, and the numbers that the method's report gives."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import elision
from elision.bench.peers import Peer, run_peer
from elision.bench.subject import Subject
from elision.denoise.report import DenoiseReport
from elision.errors import ElisionWarning
from elision.method import Method


@dataclass
class Sample:
    """What one arm did from the noise of one seed.

    Attributes:
        seed: of the noise.
        steps: steps of the run.
        seconds: wall time of the pipeline's call.
        steps_computed: steps of a plain run with as many operations of the denoiser (of steps, where those cannot be
            counted).
        steps_decided: steps that a method decided to compute; a step in which only some sites were counts by their
            share, whatever else ran in it.
        calls: times the denoiser really ran; None until a method on the same model has told.
        flops: operations of the denoiser, where they can be counted.
        bytes_peak: the most that the method held.
        states: what happened at each step: computed, reused, predicted, mixed.
        psnr: per image, against the uncached run from the same noise.
        ssim: likewise.
        lpips: likewise, empty where it cannot be had.
        scores: what the subject's judge says, by name: a number for every prompt.
        standing_in: seconds of predictor arithmetic and
        deciding: of decisions, inside the wall time.
        notes: what the report wants a careful user to know.
    """

    seed: int
    steps: int
    seconds: float
    steps_computed: float
    calls: int | None = None
    flops: int | None = None
    bytes_peak: int = 0
    states: list[str] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    standing_in: float = 0.0
    deciding: float = 0.0
    notes: list[str] = field(default_factory=list)
    steps_decided: float = 0.0

    @property
    def equal_steps(self) -> int:
        """Steps of the plain run that costs as much."""
        return max(1, round(self.steps_computed))


def _decided(report: DenoiseReport) -> float:
    """Steps by decisions."""
    outputs = report.outputs_computed + report.outputs_stood_in
    return report.steps * report.outputs_computed / outputs if outputs else float(report.steps)


def run_plain(subject: Subject, steps: int, seed: int) -> tuple[Tensor, Sample]:
    """Sample without any method."""
    images, seconds = subject.sample(steps, seed)
    return images, Sample(seed, steps, seconds, steps, states=["computed"] * steps, steps_decided=steps)


def run_method(
    subject: Subject, method: Method | Sequence[Method], steps: int, seed: int, profile: Any = None
) -> tuple[Tensor, Sample, DenoiseReport]:
    """Sample with a method applied; applying and removing it are outside of the measured time.

    A run that elides nothing is a result here, not a mistake: the library's warning becomes a note of the sample.
    """
    if isinstance(method, Peer):
        images, seconds, report = run_peer(subject, method, steps, seed)
        return images, _sample(seed, steps, seconds, report), report
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ElisionWarning)
        options: dict[str, Any] = {} if profile is None else {"profile": profile}
        with elision.apply(subject.pipe, method, **options) as run:
            images, seconds = subject.sample(steps, seed)
        found = run.report()
    assert isinstance(found, DenoiseReport)
    for other in caught:
        if not issubclass(other.category, ElisionWarning):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return images, _sample(seed, steps, seconds, found), found


def regions_of(report: DenoiseReport) -> Tensor | None:
    """Where a method saw something to edit in its latest run: [B, h, w] bool, None where it does not say.

    It says so in its run's `extra`: `mask` holds 0 and 1 for every token, image by image and row by row.
    """
    extra = getattr(report.last, "extra", {})
    shown = [entry["mask"] for entry in extra.values() if "mask" in entry]
    return torch.tensor(shown[0], dtype=torch.bool) if shown else None


def _sample(seed: int, steps: int, seconds: float, report: DenoiseReport) -> Sample:
    mine, left, decided = report.flops_computed, report.flops_elided, _decided(report)
    known = mine is not None and left is not None and mine + left > 0
    return Sample(
        seed,
        steps,
        seconds,
        steps * mine / (mine + left) if known else decided,  # type: ignore[operator]
        report.calls - report.calls_elided,
        report.flops_computed,
        report.bytes_peak,
        list(report.last.states()) if report.last else [],
        standing_in=report.seconds.standing_in,
        deciding=report.seconds.deciding,
        notes=list(report.notes),
        steps_decided=decided,
    )
