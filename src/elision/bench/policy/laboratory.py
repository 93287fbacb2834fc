"""Where policies are tried: one subject, seeds of episodes, and a memory of everything that was already run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from elision.bench import stats
from elision.bench.dllm import shares
from elision.bench.policy.measure import Cost, Sampler, Way, answers, errors, run_episodes, time_chunk
from elision.bench.policy.subject import HELD_OUT, PolicySubject, Seen
from elision.bench.stats import Estimate
from elision.denoise.policy import DenoiseMethod
from elision.errors import OptionError
from elision.profile import Profile
from elision.zoo.metaworld import Episode

REQUESTS = 48  # that actions are compared on


@dataclass
class PolicyLab:
    """Runs ways of sampling on demand; what was run once is remembered, so that claims share their runs.

    Attributes:
        subject: what is tried.
        seeds: of the episodes of every task; every comparison is paired over episodes.
        told: called with what runs next.
        profiles: what methods are applied with; made on demand from one observation of every task.
    """

    subject: PolicySubject
    seeds: Sequence[int]
    told: Callable[[str], None] = field(default=lambda text: None)
    profiles: dict[tuple[DenoiseMethod, int], Profile] = field(default_factory=dict)
    _played: dict[tuple[Way, str], tuple[list[Episode], Cost]] = field(default_factory=dict)
    _errors: dict[Way, list[float]] = field(default_factory=dict)
    _requests: list[Seen] = field(default_factory=list)

    @property
    def plain(self) -> Way:
        """The uncached policy."""
        return Way(self.subject.steps)

    def warm_up(self, steps: int) -> None:
        """One chunk that is thrown away."""
        self.subject.answer(steps, self.subject.observations()[:1])

    # -- profiles ------------------------------------------------------------------------------------------------

    def fit(self, method: DenoiseMethod, steps: int) -> Profile:
        """What a method learns from one chunk for one observation of every task."""
        self.told(f"fitting {method.name}, {steps} steps")
        requests = self.subject.observations()
        return method.fit(self.subject.pipe, [lambda pipe: self.subject.answer(steps, requests)])

    def profile(self, way: Way) -> Profile | None:
        """The profile that a way of sampling needs, if any."""
        if way.method is None or not way.method.wants_profile:
            return None
        key = (way.method, way.steps)
        if key not in self.profiles:
            self.profiles[key] = self.fit(way.method, way.steps)
        return self.profiles[key]

    # -- runs ----------------------------------------------------------------------------------------------------

    def played(self, way: Way, task: str) -> tuple[list[Episode], Cost]:
        """Episodes of one task, in the order of the seeds, and what they cost."""
        if (way, task) not in self._played:
            self.told(f"{way.label}, {task}")
            told = self._requests.append if way == self.plain else None
            self._played[way, task] = run_episodes(self.subject, way, task, self.seeds, self.profile(way), told)
        return self._played[way, task]

    def episodes(self, way: Way) -> list[Episode]:
        """Episodes of all tasks."""
        return [episode for task in self.subject.tasks for episode in self.played(way, task)[0]]

    @cached_property
    def requests(self) -> list[Seen]:
        """Observations from all over the uncached policy's episodes."""
        self.episodes(self.plain)
        found = sorted(self._requests, key=lambda r: (self.subject.tasks.index(r.task), r.seed, r.chunk))
        count = min(REQUESTS, len(found))
        return [found[(2 * i + 1) * len(found) // (2 * count)] for i in range(count)]

    @cached_property
    def _truth(self) -> np.ndarray:
        return answers(self.subject, self.plain, self.requests)

    def errors(self, way: Way) -> list[float]:
        """How far actions are off the uncached policy's for the same observations and noise, one per observation."""
        if way not in self._errors:
            self.told(f"{way.label}, actions")
            self._errors[way] = errors(answers(self.subject, way, self.requests, self.profile(way)), self._truth)
        return self._errors[way]

    def spread(self) -> list[float]:
        """How far apart two uncached samples from different noise are: what an action error can be held against."""
        other = [Seen(r.task, r.seed + HELD_OUT, r.chunk, r.states) for r in self.requests]
        return errors(answers(self.subject, self.plain, other), self._truth)

    def times(self, ways: Sequence[Way], rounds: int) -> Mapping[Way, tuple[list[float], Cost]]:
        """Seconds per chunk for one robot, one number a round, and what a method held; ways take turns."""
        found: dict[Way, tuple[list[float], Cost]] = {way: ([], Cost(1, None, None, 0)) for way in ways}
        for turn in range(rounds):
            request = self.requests[turn % len(self.requests)]
            for way in [*ways[turn % len(ways) :], *ways[: turn % len(ways)]]:
                self.told(f"{way.label}, timing")
                seconds, cost = time_chunk(self.subject, way, request, self.profile(way))
                found[way] = ([*found[way][0], seconds], cost)
        return found

    # -- numbers -------------------------------------------------------------------------------------------------

    def solved(self, way: Way) -> list[float]:
        """1 or 0 for every episode of all tasks."""
        return [float(episode.solved) for episode in self.episodes(way)]

    def success(self, way: Way) -> Estimate:
        """Share of solved episodes, with Wilson's interval."""
        return shares.share(self.solved(way))

    def lead(self, ours: Way, theirs: Way) -> Estimate:
        """Success minus success, paired by episode, with Newcombe's interval."""
        return shares.lead(self.solved(ours), self.solved(theirs))

    def closer(self, ours: Way, theirs: Way) -> Estimate:
        """Action error of theirs over ours, paired by observation: above 1, ours is closer to the uncached policy."""
        pairs = zip(self.errors(theirs), self.errors(ours), strict=True)
        kept = [(a, b) for a, b in pairs if a > 0 and b > 0]
        return stats.ratio([a for a, _ in kept], [b for _, b in kept])

    def cost(self, way: Way) -> Cost:
        """What all episodes of a way cost together."""
        if way.method is None:
            whole = self.whole
            per = None if whole is None else round(whole * way.steps / self.subject.steps)
            chunks = sum(e.chunks for e in self.episodes(way))
            return Cost(chunks, None if per is None else per * chunks, None if per is None else per * chunks, 0)
        costs = [self.played(way, task)[1] for task in self.subject.tasks]
        known = [(c.computed, c.whole) for c in costs if c.computed is not None and c.whole is not None]
        chunks, peak = sum(c.chunks for c in costs), max(c.bytes_peak for c in costs)
        if len(known) < len(costs):
            return Cost(chunks, None, None, peak)
        return Cost(chunks, sum(c for c, _ in known), sum(w for _, w in known), peak)

    @cached_property
    def whole(self) -> float | None:
        """Operations of an uncached chunk, counted while a method that changes nothing is applied."""
        from elision.denoise.methods.uniform import Uniform

        request = self.subject.observations()[:1]
        _, cost = time_chunk(self.subject, Way(self.subject.steps, Uniform(interval=1)), request[0])
        return cost.per_chunk

    def equal_steps(self, way: Way) -> int:
        """Steps of the plain run whose denoiser costs at least as much."""
        share = self.cost(way).share
        if share is None:
            raise OptionError(f"the operations of {way.label} cannot be counted, so nothing has equal cost")
        return min(way.steps, max(1, math.ceil(share * way.steps - 1e-9)))

    def fewer(self, way: Way, sampler: Sampler = "ddim") -> Way:
        """Plain sampling that costs at least as much."""
        return Way(self.equal_steps(way), None, sampler)
