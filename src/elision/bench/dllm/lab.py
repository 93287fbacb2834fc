"""Where experiments on masked-diffusion models run: one model, questions, and a memory of every run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elision.bench import stats
from elision.bench.claims import Measured
from elision.bench.dllm import shares
from elision.bench.dllm.drift import Drifts, drifts
from elision.bench.dllm.measure import Arm, Outcome, run
from elision.bench.dllm.subject import TASKS, DllmSubject, Question
from elision.bench.stats import Estimate
from elision.dllm.engine import generate
from elision.dllm.methods.fewer_steps import FewerSteps
from elision.dllm.methods.fixed_interval import FixedInterval
from elision.errors import OptionError

UNCACHED = Arm.of("no_cache")
INTERVALS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 512)


@dataclass
class DllmLab:
    """Runs arms on demand; what ran once is remembered, so that claims share their runs.

    Attributes:
        subject: the model.
        seeds: a question of every task for each; every number is paired over questions.
        told: called with what runs next.
        tasks: which tasks; those of `TASKS` that the subject has, if not given.
    """

    subject: DllmSubject
    seeds: Sequence[int]
    told: Callable[[str], None] = field(default=lambda text: None)
    tasks: Sequence[str] = ()
    _tried: dict[tuple[Arm, str, int, int], Outcome] = field(default_factory=dict)
    _drifts: dict[tuple[str, int, int], Drifts] = field(default_factory=dict)
    _warm: bool = False

    def __post_init__(self) -> None:
        """The tasks that the subject has."""
        self.tasks = self.tasks or [name for name in TASKS if name in self.subject.tasks] or self.subject.tasks

    def questions(self, length: int, tasks: Sequence[str] = ()) -> list[Question]:
        """All questions of a length."""
        return [self.subject.question(task, length, seed) for task in tasks or self.tasks for seed in self.seeds]

    def outcomes(self, arm: Arm, length: int, tasks: Sequence[str] = ()) -> list[Outcome]:
        """What an arm made of every question, one at a time."""
        found = []
        for question in self.questions(length, tasks):
            key = (arm, question.task, length, question.seed)
            if key not in self._tried:
                self.told(f"{arm.label}, {question.task} {length}, seed {question.seed}")
                self._warm_up(question)
                self._tried[key] = run(self.subject, arm, question)[1]
            found.append(self._tried[key])
        return found

    def _warm_up(self, question: Question) -> None:
        if not self._warm:
            self._warm = True
            generate(self.subject.lm, question.ids, gen_length=question.block, steps=2)

    # -- one number per question ---------------------------------------------------------------------------------------

    def values(self, arm: Arm, what: str, length: int, tasks: Sequence[str] = ()) -> list[float]:
        """A field of every outcome: "exact", "right", "token_layers", "speed" ..."""
        values = [getattr(outcome, what) for outcome in self.outcomes(arm, length, tasks)]
        if any(value is None for value in values):
            raise OptionError(f"{self.subject.name} is asked what has no right answer, so {what!r} is not defined")
        return [float(value) for value in values]

    def total(self, arm: Arm, what: str, length: int, tasks: Sequence[str] = ()) -> float:
        """The sum over all questions."""
        return math.fsum(self.values(arm, what, length, tasks))

    def exact(self, arm: Arm, length: int, tasks: Sequence[str] = ()) -> float:
        """Share of right answers."""
        return self.total(arm, "exact", length, tasks) / len(self.questions(length, tasks))

    def cost(self, arm: Arm, length: int, tasks: Sequence[str] = ()) -> float:
        """Token-layers as a share of those of the uncached run."""
        return self.total(arm, "token_layers", length, tasks) / self.total(UNCACHED, "token_layers", length, tasks)

    # -- comparisons ---------------------------------------------------------------------------------------------------

    def lead(self, ours: Arm, theirs: Arm, length: int, tasks: Sequence[str] = ()) -> Estimate:
        """Share of right answers of one arm minus that of another, paired by question."""
        return shares.lead(self.values(ours, "exact", length, tasks), self.values(theirs, "exact", length, tasks))

    def ratio(self, ours: Arm, theirs: Arm, what: str, length: int, tasks: Sequence[str] = ()) -> Estimate:
        """How many times as much of something one arm has, paired by question."""
        return stats.ratio(self.values(ours, what, length, tasks), self.values(theirs, what, length, tasks))

    def versus(self, ours: Arm, theirs: Arm, length: int, tasks: Sequence[str] = ()) -> Measured:
        """The lead of one arm over another, with both sides' shares and costs as a remark."""
        told = " and ".join(
            f"{self.exact(arm, length, tasks):.0%} right at {self.cost(arm, length, tasks):.1%} of the token-layers"
            for arm in (ours, theirs)
        )
        setting = f"{_where(length, tasks)}: {ours.label} against {theirs.label}"
        return Measured(setting, self.lead(ours, theirs, length, tasks), told)

    def loss(self, ours: Arm, length: int, tasks: Sequence[str] = ()) -> Measured:
        """How much smaller the share of right answers is than the uncached one's."""
        told = f"{self.exact(ours, length, tasks):.0%} right, {self.exact(UNCACHED, length, tasks):.0%} uncached"
        value = self.lead(UNCACHED, ours, length, tasks)
        return Measured(f"{_where(length, tasks)}: {ours.label}", value, told)

    def race(self, entries: Sequence[tuple[Arm, int]], tasks: Sequence[str] = (), count: int = 5) -> list[list[float]]:
        """Tokens per second of arms, each at a length, in turn on the same `count` questions, spread over the tasks.

        Nothing that was remembered is used: runs at different times of a busy machine cannot be compared.
        """
        asked = [self.questions(length, tasks) for _, length in entries]
        places = [int(i) for i in np.linspace(0, len(asked[0]) - 1, min(count, len(asked[0])))]
        found: list[list[float]] = [[] for _ in entries]
        for turn, place in enumerate(places):
            for i in [(turn + k) % len(entries) for k in range(len(entries))]:
                arm, question = entries[i][0], asked[i][place]
                self.told(f"timing {arm.label}, {question.task} {question.length}, seed {question.seed}")
                self._warm_up(question)
                found[i].append(run(self.subject, arm, question)[1].speed)
        return found

    def speedup(self, ours: Arm, length: int, tasks: Sequence[str] = (), base: Arm = UNCACHED) -> Measured:
        """Wall clock: how many times as many tokens per second as the uncached run, one question at a time."""
        mine, other = self.race([(ours, length), (base, length)], tasks)
        told = f"{np.mean(mine):.0f} and {np.mean(other):.0f} tokens per second"
        return Measured(f"{_where(length, tasks)}: {ours.label}", stats.ratio(mine, other), told)

    # -- equal cost ----------------------------------------------------------------------------------------------------

    def fewer(self, like: Arm, length: int, tasks: Sequence[str] = ()) -> Arm:
        """Plain decoding with the fewest calls that cost at least as much as the arm `like`.

        Calls of a block are whole numbers, so there are only as many costs to choose from as a block has tokens.
        """
        block = self.questions(length, tasks)[0].block
        calls = min(max(math.ceil(self.cost(like, length, tasks) * block - 1e-9), 1), block)
        return Arm.of(FewerSteps(factor=round(block / calls, 3)))

    def clocked(self, like: Arm, length: int, tasks: Sequence[str] = (), **options: Any) -> Arm:
        """A refresh by the clock with the largest interval that costs at least as much as the arm `like`."""
        target = self.total(like, "token_layers", length, tasks)
        low, high = 0, len(INTERVALS) - 1
        while low < high:  # costs fall with the interval, as far as threshold commits allow
            middle = (low + high + 1) // 2
            arm = Arm.of(FixedInterval(interval=INTERVALS[middle], **options))
            if self.total(arm, "token_layers", length, tasks) >= target:
                low = middle
            else:
                high = middle - 1
        return Arm.of(FixedInterval(interval=INTERVALS[low], **options))

    # -- drift ---------------------------------------------------------------------------------------------------------

    def drifts(self, length: int, count: int = 6) -> list[Drifts]:
        """Drift of true keys and values in uncached runs of `count` questions, spread over the tasks."""
        questions = self.questions(length)
        found = []
        for place in np.linspace(0, len(questions) - 1, min(count, len(questions))):
            question = questions[int(place)]
            key = (question.task, length, question.seed)
            if key not in self._drifts:
                self.told(f"drift, {question.task} {length}, seed {question.seed}")
                self._drifts[key] = drifts(self.subject, UNCACHED, question)
            found.append(self._drifts[key])
        return found


def _where(length: int, tasks: Sequence[str]) -> str:
    return f"N = {length}" + (f", {', '.join(tasks)}" if tasks else "")
