"""WorldCache: extrapolate every token by its own rule, and recompute when the hardest tokens have drifted.

Paper: "WorldCache: Accelerating World Models for Free via Heterogeneous Token Caching", ICML 2026,
https://arxiv.org/abs/2603.06331 (there is another paper of that name); the released code is FofGofx/WorldCache.

With F the last computed output [B, N, d], v0 and v1 the slopes of the last two pairs of computed outputs per step, and
D the gap of the last pair, a computed step renews the curvature of every token, `k_i = |v0 - v1| / D / (|v0|^2 + eps)`,
and splits all tokens (of the batch, of all modalities and guidance branches) by its quantiles: stable strictly below
the `stable` quantile, chaotic at or above the `chaotic` one (which wins where both hold), linear in between. k steps
later

    stable    F
    linear    F + k v0
    chaotic   F + k ((1 - a_k) v0 + a_k v1)      a_k = 3x^2 - 2x^3,  x = min(k / n_max, 1)

and every such step adds the drift of the chaotic tokens, k_i |y_k - y_(k-1)|, to a sum E. A step is computed during the
warm-up, at the tail, while there are fewer than three computed outputs, when E >= `threshold`, and after `n_max`
stand-ins in a row; E then starts anew. The same object decides and predicts.

Defaults are those of the released Voyager code; its Aether code has n_max=2, threshold=0.2, warmup_steps=10, and its
history on the prediction with one token per modality and latent pixel: `site="model"`, `modalities=(16, 16, 24)`.
`drift="all"` (the code) divides the drift by the number of all tokens, `drift="chaotic"` (the paper's wording) by that
of the chaotic ones; published thresholds belong to the code. The released code has one call per step; here guidance in
two calls keeps a history per branch, and groups, drift and decision are common to both, so that it equals guidance in
one call. `groups` replaces the curvature's groups by random ones of equal size, or by one rule for all tokens (the
paper's ablation).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elision.denoise.policy import STAND_IN, Claims, Decision, DenoiseMethod, Group, Host, Plan, Predictor, Schedule
from elision.denoise.schedules import TAIL, WARMUP
from elision.denoise.sites import Call, Level, Site
from elision.denoise.steps import Step
from elision.denoise.tokens import TokenView
from elision.errors import OptionError
from elision.method import Paper, option, register
from elision.profile import Profile

Groups = Literal["curvature", "random", "stable", "linear", "chaotic"]
STABLE, LINEAR, CHAOTIC = 0, 1, 2
NO_CURVATURE, DRIFT, STREAK = Decision(False, "no curvature"), Decision(False, "drift"), Decision(False, "streak over")
NOT_FINITE = Decision(False, "not finite")


def curvature(v0: Tensor, v1: Tensor, gap: int, eps: float) -> Tensor:
    """Curvature [B, N] of tokens with slopes `v0` and `v1` [B, N, d] per step, the newer one over `gap` steps."""
    v0, v1 = v0.float(), v1.float()
    bend: Tensor = torch.linalg.vector_norm((v0 - v1) / gap, dim=-1)
    return bend / (v0.square().sum(-1) + eps)


def token_groups(kappa: Tensor, stable: float, chaotic: float) -> Tensor:
    """The group of every token by the quantiles of its curvature over all tokens."""
    flat = kappa.float().flatten()
    ranks = torch.tensor([stable, chaotic], dtype=torch.float32, device=flat.device) * (flat.numel() - 1)
    ordered, below = flat.sort().values, ranks.floor().long()  # torch.quantile refuses more than 2^24 values
    above = (below + 1).clamp_max(flat.numel() - 1)
    low, high = torch.lerp(ordered[below], ordered[above], ranks - below)
    group = torch.full_like(kappa, LINEAR, dtype=torch.int8)
    return group.masked_fill_(kappa < low, STABLE).masked_fill_(kappa >= high, CHAOTIC)


def damping(k: int, n_max: int) -> float:
    """The weight of the older slope, `k` steps after the last computed one."""
    x = min(k / n_max, 1.0) if n_max else 1.0
    return 3 * x**2 - 2 * x**3


class _History:
    """One guidance branch: the last computed output, two slopes, curvature and groups."""

    def __init__(self, view: TokenView) -> None:
        self.view = view
        self.step = -1
        self.last: Tensor | None = None
        self.slopes: list[Tensor] = []  # newest first
        self.kappa: Tensor | None = None
        self.group: Tensor | None = None

    def push(self, n: int, out: Tensor, eps: float) -> None:
        """The computed output of step `n`."""
        y = self.view.split(out)
        if self.last is not None:
            self.slopes = [(y - self.last) / (n - self.step), *self.slopes][:2]
        if len(self.slopes) == 2:
            self.kappa = curvature(self.slopes[0], self.slopes[1], n - self.step, eps)
        self.step, self.last = n, y


class WorldState(Schedule, Predictor):
    """Decides and predicts for one site, with a history for every guidance branch."""

    listens: ClassVar[bool] = True
    kind: ClassVar[Literal["reused", "predicted"]] = "predicted"

    def __init__(self, method: WorldCache) -> None:
        self.m = method
        self.branches: dict[tuple[str, str], _History] = {}  # by guidance branch and stream
        self.drift = 0.0
        self.largest = 0.0
        self._open: list[Tensor] = []  # sum of drifts and number of tokens, of every branch of the last stand-in
        self._last_full = -1
        self._notes: list[str] = []

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Warm-up, tail, no curvature yet, drift, streak over, or nothing finite to go on; otherwise stand in."""
        self._close()
        decision = self._decide(step)
        if not decision.stand_in:
            self._last_full, self.drift = step.n, 0.0
        return decision

    def _decide(self, step: Step) -> Decision:
        if step.n < self.m.warmup_steps:
            return WARMUP
        if step.total is not None and step.n >= step.total - self.m.tail_steps:
            return TAIL
        known = [branch.kappa for branch in self.branches.values() if branch.kappa is not None]
        if not known:
            return NO_CURVATURE
        if not self.drift < self.m.threshold:
            return DRIFT
        if step.n - self._last_full > self.m.n_max:
            return STREAK
        # one output that is not finite spoils both slopes it is part of, and their curvature
        if not torch.stack([torch.isfinite(kappa).all() for kappa in known]).all():
            self._notes.append(f"step {step.n}: the curvature is not finite, so the step was computed")
            return NOT_FINITE
        return STAND_IN

    def _close(self) -> None:
        """Add the drift of the last stand-in over all branches."""
        if self._open:
            total, count = torch.stack(self._open).sum(0).tolist()
            self.drift += total / max(count, 1.0)
            self.largest = max(self.largest, self.drift)
            self._open = []

    def ready(self, step: Step) -> bool:
        """Whether the branch has three computed outputs."""
        mine = [history for (branch, _), history in self.branches.items() if branch == step.branch]
        return bool(mine) and all(history.kappa is not None for history in mine)

    def observe(self, step: Step, x: Tensor, call: Call, out: Tensor, computed: bool) -> None:
        """Renew the history from a computed output; groups follow when all branches have theirs."""
        if not computed:
            return
        key = step.branch, call.stream(x)
        if key not in self.branches:
            self.branches[key] = _History(TokenView(self.m.modalities))
        self.branches[key].push(step.n, out.detach(), self.m.eps)
        for other in self.branches.values():
            other.group = None
        self._open, self.drift, self._last_full = [], 0.0, step.n

    def _regroup(self, n: int) -> None:
        """Groups of all tokens, pooled over the branches."""
        known = [(b, b.kappa) for b in self.branches.values() if b.kappa is not None]
        pooled = torch.cat([kappa.flatten() for _, kappa in known])
        fixed = {"stable": STABLE, "linear": LINEAR, "chaotic": CHAOTIC}.get(self.m.groups)
        group = token_groups(pooled, self.m.stable, self.m.chaotic)
        if fixed is not None:
            group = torch.full_like(group, fixed)
        elif self.m.groups == "random":
            order = torch.randperm(group.numel(), generator=torch.Generator().manual_seed(n))
            group = group[order.to(group.device)]
        parts = torch.split_with_sizes(group, [kappa.numel() for _, kappa in known])
        for (branch, kappa), part in zip(known, parts, strict=True):
            branch.group = part.view_as(kappa)

    def predict(self, step: Step, x: Tensor, call: Call) -> Tensor:
        """Every token by the rule of its group, from the last computed output."""
        branch = self.branches[step.branch, call.stream(x)]
        if branch.group is None:
            self._regroup(step.n)
        assert branch.last is not None
        assert branch.kappa is not None
        assert branch.group is not None
        k, n_max = step.n - branch.step, self.m.n_max
        a, before = damping(k, n_max), damping(k - 1, n_max)
        (v0, v1), chaotic = branch.slopes, branch.group == CHAOTIC
        w0 = torch.where(chaotic, k * (1 - a), k * (branch.group == LINEAR)).unsqueeze(-1).to(v0.dtype)
        y = torch.addcmul(branch.last, w0, v0).addcmul_((chaotic * (k * a)).unsqueeze(-1).to(v1.dtype), v1)
        moved = (k * (1 - a) - (k - 1) * (1 - before)) * v0.float() + (k * a - (k - 1) * before) * v1.float()
        drift = (branch.kappa * torch.linalg.vector_norm(moved, dim=-1)).masked_fill_(~chaotic, 0.0)
        counted = torch.ones_like(drift) if self.m.drift == "all" else chaotic.to(drift.dtype)
        self._open.append(torch.stack([drift.sum(), counted.sum()]))
        return branch.view.join(y)

    def tensors(self) -> Iterable[Tensor]:
        """Output, slopes, curvature and groups of every branch."""
        kept = [t for b in self.branches.values() for t in (b.last, *b.slopes, b.kappa, b.group)]
        return [t for t in kept if t is not None]

    def notes(self) -> Iterable[str]:
        """Steps at which the curvature was not finite."""
        return self._notes

    def numbers(self) -> str:
        """The largest drift."""
        return f"the largest drift was {self.largest:.4g}, against threshold={self.m.threshold:g}"


@register
@dataclass(frozen=True)
class WorldCache(DenoiseMethod):
    """Extrapolate every token by the rule of its curvature group; recompute when the chaotic ones have drifted."""

    name: ClassVar[str] = "worldcache"
    description: ClassVar[str] = "extrapolate tokens by curvature group, recompute when chaotic ones drift"
    paper: ClassVar[Paper] = Paper(
        "WorldCache: Accelerating World Models for Free via Heterogeneous Token Caching",
        "ICML 2026",
        "https://arxiv.org/abs/2603.06331",
    )
    levels: ClassVar[tuple[Level, ...]] = ("head", "model")

    stable: float = option(0.3, "tokens below this quantile of curvature are reused", ge=0, le=1)
    chaotic: float = option(0.6, "tokens from this quantile of curvature on are damped", ge=0, le=1)
    n_max: int = option(6, "most stand-ins in a row; 0 computes all", ge=0)
    threshold: float = option(1.0, "accumulated drift at which a step is computed (eta); 0 computes all", ge=0)
    warmup_steps: int = option(5, "steps that are always computed at the start; below 3 acts like 3", ge=0)
    tail_steps: int = option(1, "steps that are always computed at the end", ge=0)
    eps: float = option(1e-8, "added to the squared speed of a token", gt=0)
    drift: Literal["all", "chaotic"] = option(
        "all", "drift is divided by the number of these tokens", choices=("all", "chaotic")
    )
    groups: Groups = option(
        "curvature", "what groups tokens", choices=("curvature", "random", "stable", "linear", "chaotic")
    )
    site: Literal["head", "model"] = option(
        "head", "tokens of the output projection, or places of the prediction", choices=("head", "model")
    )
    modalities: tuple[int, ...] | None = option(
        None, "site='model': channels of every modality, each a token of its own; None is one modality"
    )

    def __post_init__(self) -> None:
        """Modalities are channels of the prediction."""
        super().__post_init__()
        given: Sequence[int] | None = self.modalities
        if given is None:
            return
        whole = isinstance(given, (tuple, list)) and all(type(c) is int and c > 0 for c in given)
        if not (whole and given):
            raise OptionError(f"worldcache: modalities={given!r} are not one or more positive numbers of channels")
        if self.site != "model":
            raise OptionError("worldcache: modalities are channels of the prediction; they belong to site='model'")

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """One object at the head or at the denoiser."""
        sites = host.site(self.site, self.name)
        group = Group(self.name, sites, lambda: WorldState(self))
        return Plan([group], Claims(frozenset(sites), needs_total=self.tail_steps > 0))
