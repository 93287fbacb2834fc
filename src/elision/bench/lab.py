"""Where experiments run: one subject, some seeds, and a memory of everything that was already sampled."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from elision.bench import metrics, stats
from elision.bench.listed import Listed, spread
from elision.bench.measure import Sample, run_method, run_plain
from elision.bench.stats import Estimate
from elision.bench.subject import Subject
from elision.denoise.fit._record import record
from elision.denoise.report import DenoiseReport
from elision.denoise.sites import Level
from elision.errors import UnsupportedTarget
from elision.method import Method
from elision.profile import Profile


@dataclass
class Lab:
    """Samples on demand; whatever was sampled once is remembered, so that claims share their runs.

    Attributes:
        subject: what is sampled.
        seeds: of the noise; every number is paired over them.
        told: called with what runs next.
        profiles: what methods run with at a number of steps; see `give`.
    """

    subject: Subject
    seeds: Sequence[int]
    told: Callable[[str], None] = field(default=lambda text: None)
    profiles: dict[tuple[Method, int], Profile] = field(default_factory=dict)
    _plain: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _runs: dict[tuple[Method, int, int], tuple[Tensor, Sample, DenoiseReport]] = field(default_factory=dict)

    def plain(self, steps: int, seed: int) -> Tensor:
        """Images of plain sampling."""
        if (steps, seed) not in self._plain:
            self.told(f"plain, {steps} steps, seed {seed}")
            self._plain[steps, seed] = run_plain(self.subject, steps, seed)[0]
        return self._plain[steps, seed]

    def run(self, method: Method, steps: int, seed: int) -> tuple[Tensor, Sample, DenoiseReport]:
        """Images, numbers and report of a method."""
        key = (method, steps, seed)
        if key not in self._runs:
            self.told(f"{method.name}, {steps} steps, seed {seed}")
            profile = self.profiles.get((method, steps))
            self._runs[key] = run_method(self.subject, method, steps, seed, profile)
        return self._runs[key]

    def give(self, methods: Sequence[Method], steps: int, profile: Profile) -> None:
        """Let these methods run with a profile at this number of steps."""
        self.profiles.update({(method, steps): profile for method in methods})

    def fit(self, method: Method, steps: int, count: int = 2) -> Profile:
        """What a method learns from `count` runs whose noise no experiment is evaluated on."""
        self.told(f"fitting {method.name}, {steps} steps")
        held_out = range(max(self.seeds) + 1000, max(self.seeds) + 1000 + count)
        return method.fit(self.subject.pipe, [self._call(steps, seed) for seed in held_out])

    def _call(self, steps: int, seed: int) -> Callable[[Any], Any]:
        return lambda pipe: self.subject.sample(steps, seed)

    def warm_up(self, steps: int) -> None:
        """One run that is thrown away."""
        run_plain(self.subject, steps, self.seeds[0] + 10_000)

    # -- quality, one number per seed ----------------------------------------------------------------------------

    def psnr_of(self, images: Tensor, steps: int, seed: int) -> float:
        """Mean PSNR of images against plain sampling with `steps` steps from the same noise."""
        return float(np.mean(metrics.psnr(images, self.plain(steps, seed))))

    def psnr(self, method: Method, steps: int) -> list[float]:
        """PSNR of a method, per seed."""
        return [self.psnr_of(self.run(method, steps, seed)[0], steps, seed) for seed in self.seeds]

    def mse(self, method: Method, steps: int) -> list[float]:
        """Mean squared error of a method's images, per seed."""
        pairs = [(self.run(method, steps, seed)[0], self.plain(steps, seed)) for seed in self.seeds]
        return [float((mine - truth).square().mean()) for mine, truth in pairs]

    def psnr_fewer(self, counts: Sequence[int], steps: int) -> list[float]:
        """PSNR of plain sampling with `counts` steps, one for each seed."""
        return [self.psnr_of(self.plain(n, s), steps, s) for n, s in zip(counts, self.seeds, strict=True)]

    def psnr_listed(self, computed: Sequence[Sequence[int]], keep: Any, steps: int) -> list[float]:
        """PSNR of computing exactly these steps, one list for each seed."""
        return [
            self.psnr_of(self.run(Listed(tuple(c), keep), steps, seed)[0], steps, seed)
            for c, seed in zip(computed, self.seeds, strict=True)
        ]

    def scores_of(self, images: Tensor, steps: int, seed: int) -> dict[str, list[float]]:
        """What the subject's judge says of images, by name: a number for every prompt."""
        judge = self.subject.judge
        if judge is None:
            raise UnsupportedTarget(f"nothing judges what {self.subject.name} draws")
        given = judge.scores(images, self.plain(steps, seed), self.subject)
        return {name: list(values) for name, values in given.items()}

    def score(self, method: Method, steps: int, name: str) -> list[float]:
        """A score of a method's samples, per seed."""
        return [self._score(self.run(method, steps, seed)[0], steps, seed, name) for seed in self.seeds]

    def score_plain(self, steps: int, name: str, counts: Sequence[int] | None = None) -> list[float]:
        """A score of plain sampling, per seed; with `counts` of that many steps, one for each seed."""
        counts = [steps] * len(self.seeds) if counts is None else counts
        return [self._score(self.plain(n, s), steps, s, name) for n, s in zip(counts, self.seeds, strict=True)]

    def _score(self, images: Tensor, steps: int, seed: int, name: str) -> float:
        found = self.scores_of(images, steps, seed)
        if name not in found:
            raise UnsupportedTarget(f"{self.subject.name} is not judged by {name!r}, only by {', '.join(found)}")
        return float(np.mean(found[name]))

    # -- cost, one number per seed -------------------------------------------------------------------------------

    def computed(self, method: Method, steps: int) -> list[tuple[int, ...]]:
        """The steps that a method computed, per seed."""
        found: list[tuple[int, ...]] = []
        for seed in self.seeds:
            states = self.run(method, steps, seed)[1].states
            found.append(tuple(n for n, state in enumerate(states) if state != "reused" and state != "predicted"))
        return found

    def counts_at(self, method: Method, steps: int, seed: int) -> int:
        """How many steps a method decided to compute from one seed."""
        return max(1, round(self.run(method, steps, seed)[1].steps_decided))

    def counts(self, method: Method, steps: int) -> list[int]:
        """How many steps a method computed, per seed."""
        return [self.counts_at(method, steps, seed) for seed in self.seeds]

    def equal_flops(self, method: Method, steps: int) -> list[int]:
        """Steps of the plain run whose denoiser costs at least as much, per seed."""
        found: list[int] = []
        for seed in self.seeds:
            report = self.run(method, steps, seed)[2]
            mine, left = report.flops_computed, report.flops_elided
            if mine is None or left is None:
                found.append(self.counts_at(method, steps, seed))
            else:
                found.append(max(1, -(-mine * steps // (mine + left))))
        return found

    # -- comparisons ---------------------------------------------------------------------------------------------

    def gain(self, ours: Method, theirs: Method, steps: int) -> Estimate:
        """PSNR of one method minus that of another."""
        return stats.difference(self.psnr(ours, steps), self.psnr(theirs, steps))

    def score_gain(self, ours: Method, theirs: Method, steps: int, name: str) -> Estimate:
        """A score of one method minus that of another."""
        return stats.difference(self.score(ours, steps, name), self.score(theirs, steps, name))

    def gain_fewer(self, ours: Method, counts: Sequence[int], steps: int) -> Estimate:
        """PSNR of a method minus that of plain sampling with `counts` steps."""
        return stats.difference(self.psnr(ours, steps), self.psnr_fewer(counts, steps))

    def gain_spread(self, ours: Method, steps: int) -> Estimate:
        """PSNR of a method minus that of residual reuse with as many computed steps, evenly spread."""
        even = [spread(n, steps) for n in self.counts(ours, steps)]
        return stats.difference(self.psnr(ours, steps), self.psnr_listed(even, "residual", steps))

    def watch(self, level: Level, steps: int, seed: int, seen: Callable[..., None]) -> None:
        """An uncached run; `seen(host, step, site, call, out)` is shown every call of the sites of a level."""
        self.told(f"recording, {steps} steps, seed {seed}")
        record(self.subject.pipe, level, [lambda pipe: self.subject.sample(steps, seed)], seen)


def lab_for(subject: Subject, seeds: Sequence[int], told: Callable[[str], None]) -> Any:
    """The laboratory for this kind of subject: a `Lab`, or that of policies."""
    if subject.kind == "policy":
        return importlib.import_module("elision.bench.policy").lab(subject, seeds, told)
    return Lab(subject, seeds, told)


def random_steps(count: int, total: int, seed: int) -> tuple[int, ...]:
    """`count` steps of `total`, the first among them, the others drawn at random."""
    return (0, *sorted(random.Random(seed).sample(range(1, total), count - 1)))
