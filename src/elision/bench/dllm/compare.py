"""Comparisons for masked-diffusion models: no cache, methods and controls on the same questions, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from elision.bench.dllm.drift import drifts
from elision.bench.dllm.lab import UNCACHED
from elision.bench.dllm.measure import Arm, Outcome, options, run
from elision.bench.dllm.subject import TASKS, DllmSubject, Question, load_dllm
from elision.bench.dllm.summary import DllmArm, DllmComparison, Kind, Strip
from elision.bench.spec import parse_many
from elision.dllm.methods.fewer_steps import FewerSteps
from elision.dllm.policy import DllmMethod
from elision.errors import OptionError, UnknownName

AUTO = (
    "dkv_cache",
    "dkv_cache:interval=16",
    "dkv_cache:variant=pd",
    "elastic_cache_dllm",
    "elastic_cache_dllm:gamma=0.98",
    "fast_dllm",
)
CONTROLS = (
    Arm.of("fixed_interval:interval=8,window=16,threshold=0.9"),
    Arm.of("dkv_cache:delay=false"),
    Arm.of("no_cache", window=16, threshold=0.9),
)
LENGTHS = (64, 256, 512)
_BUDGET = 512  # of questions times length per task, where no number of questions is asked for
Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None:
    del done, total, what


def compare_dllm(
    model: Any = "digits-mdlm",
    methods: str | Iterable[str] = "auto",
    *,
    tasks: str | Sequence[str] | None = None,
    questions: int | Sequence[int] | None = None,
    lengths: int | Sequence[int] = LENGTHS,
    prompts: Sequence[Any] | None = None,
    controls: bool = True,
    progress: Progress = _silent,
) -> DllmComparison:
    """Compare methods on one masked-diffusion model, each beside the uncached run and its equal-cost controls.

    Every question is answered by every arm, one question at a time, in an order that is rotated from question to
    question. For every method there is an arm that decodes plainly, with the fewest calls per block that cost at least
    as much. One question of the shortest length is answered once more in shadow mode, for the strips of the report.

    Args:
        model: a zoo name, a folder, a hub id, a model object or a `DllmSubject`.
        methods: texts like "dkv_cache:interval=4", or "auto".
        tasks: names of tasks; by default written-out sums and recall.
        questions: how many per task at every length, or which seeds; by default 8 at length 64, and fewer at greater
            lengths.
        lengths: of prompt and answer together, at most.
        prompts: texts to continue, for models without questions of their own; lengths are then of the continuation.
        controls: whether to add a refresh by the clock, caching without delay, parallel commits without a cache, and
            fewer calls at equal cost.
        progress: told how many of how many runs are done, and what runs next.
    """
    specs = parse_many(AUTO if methods == "auto" else methods)
    for spec in specs:
        if not isinstance(spec.method, DllmMethod):
            raise OptionError(f"{spec.name} is a method of the family {spec.method.family!r}, not of 'dllm'")
    asked = [Arm(spec.method) for spec in specs if isinstance(spec.method, DllmMethod)]
    arms = list(dict.fromkeys([UNCACHED, *asked, *(CONTROLS if controls else ())]))
    grid = [lengths] if isinstance(lengths, int) else list(lengths)
    if not grid or min(grid) < 1:
        raise OptionError(f"lengths={grid} is out of range; each must be at least 1")
    subject = load_dllm(model, prompts)
    chosen, seeds = _tasks(tasks, subject), {length: _seeds(questions, length) for length in grid}
    found = {arm: DllmArm(_kind(arm, asked), arm.label, options=options(arm)) for arm in arms}
    race = _Race(subject, found, progress)
    for length in grid:
        race.run([subject.question(task, length, seed) for task in chosen for seed in seeds[length]], controls)
    race.strips(subject.question(chosen[0], min(grid), seeds[min(grid)][0]))
    order = ("baseline", "method", "control", "fewer_steps")
    rows = sorted(race.arms.values(), key=lambda arm: order.index(arm.kind))
    return DllmComparison(subject.name, chosen, grid, seeds, rows, race.notes())


def _tasks(names: str | Sequence[str] | None, subject: DllmSubject) -> list[str]:
    if names is None:
        return [name for name in TASKS if name in subject.tasks] or list(subject.tasks)
    asked = names.replace(",", " ").split() if isinstance(names, str) else list(names)
    for name in asked:
        if name not in subject.tasks:
            raise UnknownName.of("task", name, subject.tasks)
    if not asked:
        raise OptionError("no task given: name at least one")
    return asked


def _seeds(questions: int | Sequence[int] | None, length: int) -> list[int]:
    if questions is None:
        return list(range(max(1, min(8, _BUDGET // length))))
    seeds = list(range(questions)) if isinstance(questions, int) else list(questions)
    if not seeds:
        raise OptionError("questions=0 is out of range; it must be at least 1")
    return seeds


def _kind(arm: Arm, asked: Sequence[Arm]) -> Kind:
    if arm == UNCACHED:
        return "baseline"
    return "method" if arm in asked and not arm.method.control else "control"


@dataclass
class _Race:
    """Runs arms on questions and keeps what they did."""

    subject: DllmSubject
    arms: dict[Arm, DllmArm]
    progress: Progress
    truths: dict[Question, Tensor] = field(default_factory=dict)
    warm: set[Arm] = field(default_factory=set)

    def run(self, questions: Sequence[Question], controls: bool) -> None:
        """All arms on all questions of one length, then plain decoding at equal cost."""
        self._round(questions, [arm for arm, held in self.arms.items() if held.kind != "fewer_steps"])
        if controls:
            self._equal_cost(questions)

    def _round(self, questions: Sequence[Question], arms: Sequence[Arm]) -> None:
        total, done = len(questions) * len(arms), 0
        found: dict[tuple[Arm, int], tuple[Tensor, Outcome]] = {}
        for turn, question in enumerate(questions):
            for arm in [*arms[turn % len(arms) :], *arms[: turn % len(arms)]]:
                self.progress(done, total, f"{arm.label}, {question.task} {question.length}, seed {question.seed}")
                self._warm_up(arm, question)
                found[arm, turn] = run(self.subject, arm, question)[:2]
                done += 1
            if UNCACHED in arms:
                self.truths[question] = found[UNCACHED, turn][0]
        for (arm, turn), (tokens, outcome) in sorted(found.items(), key=lambda item: item[0][1]):
            question = questions[turn]
            same = (tokens == self.truths[question])[:, question.ids.shape[1] :]
            self.arms[arm].outcomes.append(replace(outcome, agree=float(same.float().mean())))

    def _warm_up(self, arm: Arm, question: Question) -> None:
        """The first run of an arm is a short one that is thrown away."""
        if arm not in self.warm:
            self.warm.add(arm)
            run(self.subject, arm, replace(question, gen_length=question.block))

    def _equal_cost(self, questions: Sequence[Question]) -> None:
        length, block = questions[0].length, questions[0].block
        whole = self._cost(UNCACHED, length)
        needed: dict[Arm, None] = {}
        for arm, held in self.arms.items():
            if held.kind != "method":
                continue
            calls = min(max(math.ceil(self._cost(arm, length) / whole * block - 1e-9), 1), block)
            if calls == block:
                continue  # costs as much as no cache
            equal = Arm.of(FewerSteps(factor=round(block / calls, 3)))
            held.equal_cost[length] = equal.label
            needed[equal] = None
        for equal in needed:
            self.arms.setdefault(equal, DllmArm("fewer_steps", equal.label, options=options(equal)))
        if needed:
            self._round(questions, list(needed))

    def _cost(self, arm: Arm, length: int) -> int:
        return sum(outcome.token_layers for outcome in self.arms[arm].at(length))

    def strips(self, question: Question) -> None:
        """Which positions and layers ran at every call of one question, and how true what was held is."""
        shown = [arm for arm, held in self.arms.items() if held.kind != "fewer_steps"]
        for place, arm in enumerate(shown):
            self.progress(place, len(shown), f"strip of {arm.label}")
            record = run(self.subject, arm, question, shadow=True)[2]
            drift = drifts(self.subject, arm, question).decided.tolist() if arm == UNCACHED else ()
            self.arms[arm].strip = Strip.of(question.task, question.length, record, drift)
        self.progress(len(shown), len(shown), "done")

    def notes(self) -> list[str]:
        """What a careful user should know."""
        made = []
        if self.subject.lm.device.type == "cpu":
            made.append(f"one question at a time, {torch.get_num_threads()} threads of the processor")
        if self.subject.tasks == ("prompt",):
            made.append(
                "this model has no questions with right answers: agreement with the uncached run is all there is"
            )
        return made
