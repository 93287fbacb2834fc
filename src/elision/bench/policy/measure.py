"""One way of sampling action chunks: is the task done, how far are the actions off, how long does a chunk take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import elision
from elision.bench.policy.subject import PolicySubject, Seen
from elision.bench.spec import Spec
from elision.denoise.policy import DenoiseMethod
from elision.denoise.report import DenoiseReport
from elision.errors import ElisionWarning
from elision.profile import Profile
from elision.zoo.metaworld import Episode

Sampler = Literal["ddpm", "ddim"]


@dataclass(frozen=True)
class Way:
    """How chunks are sampled.

    Attributes:
        steps: denoising steps.
        method: what is applied, if anything.
        sampler: the policy's own DDPM, or DDIM.
    """

    steps: int
    method: DenoiseMethod | None = None
    sampler: Sampler = "ddpm"

    @property
    def label(self) -> str:
        """Text that names it."""
        if self.method is None:
            return f"{self.sampler}:steps={self.steps}"
        return Spec(self.method).label + (f" ({self.sampler})" if self.sampler != "ddpm" else "")


@dataclass(frozen=True)
class Cost:
    """What the denoiser did for a number of chunks.

    Attributes:
        chunks: rows of all pipeline calls.
        computed: operations that ran, and
        whole: that would have run without the method; None where they cannot be counted.
        bytes_peak: the most that the method held.
    """

    chunks: int
    computed: int | None
    whole: int | None
    bytes_peak: int

    @property
    def per_chunk(self) -> float | None:
        """Operations of one chunk."""
        return None if self.computed is None else self.computed / self.chunks

    @property
    def share(self) -> float | None:
        """Part of the operations that ran."""
        return None if self.computed is None or not self.whole else self.computed / self.whole


@contextmanager
def applied(subject: PolicySubject, way: Way, profile: Profile | None = None) -> Iterator[Callable[[int], Cost]]:
    """The pipeline samples this way; gives the function that tells the cost of so many chunks, at the end."""
    with subject.sampler(way.sampler), warnings.catch_warnings():
        warnings.simplefilter("ignore", ElisionWarning)  # an arm that elides nothing is a result here, not a mistake
        if way.method is None:
            yield lambda chunks: Cost(chunks, None, None, 0)
            return
        settings: dict[str, Any] = {} if profile is None else {"profile": profile}
        with elision.apply(subject.pipe, way.method, **settings) as run:
            yield lambda chunks: _cost(run.report(), chunks)


def _cost(report: Any, chunks: int) -> Cost:
    assert isinstance(report, DenoiseReport)
    if report.flops_computed is None or report.flops_elided is None:
        return Cost(chunks, None, None, report.bytes_peak)
    whole = report.flops_computed + report.flops_elided
    return Cost(chunks, report.flops_computed, whole, report.bytes_peak)


def run_episodes(
    subject: PolicySubject,
    way: Way,
    task: str,
    seeds: Sequence[int],
    profile: Profile | None = None,
    told: Callable[[Seen], None] | None = None,
) -> tuple[list[Episode], Cost]:
    """Episodes of one task; those that run together are one batch, so criteria of online methods are the batch's."""
    with applied(subject, way, profile) as cost:
        played = subject.episodes(way.steps, task, seeds, told)
        return played, cost(sum(e.chunks for e in played))


def answers(subject: PolicySubject, way: Way, requests: Sequence[Seen], profile: Profile | None = None) -> NDArray[Any]:
    """Actions [N, n, A] for the same requests and the same noise, whatever way was used in their episodes."""
    with applied(subject, way, profile):
        return subject.answer(way.steps, requests)


def errors(found: NDArray[Any], truth: NDArray[Any]) -> list[float]:
    """Root mean square difference of the actions of every request; actions are in [-1, 1]."""
    return [float(x) for x in np.sqrt(np.square(found - truth).mean(axis=(1, 2)))]


def time_chunk(subject: PolicySubject, way: Way, request: Seen, profile: Profile | None = None) -> tuple[float, Cost]:
    """Seconds for one chunk of one robot, and the bytes held for it; applying and a first chunk are not timed."""
    with applied(subject, way, profile) as cost:
        subject.answer(way.steps, [request])
        started = perf_counter()
        subject.answer(way.steps, [request])
        return perf_counter() - started, cost(2)
