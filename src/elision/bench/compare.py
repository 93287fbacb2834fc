"""Comparisons: baseline, methods and controls interleaved in one process, from the same noise, over several seeds."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from elision.bench.judging import Judging
from elision.bench.measure import Sample, regions_of, run_method, run_plain
from elision.bench.peers import Peer
from elision.bench.spec import Spec, parse, parse_many
from elision.bench.subject import Subject, load_subject
from elision.bench.summary import Arm, Comparison, Kind
from elision.errors import MissingDependency, OptionError, UnsupportedTarget

__all__ = ["AUTO", "Arm", "Comparison", "compare_denoise"]

AUTO = (
    "easycache:threshold=0.05,warmup_steps=4",
    "taylorseer:interval=3",
    "taylorseer:interval=4",
    "uniform:interval=3",
    "first_block:threshold=0.2",
    "teacache:threshold=0.3",
)
Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None:
    del done, total, what


def compare_denoise(
    model: Any = "garments-flux",
    methods: str | Iterable[str] = "auto",
    *,
    steps: int | Sequence[int] | None = None,
    seeds: int | Sequence[int] | None = None,
    prompts: Sequence[Any] | None = None,
    batch: int | None = None,
    guidance: float | None = None,
    controls: bool = True,
    keep_images: int = 8,
    arguments: Mapping[str, Any] | None = None,
    progress: Progress = _silent,
) -> Comparison:
    """Compare denoise methods on one model, each beside the uncached run and its equal-cost controls.

    Every seed draws one batch of noise; each arm starts from it. The order of the arms is rotated from seed to seed,
    so that none of them always runs on a warm or a cold machine. A `fewer_steps` arm samples plainly with as many
    steps as a method computed from the same seed. Controls are matched to the methods' number of computed steps.

    Args:
        model: a zoo name, a hub id, a local path, a loaded pipeline or a `Subject`.
        methods: texts like "taylorseer:interval=3", or "auto": what the subject names, or `AUTO`.
        steps: one number of steps or several; by default the model's own.
        seeds: how many, or which; by default 5. Of a policy, episodes of every task; by default 50.
        prompts: one per image of a batch. Of a policy, its tasks.
        batch: images per run.
        guidance: guidance scale.
        controls: whether to add `uniform`, `random_skip` and `stale` at matched cost.
        keep_images: how many images of the first seed the result keeps for the report; of videos half as many.
        arguments: more keyword arguments of the pipeline's call.
        progress: told how many of how many runs are done, and what runs next.
    """
    specs = [] if methods == "auto" else parse_many(methods)
    if seeds is not None and not _seeds(seeds):
        raise OptionError("seeds=0 is out of range; it must be at least 1")
    subject = load_subject(model, prompts=prompts, batch=batch, guidance=guidance, arguments=dict(arguments or {}))
    if subject.kind == "policy":
        policy = importlib.import_module("elision.bench.policy")
        chosen = parse_many(subject.auto or policy.AUTO) if methods == "auto" else specs
        others = [spec.label for spec in chosen if isinstance(spec.method, Peer)]
        if others:
            raise UnsupportedTarget(
                f"{others[0]} has no place for a policy: other libraries cache pipelines of diffusers"
            )
        episodes = _seeds(50 if seeds is None else seeds)
        return policy.compare(  # type: ignore[no-any-return]
            subject, chosen, steps=steps, seeds=episodes, controls=controls, progress=progress
        )
    specs = parse_many(subject.auto or AUTO) if methods == "auto" else specs
    numbers = _seeds(5 if seeds is None else seeds)
    grids = [subject.steps] if steps is None else [steps] if isinstance(steps, int) else list(steps)
    if any(total < 1 for total in grids):
        raise OptionError(f"steps={min(grids)} is out of range; it must be at least 1")
    judge = Judging(subject)
    arms: list[Arm] = []
    missing: list[str] = []
    for place, total in enumerate(grids):
        told = _scaled(progress, place, len(grids))
        race = _Race(subject, total, numbers, keep_images, judge)
        arms += race.run(specs, controls, told)
        missing += [note for note in race.missing if note not in missing]
    return Comparison(
        model=subject.name,
        prompts=[str(p) for p in subject.prompts],
        guidance=subject.guidance,
        steps=grids,
        seeds=numbers,
        arms=arms,
        notes=[*judge.notes(len(numbers) * len(subject.prompts)), *missing],
        kind=subject.kind,
        frames=race.frames,
        references=subject.references,
        masks=subject.masks,
    )


def _seeds(given: int | Sequence[int]) -> list[int]:
    return list(range(given)) if isinstance(given, int) else list(given)


def _scaled(progress: Progress, place: int, of: int) -> Progress:
    return lambda done, total, what: progress(place * total + done, of * total, what)


@dataclass
class _Race:
    """All arms at one number of steps."""

    subject: Subject
    total: int
    seeds: Sequence[int]
    keep: int
    judge: Judging
    plain: dict[tuple[int, int], tuple[Tensor, Sample]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    frames: int = 1

    def run(self, specs: Sequence[Spec], controls: bool, progress: Progress) -> list[Arm]:
        """Warm up, race all seeds, and return the arms: baseline, methods, controls, fewer steps."""
        arms, counts = self._warm_up(specs, progress)
        if controls and counts:
            for text in matched_controls(sorted(counts)[len(counts) // 2], self.total):
                if parse(text).label not in {arm.label for arm in arms}:
                    arms.append(Arm("control", parse(text).label, self.total, spec=parse(text)))
        runs = len(self.seeds) * (1 + 2 * len(arms))
        images: dict[tuple[str, int], Tensor] = {}
        done = 0
        for turn, seed in enumerate(self.seeds):
            # the baseline goes first: the numbers of steps that the controls need are known only after the methods
            images["baseline", seed], _ = self._plain(self.total, seed)
            done += 1
            for arm in _rotated(arms, turn):
                progress(done, runs, f"{arm.label}, seed {seed}")
                assert arm.spec is not None
                images[arm.label, seed], sample, report = run_method(
                    self.subject, arm.spec.method, self.total, seed, arm.spec.profile
                )
                arm.samples.append(sample)
                if turn == 0:
                    arm.regions = regions_of(report)
                self._plain(sample.equal_steps, seed)
                done += 2
                if report.flops_computed is not None and report.flops_elided is not None:
                    self._tell_cost(seed, (report.flops_computed + report.flops_elided, report.calls))
        progress(runs, runs, "judging")
        return self._judged(arms, images)

    def _warm_up(self, specs: Sequence[Spec], progress: Progress) -> tuple[list[Arm], list[int]]:
        """One unmeasured run of everything; also shows how many steps each method computes."""
        progress(0, 1, "warm-up")
        seed = self.seeds[0] + 10_000
        run_plain(self.subject, self.total, seed)
        arms: list[Arm] = []
        counts: list[int] = []
        for spec in specs:
            kind: Kind = "control" if spec.method.control else "method"
            if spec.label in {arm.label for arm in arms}:
                continue
            try:
                _, sample, _ = run_method(self.subject, spec.method, self.total, seed, spec.profile)
            except (MissingDependency, UnsupportedTarget) as error:
                if not isinstance(spec.method, Peer):
                    raise
                self.missing.append(f"{spec.label} is left out: {error}")
                continue
            arms.append(Arm(kind, spec.label, self.total, spec=spec))
            counts.append(sample.equal_steps)
        return arms, counts

    def _plain(self, steps: int, seed: int) -> tuple[Tensor, Sample]:
        """Plain sampling with `steps` steps, once per seed."""
        if (steps, seed) not in self.plain:
            self.plain[steps, seed] = run_plain(self.subject, steps, seed)
        return self.plain[steps, seed]

    def _tell_cost(self, seed: int, whole: tuple[int, int]) -> None:
        """What a full run costs, from a method's report, for all plain runs of this seed."""
        for (steps, other), (_, sample) in self.plain.items():
            if other == seed:
                sample.flops = whole[0] * steps // self.total
                sample.calls = whole[1] * steps // self.total

    def _judged(self, arms: list[Arm], images: dict[tuple[str, int], Tensor]) -> list[Arm]:
        baseline = Arm("baseline", "baseline", self.total)
        baseline.samples = [self._plain(self.total, seed)[1] for seed in self.seeds]
        fewer: dict[tuple[int, ...], Arm] = {}
        for arm in arms:
            arm.samples.sort(key=lambda s: self.seeds.index(s.seed))
            counts = tuple(s.equal_steps for s in arm.samples)
            arm.equal_cost = _fewer_label(counts, fewer)
            if counts not in fewer:
                control = fewer[counts] = Arm("fewer_steps", arm.equal_cost, self.total)
                for steps, seed in zip(counts, self.seeds, strict=True):
                    picture, sample = self._plain(steps, seed)
                    images[control.label, seed] = picture
                    control.samples.append(Sample(**vars(sample)))
        drawn_at_once = len(images["baseline", self.seeds[0]])
        self.frames = drawn_at_once // len(self.subject.prompts) if self.subject.kind == "video" else 1
        kept = self.keep if self.frames == 1 else max(1, self.keep // 2) * self.frames
        ordered = [baseline, *sorted(arms, key=lambda a: a.kind != "method"), *sorted(fewer.values(), key=_cost)]
        for arm in ordered:
            drawn = [images[arm.label, seed] for seed in self.seeds]
            self.judge.judge(arm, drawn, [images["baseline", seed] for seed in self.seeds])
            arm.images = drawn[0][:kept].clone()
        return ordered


def _cost(arm: Arm) -> float:
    """Most computed steps first."""
    return -sum(arm.per_seed("steps_computed"))


def _rotated(arms: Sequence[Arm], turn: int) -> list[Arm]:
    shift = turn % len(arms) if arms else 0
    return [*arms[shift:], *arms[:shift]]


def _fewer_label(counts: Sequence[int], taken: Mapping[tuple[int, ...], Arm]) -> str:
    """A name by the mean number of steps; ticks tell apart those that differ only from seed to seed."""
    mine = tuple(counts)
    if mine in taken:
        return taken[mine].label
    label = f"fewer_steps:steps={sum(counts) / len(counts):.4g}"
    while label in {arm.label for arm in taken.values()}:
        label += "'"
    return label


def matched_controls(computed: int, total: int) -> list[str]:
    """`uniform`, `stale` and `random_skip` that compute about `computed` of `total` steps."""
    interval = min(range(1, total + 1), key=lambda n: abs(-(-total // n) - computed))
    rate = round(1 - max(0, computed - 1) / max(1, total - 1), 2)
    return [
        f"uniform:interval={interval},site=model",
        f"random_skip:rate={rate:g},seed={random.Random(0).randrange(100)}",
        f"stale:interval={interval}",
    ]
