"""Claims of BAC on what it was made for: a diffusion policy, judged by whether its tasks get done.

Episodes of all tasks count alike. Success saturates, so that claims about which update steps are better are also made
of the actions: their error against the uncached policy for the same observation and noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.experiments.bac import Even
from elision.bench.policy.laboratory import PolicyLab
from elision.bench.policy.measure import Way
from elision.denoise.adapters import adapter_for
from elision.denoise.methods.bac import BAC
from elision.denoise.policy import Host
from elision.hooks.diffusers import inspect_target, unwrap

UPDATES = (3, 5, 10)  # of 100 steps; the paper's simulations have 10
UNION = 5
ROUNDS = 7
MODEL = "metaworld-policy"
successes = partial(claim, metric="success difference, paired by episode", model=MODEL)
actions = partial(claim, metric="action error of the baseline over ours, paired by observation", bound=1.0, model=MODEL)


class _Schedules:
    """The ways of one M, and how many branch calls they make."""

    def __init__(self, lab: PolicyLab, m: int, steps: int) -> None:
        self.lab, self.m, self.steps = lab, m, steps
        self.ours, self.alone = BAC(num_caches=m, union_blocks=UNION), BAC(num_caches=m, union_blocks=0)
        self.shared = BAC(num_caches=m, schedule="shared")

    def way(self, method: BAC | Even) -> Way:
        """All use one profile."""
        made = Way(self.steps, method)
        if isinstance(method, BAC):
            base = Way(self.steps, BAC())
            profile = self.lab.profile(base)
            assert profile is not None
            self.lab.profiles.setdefault((method, self.steps), profile)
        return made

    def calls(self, method: BAC) -> int:
        """Branch calls of a chunk."""
        model = unwrap(inspect_target(self.lab.subject.pipe).denoisers[0])
        host = Host(model, adapter_for(model))
        profile = self.lab.profile(self.way(method))
        assert profile is not None
        return sum(len(mine) for mine in method.steps_of(host, host.site("branch", "bac"), profile).values())

    def even(self) -> Way:
        """As many calls, evenly spread."""
        return self.way(Even(self.calls(self.ours), self.steps))

    def more(self) -> BAC:
        """Without union, the smallest M with at least as many calls."""
        branches = self.calls(self.alone) // self.m
        return replace(self.alone, num_caches=-(-self.calls(self.ours) // branches))

    def setting(self, *methods: BAC) -> str:
        """M, n and the calls of methods."""
        counts = " against ".join(str(self.calls(method)) for method in methods)
        whole = self.calls(self.alone) // self.m * self.steps
        return f"M = {self.m}, n = {UNION}, {counts} of {whole} branch calls"


def _each(lab: PolicyLab, steps: int) -> Iterator[_Schedules]:
    for m in UPDATES:
        if m < steps:
            yield _Schedules(lab, m, steps)


@successes(
    "bac/policy-lossless",
    "The cached policy solves as many tasks as the uncached one, to within five in a hundred",
    paper="RoboMimic, S = 10: average success .79, full .76; Kitchen .98, full .98",
    baseline="the uncached policy",
    bound=-0.05,
)
def lossless(lab: PolicyLab, steps: int) -> Iterator[Measured]:
    """With union, minus uncached."""
    for s in _each(lab, steps):
        way = s.way(s.ours)
        told = f"{lab.success(way):.0%} against {lab.success(lab.plain):.0%}"
        yield Measured(s.setting(s.ours), lab.lead(way, lab.plain), told)


@claim(
    "bac/policy-speed",
    "Chunks come faster than from the uncached policy",
    paper="RoboMimic, S = 10: 3.40×",
    metric="ratio of chunks per second, one robot",
    baseline="the uncached policy",
    bound=1.0,
    model=MODEL,
)
def speed(lab: PolicyLab, steps: int) -> Iterator[Measured]:
    """Wall time of whole chunks; the operations saved stand beside it."""
    for s in _each(lab, steps):
        way = s.way(s.ours)
        seconds = {w: t for w, (t, _) in lab.times([lab.plain, way], ROUNDS).items()}
        share = lab.cost(way).share
        told = "" if share is None else f"{1 / share:.2f} times fewer operations"
        yield Measured(s.setting(s.ours), stats.ratio(seconds[lab.plain], seconds[way]), told)


@successes(
    "bac/policy-uniform",
    "At equal branch calls, update steps found from similarity solve more tasks than evenly spread ones",
    paper="RoboMimic Tool Hang: success .49 at 3.40×, uniform .23 at 3.20×",
    baseline="reuse of branches at evenly spread steps, as many branch calls",
)
def against_uniform(lab: PolicyLab, steps: int) -> Iterator[Measured]:
    """With union, minus even spreading."""
    for s in _each(lab, steps):
        yield Measured(s.setting(s.ours), lab.lead(s.way(s.ours), s.even()))


@actions(
    "bac/policy-uniform-actions",
    "At equal branch calls, update steps found from similarity give truer actions than evenly spread ones",
    paper="no figure",
    baseline="reuse of branches at evenly spread steps, as many branch calls",
)
def against_uniform_actions(lab: PolicyLab, steps: int) -> Iterator[Measured]:
    """Even spreading over ours."""
    for s in _each(lab, steps):
        yield Measured(s.setting(s.ours), lab.closer(s.way(s.ours), s.even()))


@successes(
    "bac/policy-no-union",
    "Without union, update steps per branch solve fewer tasks than one shared list",
    paper="ablation: block-wise schedules alone lose to one shared schedule",
    direction="below",
    baseline="the first branch's steps for all branches, same M",
)
def without_union(lab: PolicyLab, steps: int) -> Iterator[Measured]:
    """No union, minus shared; equal branch calls by construction."""
    for s in _each(lab, steps):
        yield Measured(s.setting(s.alone), lab.lead(s.way(s.alone), s.way(s.shared)))


@actions(
    "bac/policy-no-union-actions",
    "Without union, update steps per branch give less true actions than one shared list",
    paper="no figure",
    direction="below",
    baseline="the first branch's steps for all branches, same M",
)
def without_union_actions(lab: PolicyLab, steps: int) -> Iterator[Measured]:
    """Shared over no union."""
    for s in _each(lab, steps):
        yield Measured(s.setting(s.alone), lab.closer(s.way(s.alone), s.way(s.shared)))


@successes(
    "bac/policy-union-equal",
    "At no fewer branch calls, the bubbling union solves more tasks than more update steps without it",
    paper="ablation: with the union, block-wise schedules recover the success of the full policy",
    baseline="no union, the smallest M with at least as many branch calls",
)
def union_at_equal_calls(lab: PolicyLab, steps: int) -> Iterator[Measured]:
    """With union, minus without at a larger M."""
    for s in _each(lab, steps):
        yield Measured(s.setting(s.ours, s.more()), lab.lead(s.way(s.ours), s.way(s.more())))


@actions(
    "bac/policy-union-actions",
    "At no fewer branch calls, the bubbling union gives truer actions than more update steps without it",
    paper="no figure",
    baseline="no union, the smallest M with at least as many branch calls",
)
def union_actions(lab: PolicyLab, steps: int) -> Iterator[Measured]:
    """Without union at a larger M, over ours."""
    for s in _each(lab, steps):
        yield Measured(s.setting(s.ours, s.more()), lab.closer(s.way(s.ours), s.way(s.more())))


@successes(
    "bac/policy-fewer-steps",
    "At equal cost it solves more tasks than DDIM with fewer steps",
    paper="real robot: 71 % at 39.2 Hz against DDIM with 50 steps, 52 %",
    baseline="DDIM with at least as many denoiser FLOPs",
)
def against_fewer(lab: PolicyLab, steps: int) -> Iterator[Measured]:
    """With union, minus DDIM."""
    for s in _each(lab, steps):
        way = s.way(s.ours)
        fewer = lab.fewer(way)
        told = f"{lab.success(way):.0%} against {lab.success(fewer):.0%}"
        yield Measured(f"{s.setting(s.ours)}, DDIM {fewer.steps} steps", lab.lead(way, fewer), told)


@successes(
    "bac/policy-fewer-steps-ddpm",
    "At equal cost it solves more tasks than the policy's own sampler with fewer steps",
    paper="no figure at equal cost",
    baseline="DDPM with at least as many denoiser FLOPs",
)
def against_fewer_ddpm(lab: PolicyLab, steps: int) -> Iterator[Measured]:
    """With union, minus DDPM."""
    for s in _each(lab, steps):
        way = s.way(s.ours)
        fewer = lab.fewer(way, "ddpm")
        yield Measured(f"{s.setting(s.ours)}, DDPM {fewer.steps} steps", lab.lead(way, fewer))
