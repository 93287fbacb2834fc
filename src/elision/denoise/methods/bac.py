"""BAC: every attention and MLP branch has its own update steps, found by dynamic programming on measured similarity.

Paper: "Block-wise Adaptive Caching for Accelerating Diffusion Policy", ICLR 2026, https://arxiv.org/abs/2506.13456; the
released code is ky-ji/BAC. A block of the paper is one branch (self-attention, cross-attention, MLP) of one layer; its
output before the gate is kept, and reused on the current residual stream.

Offline (`elision.fit`, one uncached run is enough), per branch b with output X(t) at step t of K:

    S_b[a, t]  = cos(X(a), X(t))                                    or a distance, to be minimised
    l_b        = mean over t < u of mean |X(t) - X(u)|              how much a stale output can hurt

Scheduler (ACS), per branch: the M update steps 0 = c_1 < ... < c_M that maximise the similarity of what is served to
what serves it, `sum_m sum_{t = c_m .. c_{m+1} - 1} S[c_m, t]`, by dynamic programming over (m, t) in O(M K^2); of equal
sums the one whose last update step is earliest, then the one before it.

Bubbling union (BUA): for each of the n branches u of largest l, over all kinds,

    C(u) <- C(u) + C(v)    for every MLP branch v of the same layer or a deeper one

so that whenever a downstream MLP is computed anew, the noisiest branches above it are, too.

Sampling: a branch is computed at its update steps and reused at all others.

Where paper and code differ: `objective="consecutive"` is the paper's sum over consecutive similarities read literally
(which keeps the M - 1 steps of lowest similarity to the step before), the released anchored sum is the default; the
released code adds steps 99 and 100 to every schedule (`forced=(99, 100)`), skips a union over a single branch
(`union_of_one=False`) and, by a misspelling, maximises the l2 distance, which is minimised here. `proxy="norm"` is the
paper's l_b, a norm instead of a mean. A number of update steps above K is refused (the released code repeats steps).
Baselines of the paper: `schedule="shared"` gives all branches the steps of the first layer's first branch, without
union; `schedule="uniform"` computes every `interval`-th step and needs no profile.

For models with guidance and for joint attention (inferred): the leading guidance branch and the image stream are
measured, all guidance branches share the schedule and keep their own outputs; a fused attention and MLP counts as an
MLP. Samples and calls are averaged, so that none dominates. A profile is for one number of steps: a run of another
length warns, and steps beyond the profile's are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from elision.denoise.policy import Claims, DenoiseMethod, Group, Host, Plan, Schedule
from elision.denoise.predictors import Reuse
from elision.denoise.schedules import Interval, SiteSteps
from elision.denoise.sites import Level, Site
from elision.errors import OptionError, ProfileMismatch
from elision.method import Paper, option, register
from elision.profile import Profile

METRICS = ("cosine", "mse", "l1", "l2", "wasserstein")
MLP = ("mlp", "fused")


def _fits(count: int, k: int) -> int:
    if not 1 <= count <= k:
        raise OptionError(f"bac: num_caches={count} does not fit into a run of {k} steps; it must be from 1 to {k}")
    return k


def update_steps(similarity: NDArray[Any], count: int, maximise: bool = True) -> list[int]:
    """The best `count` update steps (ACS).

    Args:
        similarity: [K, K], row = serving step, column = served step; need not be symmetric.
        count: number of update steps M, at most K.
        maximise: False for distances.
    """
    s = np.asarray(similarity, dtype=np.float64) * (1 if maximise else -1)
    k = _fits(count, len(s))
    cost = np.full((k + 1, k), -np.inf)  # cost[a, b]: what step a serves up to b
    for a in range(k):
        cost[a, a:] = np.cumsum(s[a, a:])
    best, came_from = cost[0], np.zeros((count, k), dtype=int)
    for m in range(1, count):
        through = best[:, None] + cost[1:]  # [j, i]: m segments up to j, the next from j + 1 to i
        came_from[m] = through.argmax(axis=0)  # the first of equals
        best = through.max(axis=0)
    steps, end = [], k - 1
    for m in range(count - 1, 0, -1):
        end = int(came_from[m, end])
        steps.append(end + 1)
    return [0, *reversed(steps)]


def score(similarity: NDArray[Any], steps: Sequence[int]) -> float:
    """What update steps are worth: the sum of what each of them serves."""
    stops = [*steps[1:], len(similarity)]
    return float(sum(similarity[a, a:b].sum(dtype=np.float64) for a, b in zip(steps, stops, strict=True)))


def consecutive_steps(similarity: NDArray[Any], count: int, maximise: bool = True) -> list[int]:
    """Step 0 and the `count - 1` steps least similar to the one before (the paper's objective, literally)."""
    _fits(count, len(similarity))
    s = np.diagonal(similarity, offset=1) * (1 if maximise else -1)
    return [0, *sorted((np.argsort(s, kind="stable")[: count - 1] + 1).tolist())]


def noisiest(error: Mapping[str, float], count: int) -> list[str]:
    """The `count` branches of largest error, largest first."""
    return sorted(error, key=lambda key: -error[key])[:count]


def bubbling_union(
    steps: Mapping[str, Iterable[int]], layers: Mapping[str, int], mlps: Iterable[str], selected: Iterable[str]
) -> dict[str, set[int]]:
    """The update steps after the union (BUA).

    Args:
        steps: update steps of every branch.
        layers: its layer.
        mlps: the branches that are MLPs.
        selected: the branches that also take the steps of all MLPs of their own or a deeper layer.
    """
    grown = {key: set(mine) for key, mine in steps.items()}
    for u in selected:
        grown[u] |= {n for v in mlps if layers[v] >= layers[u] for n in steps[v]}
    return grown


class _UpdateSteps(SiteSteps):
    """Update steps for runs of K steps."""

    def __init__(self, computed: Mapping[str, Iterable[int]], k: int) -> None:
        super().__init__({key: [*steps] for key, steps in computed.items()}, until=k)
        self.k = k

    def complaint(self, total: int) -> str | None:
        """A run of another length."""
        if total == self.k:
            return None
        return f"the profile was made for {self.k} steps and the run has {total}: fit one for {total} steps"


@register
@dataclass(frozen=True)
class BAC(DenoiseMethod):
    """Reuse every attention and MLP output between update steps of its own, found from measured similarity."""

    name: ClassVar[str] = "bac"
    description: ClassVar[str] = "reuse each sub-block's output between update steps of its own, found by profiling"
    paper: ClassVar[Paper] = Paper(
        "Block-wise Adaptive Caching for Accelerating Diffusion Policy", "ICLR 2026", "https://arxiv.org/abs/2506.13456"
    )
    needs_profile: ClassVar[bool] = True
    levels: ClassVar[tuple[Level, ...]] = ("branch",)

    num_caches: int = option(10, "update steps of every branch (M, the tables' S), at most the steps of a run", ge=1)
    union_blocks: int = option(5, "branches that take part in the bubbling union (n); 0 is none", ge=0)
    schedule: Literal["optimal", "shared", "uniform"] = option(
        "optimal",
        "update steps per branch, one schedule for all, or an interval",
        choices=("optimal", "shared", "uniform"),
    )
    objective: Literal["anchored", "consecutive"] = option(
        "anchored", "similarity to the serving step, or to the step before", choices=("anchored", "consecutive")
    )
    metric: str = option("cosine", "fit: similarity, or a distance", choices=METRICS)
    proxy: Literal["mean", "norm"] = option(
        "mean", "error of a branch: mean absolute difference, or its sum over all entries", choices=("mean", "norm")
    )
    union_of_one: bool = option(True, "whether a union over one branch is done (released: not)", choices=(True, False))
    forced: tuple[int, ...] = option(
        (), "steps added to every schedule, negative ones counted from the end; the released code adds (99, 100)"
    )
    interval: int = option(5, "uniform: steps from one update to the next", ge=1)
    subsample: int = option(1, "fit: compare every n-th entry of the outputs, for large models (inferred)", ge=1)

    def __post_init__(self) -> None:
        """Rules between options."""
        super().__post_init__()
        if not (isinstance(self.forced, tuple) and all(type(n) is int for n in self.forced)):
            raise OptionError(f"bac: forced={self.forced!r} is no tuple of step numbers, as in (-1,)")
        uniform = self.schedule == "uniform"
        foreign = ("num_caches", "union_blocks", "objective", "forced") if uniform else ("interval",)
        for name in foreign:
            if getattr(self, name) != self.options()[name].default:
                raise OptionError(f"bac: {name} has no meaning for schedule={self.schedule!r}; leave it out")

    @property
    def wants_profile(self) -> bool:
        """All but the uniform baseline."""
        return self.schedule != "uniform"

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """One set of update steps per branch; the last output stands in."""
        sites = host.site("branch", self.name)
        make: Callable[[], Schedule] = partial(Interval, self.interval)
        if self.schedule != "uniform":
            assert profile is not None
            make = partial(_UpdateSteps, self.steps_of(host, sites, profile), int(profile.facts["steps"]))
        return Plan([Group(self.name, sites, make, Reuse)], Claims(frozenset(sites)))

    def steps_of(self, host: Host, sites: Sequence[Site], profile: Profile) -> dict[str, set[int]]:
        """The update steps of every branch: scheduler, union, forced steps; those of the profile if it lists them."""
        known, k = list(profile.facts["sites"]), int(profile.facts["steps"])
        if {site.key for site in sites} != set(known):
            raise ProfileMismatch("bac: the profile names other branches than this denoiser has: fit one for it")
        if "listed" in profile.facts:
            return {key: set(steps) for key, steps in profile.facts["listed"].items()}
        find = update_steps if self.objective == "anchored" else consecutive_steps
        matrices = dict(zip(known, profile.tensors["similarity"].numpy(), strict=True))
        if self.schedule == "shared":
            matrices = dict.fromkeys(known, matrices[sites[0].key])
        steps = {
            key: set(find(matrix, self.num_caches, profile.facts["metric"] == "cosine"))
            for key, matrix in matrices.items()
        }
        if self.schedule == "optimal":
            error = dict(zip(known, profile.tensors[f"error_{self.proxy}"].tolist(), strict=True))
            selected = noisiest(error, self.union_blocks)
            if len(selected) > 1 or self.union_of_one:
                paths = host.adapter.branch_paths(host.model)
                layers = {s.key: next(i for i, p in enumerate(paths) if s.tail.startswith(p + ".")) for s in sites}
                mlps = [site.key for site in sites if site.kind in MLP]
                steps = bubbling_union(steps, layers, mlps, selected)
        forced = {n + k if n < 0 else n for n in self.forced}
        return {key: mine | {n for n in forced if 0 <= n < k} for key, mine in steps.items()}

    def fit(self, target: Any, calls: Sequence[Any], **settings: Any) -> Profile:
        """Measure similarity and error of every branch in uncached runs of `calls`."""
        from elision.denoise.fit.bac import measure  # the recorder imports the engine

        return measure(self, target, calls, **settings)
