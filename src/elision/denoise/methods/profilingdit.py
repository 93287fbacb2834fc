"""ProfilingDiT: blocks that attend to the background are skipped in runs, each by one delta, ever more often renewed.

Paper: "Model Reveals What to Cache: Profiling-Based Feature Reuse for Video Diffusion Models", 2025,
https://arxiv.org/abs/2504.03140; the released code is GeekGuru123/ProfilingDiT, which holds the cache but no profiling.

Offline (`elision.fit`, uncached runs): with P the softmax attention of block i, the attention that token t receives is
the column mean `mean over heads and queries of P[query, t]`; the tokens above a threshold are its high-attention set H;
with M the foreground of the noise prediction, per frame,

    R_i = |H and M| / |M|        averaged over frames, and over steps from s0 on
    B   = {i : R_i < tau}        the background blocks, a fixed list per model

Sampling: B is split into maximal runs [j..k] of consecutive blocks; a run keeps one tensor D = h_out(k) - h_in(j) per
stream and guidance branch:

    step < s0           every block is computed, nothing is kept
    refresh step        every block is computed, D is overwritten
    any other step      h += D once for each run, the blocks outside of B are computed on the current h

Refresh steps, of which s0 is the first: `schedule="list"` is the released list for 50 steps, "uniform" every
`interval`-th step, "formula" the paper's shrinking interval T_s = T_max - (T_max - T_min)(s - s0)/(S - s0), generated
as "next = s + round(T_s)" (inferred: read literally, "s is a multiple of T_s" hardly ever fires). A list without s0, on
which the released code crashes, is refused. `preset` is a whole released configuration: HunyuanVideo's list for its
single-stream blocks beside one uniform run over double-stream blocks 6 to 19, or Wan2.1-14B's list.

Where paper and code differ: the paper writes a sum of deltas, the code overwrites, and so does this; the released code
loses the base of a run that starts at block 0, here it is the input of the run. Runs never cross from one list of
blocks (two-stream, single-stream) into the next. Not published and therefore inferred: the attention threshold
(default: the mean, 1/N), tau (default: a quantile, `share`), the aggregation over steps, the segmentation that stands
in for SAM2 (see `segmentation`; true masks can be given to `fit`, see `elision.denoise.fit.profilingdit.Masked`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from elision.denoise.policy import Claims, DenoiseMethod, Group, Host, Plan
from elision.denoise.predictors import Residual, Reuse
from elision.denoise.schedules import Refresh, Refreshed
from elision.denoise.sites import Call, Level
from elision.denoise.steps import Step
from elision.errors import OptionError, ProfileMismatch, UnsupportedTarget
from elision.method import Paper, option, register
from elision.profile import Profile

RELEASED_LIST = (6, 18, 26, 32, 38, 42, 46, 48)


@dataclass(frozen=True)
class Part:
    """What a preset does to one list of blocks: its length, the blocks that are cached, and when they are renewed."""

    depth: int
    blocks: tuple[int, ...]
    refresh: Refresh


_HUNYUAN = (0, 2, *range(4, 8), *range(10, 22), 23, *range(25, 28), 31, 33)
_WAN = (0, *range(2, 8), *range(10, 21), *range(25, 33), 37, 38)
PRESETS: dict[str, tuple[Part, ...]] = {
    "hunyuan-video": (
        Part(20, tuple(range(6, 20)), Refresh("uniform", 6, interval=6)),
        Part(40, _HUNYUAN, Refresh("list", 6, RELEASED_LIST)),
    ),
    "wan2.1-14b": (Part(40, _WAN, Refresh("uniform", 6, interval=6)),),
}


def runs_of(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive numbers, as (first, last)."""
    runs: list[tuple[int, int]] = []
    for i in sorted(set(blocks)):
        if runs and i == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], i
        else:
            runs.append((i, i))
    return runs


class _Delta(Residual):
    """Output minus input of a run, from step `start` on."""

    def __init__(self, start: int) -> None:
        super().__init__(Reuse())
        self._start = start

    def observe(self, step: Step, x: Tensor, call: Call, out: Tensor, computed: bool) -> None:
        """Keep the delta of a computed run, unless the step is an early one."""
        if step.n >= self._start:
            super().observe(step, x, call, out, computed)


@register
@dataclass(frozen=True)
class ProfilingDiT(DenoiseMethod):
    """Skip runs of blocks that attend to the background, and add what they last added."""

    name: ClassVar[str] = "profilingdit"
    description: ClassVar[str] = "skip background blocks, found by their attention, and add what they last added"
    paper: ClassVar[Paper] = Paper(
        "Model Reveals What to Cache: Profiling-Based Feature Reuse for Video Diffusion Models",
        "arXiv 2025",
        "https://arxiv.org/abs/2504.03140",
    )
    needs_profile: ClassVar[bool] = True
    levels: ClassVar[tuple[Level, ...]] = ("run",)

    preset: str | None = option(None, "a released configuration as a whole", choices=(None, *PRESETS))
    blocks: tuple[int, ...] | None = option(
        None, "blocks that are cached, counted over all lists of blocks; None takes the profile's"
    )
    cached: Literal["background", "foreground"] = option(
        "background", "which blocks of the profile are cached", choices=("background", "foreground")
    )
    tau: float | None = option(None, "blocks with a smaller R are background; None takes `share`", ge=0, le=1)
    share: float = option(0.6, "part of the blocks that is background, HunyuanVideo's 24 of 40 (inferred)", ge=0, le=1)
    warmup_steps: int = option(6, "steps before the first refresh, all computed (s0)", ge=0)
    schedule: Literal["list", "uniform", "formula"] = option(
        "list", "which refresh steps", choices=("list", "uniform", "formula")
    )
    refresh: tuple[int, ...] = option(RELEASED_LIST, "list: the refresh steps")
    interval: int = option(6, "uniform: steps from one refresh to the next", ge=1)
    longest: float = option(12.0, "formula: the interval at s0 (T_max)", ge=1)
    shortest: float = option(2.0, "formula: the interval at the end (T_min); above `longest` intervals grow", ge=1)
    attention_threshold: float = option(
        1.0, "fit: attention received above which a token counts as high, in means 1/N (inferred)", gt=0
    )
    segmentation: Literal["kmeans", "otsu"] = option(
        "kmeans", "fit: how the principal components are split (inferred, instead of SAM2)", choices=("kmeans", "otsu")
    )

    def __post_init__(self) -> None:
        """Rules between options."""
        super().__post_init__()
        for name in ("blocks", "refresh"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)):
                raise OptionError(f"profilingdit: {name}={value!r} is no tuple of numbers from 0 on, as in (6, 18)")
        foreign = {"refresh": "list", "interval": "uniform", "longest": "formula", "shortest": "formula"}
        names = {n: f"schedule={self.schedule!r}" for n, kind in foreign.items() if kind != self.schedule}
        if self.preset is not None:
            own = ("blocks", "cached", "tau", "share", "warmup_steps", "schedule", *foreign)
            names = dict.fromkeys(own, f"preset={self.preset!r}")
        elif self.blocks is not None:
            names |= dict.fromkeys(("cached", "tau", "share"), "given blocks")
        for name, reason in names.items():
            if getattr(self, name) != self.options()[name].default:
                raise OptionError(f"profilingdit: {name} has no meaning for {reason}; leave it out")
        if self.preset is None and self.schedule == "list" and self.warmup_steps not in self.refresh:
            raise OptionError(
                f"profilingdit: refresh={self.refresh} lacks step warmup_steps={self.warmup_steps}, the first refresh, "
                "so there would be nothing to add: put it into the list"
            )

    @property
    def wants_profile(self) -> bool:
        """Where the blocks are not named."""
        return self.preset is None and self.blocks is None

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """One site per run of cached blocks; its delta stands in."""
        if not host.adapter.lists:
            host.site("run", self.name)  # raises, naming the classes that have blocks
        sites, rules = [], {}
        for first, last, refresh in self.runs(host, profile):
            sites.append(host.adapter.run(host.model, first, last + 1))
            rules[sites[-1].key] = refresh
        start = 6 if self.preset else self.warmup_steps
        needs_total = any(refresh.kind == "formula" for refresh in rules.values())
        group = Group(self.name, sites, lambda: Refreshed(rules), lambda: _Delta(start))
        notes = [] if sites else ["no block is cached, so nothing is elided"]
        return Plan([group], Claims(frozenset(sites), needs_total=needs_total), notes)

    def runs(self, host: Host, profile: Profile | None) -> Iterator[tuple[int, int, Refresh]]:
        """The runs of cached blocks, counted over all lists, and when each is renewed."""
        depths = list(host.adapter.depths(host.model).values())
        parts = PRESETS[self.preset] if self.preset else self._parts(depths, profile)
        if [part.depth for part in parts] != depths:
            wanted = "+".join(str(part.depth) for part in parts)
            raise UnsupportedTarget(
                f"profilingdit: preset={self.preset!r} is for lists of {wanted} blocks, {type(host.model).__name__} "
                f"has {'+'.join(map(str, depths))}: block lists belong to one model, so fit a profile"
            )
        before = 0
        for part in parts:
            for first, last in runs_of(part.blocks):
                yield before + first, before + last, part.refresh
            before += part.depth

    def _parts(self, depths: Sequence[int], profile: Profile | None) -> list[Part]:
        """The chosen blocks, list by list, all renewed together."""
        total = sum(depths)
        blocks = self.blocks
        if blocks is None:
            assert profile is not None
            ratio = profile.tensors["ratio"]
            if ratio.shape[1] != total:
                raise ProfileMismatch(
                    f"profilingdit: the profile is of {ratio.shape[1]} blocks, the denoiser has {total}: fit one for it"
                )
            blocks = self.chosen(ratio)
        if blocks and max(blocks) >= total:
            raise OptionError(f"profilingdit: block {max(blocks)} does not exist, the denoiser has {total} from 0 on")
        refresh = Refresh(self.schedule, self.warmup_steps, self.refresh, self.interval, (self.longest, self.shortest))
        parts, before = [], 0
        for depth in depths:
            mine = tuple(i - before for i in blocks if before <= i < before + depth)
            parts.append(Part(depth, mine, refresh))
            before += depth
        return parts

    def chosen(self, ratio: Tensor) -> tuple[int, ...]:
        """The background (or foreground) blocks by their R, from `ratio` [steps, blocks]; unknown entries are NaN."""
        mean = ratio.nanmean(dim=0)
        if self.tau is not None:
            background = mean < self.tau
        else:
            background = torch.zeros_like(mean, dtype=torch.bool)
            background[mean.argsort(stable=True)[: round(self.share * len(mean))]] = True
        wanted = background if self.cached == "background" else ~background
        return tuple(wanted.nonzero().flatten().tolist())

    def fit(self, target: Any, calls: Sequence[Any], **settings: Any) -> Profile:
        """Profile the attention of every block in uncached runs of `calls`."""
        from elision.denoise.fit.profilingdit import measure  # the recorder imports the engine

        return measure(self, target, calls, **settings)
