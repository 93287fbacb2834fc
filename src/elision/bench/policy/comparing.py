"""Comparisons on policies: uncached, methods and controls in the same episodes, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from elision.bench.compare import matched_controls
from elision.bench.policy import AUTO
from elision.bench.policy.laboratory import PolicyLab
from elision.bench.policy.measure import Way
from elision.bench.policy.subject import load_policy
from elision.bench.policy.summary import Kind, PolicyArm, PolicyComparison
from elision.bench.results import plain
from elision.bench.spec import Spec, parse, parse_many
from elision.denoise.policy import DenoiseMethod
from elision.errors import OptionError
from elision.profile import Profile

Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None:
    del done, total, what


def compare_policy(
    model: Any = "metaworld-policy",
    methods: str | Iterable[str | Spec] = "auto",
    *,
    steps: int | None = None,
    tasks: Sequence[str] = (),
    episodes: int | Sequence[int] = 50,
    together: int | None = None,
    controls: bool = True,
    timing: int = 5,
    progress: Progress = _silent,
) -> PolicyComparison:
    """Compare denoise methods on one policy, each beside the uncached policy and equal-cost controls.

    All arms meet the same episodes with the same noise. Methods that need a profile and were given none are fitted on
    the first observation of one held-out episode of every task. For every method there are two arms that sample plainly
    with as many steps as cost at least as much, one with the policy's own DDPM and one with DDIM; the lead is over the
    latter. Hz is measured apart, for one robot at a time, the arms taking turns.

    Args:
        model: a zoo name, a folder, a loaded pipeline or a `PolicySubject`.
        methods: texts like "bac:num_caches=5", what they mean, or "auto".
        steps: denoising steps; by default the policy's own.
        tasks: some of the policy's tasks; by default all.
        episodes: how many per task, or which seeds.
        together: how many episodes run at a time, as one batch; criteria of online methods are those of the batch.
        controls: whether to add equal-cost controls and fewer steps.
        timing: rounds of the timing; 0 leaves it out.
        progress: told how many of how many parts are done, and what runs next.
    """
    specs = _specs(methods)
    seeds = list(range(episodes)) if isinstance(episodes, int) else list(episodes)
    if not seeds:
        raise OptionError("episodes=0 is out of range; it must be at least 1")
    if timing < 0:
        raise OptionError(f"timing={timing} is out of range; it must be at least 0")
    subject = load_policy(model, tasks)
    if steps is not None and steps < 1:
        raise OptionError(f"steps={steps} is out of range; it must be at least 1")
    if together is not None and together < 1:
        raise OptionError(f"together={together} is out of range; it must be at least 1")
    subject = replace(subject, steps=steps or subject.steps, together=together or subject.together)
    return _Race(PolicyLab(subject, seeds), specs, controls, timing, progress).run()


def _specs(methods: str | Iterable[str | Spec]) -> list[Spec]:
    asked = list(AUTO) if methods == "auto" else [methods] if isinstance(methods, str) else list(methods)
    return [found for one in asked for found in ([one] if isinstance(one, Spec) else parse_many(one))]


class _Race:
    """Runs all arms of one comparison."""

    def __init__(self, lab: PolicyLab, specs: Sequence[Spec], controls: bool, timing: int, progress: Progress) -> None:
        self.lab, self.controls, self.timing, self.progress = lab, controls, timing, progress
        self.arms: dict[Way, PolicyArm] = {}
        self.done = 0
        lab.told = self._tell
        self._add("baseline", lab.plain)
        given = {(spec.method, spec.profile) for spec in specs}
        for spec in specs:
            method = spec.method
            if sum(other == method for other, _ in given) > 1:
                raise OptionError(f"{spec.label} is asked for with two profiles: compare them one after the other")
            if not isinstance(method, DenoiseMethod):
                raise OptionError(f"{spec.name} is a method of the family {method.family!r}, not of 'denoise'")
            way = self._add("control" if method.control else "method", Way(lab.subject.steps, method))
            if spec.profile is not None:
                lab.profiles[method, way.steps] = Profile.load(spec.profile)

    def _add(self, kind: Kind, way: Way) -> Way:
        options = {} if way.method is None else plain(Spec(way.method).options)
        self.arms.setdefault(way, PolicyArm(kind, way.label, way.steps, options=options))
        return way

    def _tell(self, what: str) -> None:
        total = len(self.arms) * len(self.lab.subject.tasks) + 1
        self.progress(min(self.done, total), total, what)

    def run(self) -> PolicyComparison:
        """Episodes, equal-cost arms, action errors, timing."""
        lab = self.lab
        self._play()
        methods = [way for way, arm in self.arms.items() if arm.kind == "method"]
        if self.controls and methods:
            counts = sorted(lab.equal_steps(way) for way in methods)
            for text in matched_controls(counts[len(counts) // 2], lab.subject.steps):
                method = parse(text.replace(",site=model", "")).method  # of policies, branches are what is reused
                assert isinstance(method, DenoiseMethod)
                self._add("control", Way(lab.subject.steps, method))
        if self.controls:
            for way in methods:
                fewer = [self._add("fewer_steps", lab.fewer(way, sampler)) for sampler in ("ddpm", "ddim")]
                self.arms[way].equal_cost = fewer[-1].label
        self._play()
        times = lab.times(list(self.arms), self.timing) if self.timing else {}
        for way, arm in self.arms.items():
            cost = lab.cost(way)
            arm.flops, arm.share = cost.per_chunk, cost.share if way.method else way.steps / lab.subject.steps
            arm.errors, arm.bytes_peak = lab.errors(way), cost.bytes_peak
            if way in times:
                arm.seconds, arm.bytes_peak = times[way][0], times[way][1].bytes_peak
        return self._finished()

    def _play(self) -> None:
        """All tasks; which arm begins changes from task to task."""
        ways = list(self.arms)
        for turn, task in enumerate(self.lab.subject.tasks):
            shift = turn % len(ways)
            for way in [*ways[shift:], *ways[:shift]]:
                new = len(self.arms[way].episodes) <= turn * len(self.lab.seeds)
                played = self.lab.played(way, task)[0]
                if new:
                    self.arms[way].episodes += played
                    self.done += 1

    def _finished(self) -> PolicyComparison:
        subject = self.lab.subject
        order = ("baseline", "method", "control", "fewer_steps")
        chunk = subject.answer(1, self.lab.requests[:1]).shape[1]
        return PolicyComparison(
            subject.name,
            list(subject.tasks),
            subject.steps,
            list(self.lab.seeds),
            chunk,
            subject.limit,
            self.lab.spread(),
            sorted(self.arms.values(), key=lambda arm: order.index(arm.kind)),
            self._notes(),
        )

    def _notes(self) -> list[str]:
        together = min(self.lab.subject.together, len(self.lab.seeds))
        made = [f"Episodes run {together} at a time as one batch; Hz and bytes are of one robot alone"]
        if any(way.method is not None and way.method.wants_profile for way in self.arms):
            made.append("Profiles are of one chunk for the first observation of one held-out episode of every task")
        if len(self.lab.seeds) < 50:
            made.append(f"{len(self.lab.seeds)} episodes per task: intervals are wide")
        return made
