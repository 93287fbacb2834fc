"""Claims of BAC (ICLR 2026, arXiv 2506.13456), made of diffusion policies and tested here on an image model.

`bac_policy` tests them on a policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import elision
from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.lab import Lab
from elision.bench.listed import spread
from elision.denoise.adapters import adapter_for
from elision.denoise.methods.bac import BAC, MLP
from elision.denoise.policy import Claims, DenoiseMethod, Group, Host, Plan
from elision.denoise.predictors import Reuse
from elision.denoise.schedules import SiteSteps
from elision.denoise.sites import Site
from elision.hooks.diffusers import inspect_target, unwrap
from elision.method import option
from elision.profile import Profile, fingerprint

UPDATES = (5, 8, 10)
UNION = 3  # of the small models' ten or so branches


@dataclass(frozen=True)
class Even(DenoiseMethod):
    """A given number of branch calls, spread evenly over branches and steps."""

    name: ClassVar[str] = "even"
    description: ClassVar[str] = "experiment: as many branch calls, evenly spread"
    control: ClassVar[bool] = True

    calls: int = option(1, "branch calls of a run, for each guidance branch", ge=1)
    steps: int = option(1, "steps of a run", ge=1)

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """Branches differ by at most one update step."""
        sites = host.site("branch", self.name)
        counts = np.diff([i * self.calls // len(sites) for i in range(len(sites) + 1)])
        lists = {site.key: spread(int(n), self.steps) for site, n in zip(sites, counts, strict=True)}
        return Plan([Group(self.name, sites, lambda: SiteSteps(lists), Reuse)], Claims(frozenset(sites)))


def _with_profile(lab: Lab, steps: int, *methods: BAC) -> None:
    """Let the methods run with the one profile that every claim here uses, from a single run as in the paper."""
    base = BAC()
    if (base, steps) not in lab.profiles:
        lab.give([base], steps, lab.fit(base, steps, 1))
    lab.give(methods, steps, lab.profiles[base, steps])


def _sites(lab: Lab) -> tuple[Host, list[Site]]:
    model = unwrap(inspect_target(lab.subject.pipe).denoisers[0])
    host = Host(model, adapter_for(model))
    return host, host.site("branch", "bac")


def _schedules(lab: Lab, method: BAC, steps: int) -> Mapping[str, set[int]]:
    """The update steps that a method with a profile will use."""
    return method.steps_of(*_sites(lab), lab.profiles[method, steps])


def _calls(lab: Lab, method: BAC, steps: int) -> int:
    """Branch calls of a run, for each guidance branch."""
    return sum(len(mine) for mine in _schedules(lab, method, steps).values())


def _arms(lab: Lab, steps: int) -> Iterator[tuple[int, BAC, BAC, BAC]]:
    """Per M: with union, without, shared."""
    for m in UPDATES:
        if m < steps:
            arms = (
                BAC(num_caches=m, union_blocks=UNION),
                BAC(num_caches=m, union_blocks=0),
                BAC(num_caches=m, schedule="shared"),
            )
            _with_profile(lab, steps, *arms)
            yield m, *arms


def _share(lab: Lab, method: BAC, steps: int) -> str:
    return f"{_calls(lab, method, steps)} of {steps * len(_sites(lab)[1])} branch calls"


@claim(
    "bac/uniform",
    "At equal branch calls, update steps found from similarity are better than evenly spread ones",
    paper="RoboMimic Tool Hang: success .49 at 3.40×, uniform .23 at 3.20×",
    metric="PSNR difference, dB",
    baseline="reuse of branches at evenly spread steps, as many branch calls",
)
def against_uniform(lab: Lab, steps: int) -> Iterator[Measured]:
    """With union, minus even spreading."""
    for m, ours, _, _ in _arms(lab, steps):
        even = Even(_calls(lab, ours, steps), steps)
        yield Measured(f"M = {m}, {_share(lab, ours, steps)}", lab.gain(ours, even, steps))


@claim(
    "bac/no-union",
    "Without union, update steps per branch are worse than one shared list",
    paper="ablation: block-wise schedules alone lose to one shared schedule",
    metric="PSNR difference, dB",
    direction="below",
    baseline="the first branch's steps for all branches, same M",
)
def without_union(lab: Lab, steps: int) -> Iterator[Measured]:
    """No union, minus shared; equal branch calls by construction."""
    for m, _, alone, shared in _arms(lab, steps):
        yield Measured(f"M = {m}, {_share(lab, alone, steps)}", lab.gain(alone, shared, steps))


@claim(
    "bac/union",
    "At the same M the bubbling union improves update steps per branch",
    paper="ablation: with the union, block-wise schedules recover the success of the full policy",
    metric="PSNR difference, dB",
    baseline="no union, same M (fewer branch calls)",
)
def union_helps(lab: Lab, steps: int) -> Iterator[Measured]:
    """With union, minus without."""
    for m, ours, alone, _ in _arms(lab, steps):
        setting = f"M = {m}, n = {UNION}, {_calls(lab, ours, steps)} against {_calls(lab, alone, steps)} calls"
        yield Measured(setting, lab.gain(ours, alone, steps))


@claim(
    "bac/union-equal",
    "At no fewer branch calls, the bubbling union is better than more update steps without it",
    paper="no figure at equal calls",
    metric="PSNR difference, dB",
    baseline="no union, the smallest M with at least as many branch calls",
)
def union_at_equal_calls(lab: Lab, steps: int) -> Iterator[Measured]:
    """With union, minus without at a larger M."""
    count = len(_sites(lab)[1])
    for m, ours, _, _ in _arms(lab, steps):
        more = BAC(num_caches=-(-_calls(lab, ours, steps) // count), union_blocks=0)
        _with_profile(lab, steps, more)
        setting = f"M = {m}, n = {UNION}, {_calls(lab, ours, steps)} against {_calls(lab, more, steps)} calls"
        yield Measured(setting, lab.gain(ours, more, steps))


@claim(
    "bac/objective",
    "Similarity to the serving step finds better update steps than similarity to the step before",
    paper="no figure; the text has the one objective, the released code the other",
    metric="PSNR difference, dB",
    baseline="the literal objective, no union, same M",
)
def anchored_against_consecutive(lab: Lab, steps: int) -> Iterator[Measured]:
    """Anchored minus consecutive, both without union."""
    for m, _, alone, _ in _arms(lab, steps):
        literal = replace(alone, objective="consecutive")
        _with_profile(lab, steps, literal)
        yield Measured(f"M = {m}, {_share(lab, alone, steps)}", lab.gain(alone, literal, steps))


@claim(
    "bac/fewer-steps",
    "At equal cost it is better than sampling with fewer steps",
    paper="real robot: 71 % at 39.2 Hz against DDIM with 50 steps, 52 %",
    metric="PSNR difference, dB",
    baseline="plain sampling with at least as many denoiser FLOPs",
)
def against_fewer(lab: Lab, steps: int) -> Iterator[Measured]:
    """With union, minus plain sampling."""
    for m, ours, _, _ in _arms(lab, steps):
        counts = lab.equal_flops(ours, steps)
        yield Measured(f"M = {m}, cost of {np.mean(counts):.3g} steps", lab.gain_fewer(ours, counts, steps))


@claim(
    "bac/error-surge",
    "At its update steps an MLP's error grows with the error of the stale branches above it",
    paper="a toy test: Pearson r = 0.9894 between upstream cache error and downstream update error",
    metric="Pearson r over MLPs and steps, inputs of the denoiser held to the uncached run",
    baseline="no relation",
)
def error_surge(lab: Lab, steps: int) -> Iterator[Measured]:
    """Without union, on the latents of uncached runs."""
    for m, _, alone, _ in _arms(lab, steps):
        rows = [surge(lab, alone, steps, seed) for seed in lab.seeds]
        if min(map(len, rows)) < 3:
            yield Measured(f"M = {m}", None, "fewer than 3 updates of an MLP had a stale branch above them")
            continue
        r = [float(np.corrcoef(np.array(pairs).T)[0, 1]) for pairs in rows]
        yield Measured(f"M = {m}", stats.mean(r), f"{len(rows[0])} pairs per seed")


def surge(lab: Lab, method: BAC, steps: int, seed: int) -> list[tuple[float, float]]:
    """Pairs (mean error of the stale branches above, error of an MLP at its own update step), relative 2-norms."""
    recorded: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def seen(host: Host, step: Any, site: Site, call: Any, out: Tensor) -> None:
        if step.leads:
            recorded.append((call.args, call.kwargs))

    lab.watch("model", steps, seed, seen)
    host, sites = _sites(lab)
    schedules, profile = _schedules(lab, method, steps), lab.profiles[method, steps]
    truth = _replay(host, sites, recorded)
    bare = replace(profile, fingerprint=fingerprint("bac", host.model))
    with elision.apply(host.model, method, steps=steps, profile=bare):
        mine = _replay(host, sites, recorded)
    errors: dict[str, list[float]] = {site.key: [] for site in sites}
    for key, values in errors.items():
        for n in range(steps):
            last = max(s for s in schedules[key] if s <= n)
            true = truth[n, key]
            values.append(float((mine[last, key] - true).norm() / true.norm()))
    pairs: list[tuple[float, float]] = []
    for place, site in enumerate(sites):
        for n in sorted(schedules[site.key]) if site.kind in MLP else ():
            stale = [errors[up.key][n] for up in sites[:place] if n not in schedules[up.key]]
            if stale:
                pairs.append((float(np.mean(stale)), errors[site.key][n]))
    return pairs


@torch.no_grad()
def _replay(host: Host, sites: list[Site], recorded: list[Any]) -> dict[tuple[int, str], Tensor]:
    """Outputs of the branches that are computed, by step and site, at recorded calls of the denoiser."""
    found: dict[tuple[int, str], Tensor] = {}
    now = [0]

    def keep(key: str) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            found[now[0], key] = (out[0] if isinstance(out, tuple) else out).detach()

        return hook

    hooks = [host.model.get_submodule(site.tail).register_forward_hook(keep(site.key)) for site in sites]
    try:
        for now[0], (args, kwargs) in enumerate(recorded):
            host.model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@claim(
    "bac/published-models",
    "On RoboMimic diffusion policies it is 3.4 times faster without loss of success",
    paper="DP-T, S = 10: average success .79 (full .76), 3.40×; Kitchen .98 (full .98), 3.60×",
    metric="success rate and speed-up",
    baseline="the uncached policy",
    once=True,
)
def published_models(lab: Lab, steps: int) -> Iterator[Measured]:
    """Needs policies and simulators that this experiment does not assume."""
    yield Measured("", None, "it needs the RoboMimic checkpoints and their simulator")
