"""RegionE: in image editing compute only what is edited; the rest jumps ahead, and velocities decay between steps.

Paper: "RegionE: Adaptive Region-Aware Generation for Efficient Image Editing", ICLR 2026,
https://arxiv.org/abs/2510.25590; the released code is Peyton-Chen/RegionE (Kontext, Step1X-Edit, Qwen-Image-Edit).

An editing model is called with text P, noise tokens X and the tokens I of the picture that is edited. With T steps,
noise levels s_0 > ... > s_T, W warm-up steps, Q post steps and forced steps r (counted from 1, as in the paper):

stabilise   steps 0 .. W-1 run on [P, X, I]. The last one estimates the result, x + (s_T - s_(W-1)) v; a token is edited
            if its cosine with the token of I at the same place is at most eta. The mask is eroded by a 3 x 3 cross
            (nothing beyond the border) and dilated by a 5 x 5 square: E, and the unedited rest U.
jump        E takes the Euler step; U goes at once to the next full step, with the same v: s_(r-1) - s_(W-1).
region      between full steps the network is called with [P, X_E] alone. Keys and values of all tokens are those of the
            last full step, with those of the live tokens written over them at their own positions.
forced      at the steps r the whole [P, X, I] runs, all keys and values are renewed, E steps and U jumps on (the last
            time to step T-Q).
decay       of the region steps but the first, some reuse the guided velocity v of the last computed step. With
            d_n = gamma_n (1 - (s_(n-1) - s_n)), a step is computed if d_n >= 1 or 1 - prod d > delta, the product taken
            since the last computed step; otherwise it is given v times that product.
smooth      the last Q steps run in full.

`gammas` are T - 1 numbers fitted for a model: `elision.fit` measures the mean of |v_n| / |v_(n-1)| / (1 - (s_(n-1) -
s_n)) over uncached runs. How the paper takes the norm is not published (inferred): of the whole velocity, or the mean
over tokens of ratios of theirs (`norm`). `preset` has the published tables, in float16 as the released code has them,
with the published eta and delta.

Where paper and code differ: the factor of a reused velocity is the product of all d since it was computed (the paper's
equation 9, the default), or only the last d (`factor="last"`, the code). Kept keys are normed and rotated, the code
keeps them raw and does both anew; positions never change, so that is the same. With nothing edited the code calls the
network on the text alone and drops the result; here it is not called. The code needs a forced step; `forced=()` jumps
from W-1 to T-Q at once. The code has one store for keys and values, here every guidance branch has its own. The code
edits one image at a time; here the images of a batch with different regions go through the network one by one in region
steps. `keep_kv=False` is the paper's ablation: region steps attend to [P, X_E] only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import nan
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from elision.denoise.control import Control
from elision.denoise.live import Live
from elision.denoise.policy import Claims, Decision, DenoiseMethod, Group, Host, Plan, Schedule
from elision.denoise.predictors import Decay
from elision.denoise.regions import as_rows, edited, indices
from elision.denoise.schedules import TAIL, WARMUP
from elision.denoise.sites import Call, Level, Site
from elision.denoise.steps import Step
from elision.errors import OptionError, UnsupportedTarget
from elision.method import Paper, option, register
from elision.profile import Profile

REGION, FORCED = Decision(False, "edited tokens"), Decision(False, "forced step")
DECAYS, NOTHING = Decision(True, "velocity decays"), Decision(True, "nothing is edited")
NO_REGION = Decision(False, "no region")


@dataclass(frozen=True)
class Preset:
    """What was published for a model: eta, delta, and gamma of every transition in ten-thousandths."""

    eta: float
    delta: float
    table: tuple[int, ...]

    @property
    def gammas(self) -> tuple[float, ...]:
        """Gamma in float16, as the released code multiplies with it."""
        return tuple((torch.tensor(self.table, dtype=torch.float64) / 1e4).half().double().tolist())


# fmt: off
PRESETS = {
    "kontext": Preset(0.93, 0.04, (
        8352, 9986, 10090, 10097, 10161, 10152, 10160, 10173, 10177, 10199, 10213, 10203, 10257, 10236, 10235, 10278,
        10302, 10311, 10352, 10371, 10391, 10459, 10498, 10581, 10693, 10866, 11090)),
    "step1x-v1p1": Preset(0.88, 0.02, (
        9746, 9593, 10036, 10084, 10106, 10114, 10138, 10163, 10152, 10163, 10197, 10186, 10219, 10218, 10223, 10266,
        10272, 10305, 10311, 10362, 10385, 10423, 10500, 10536, 10671, 10866, 11015)),
    "step1x-v1p2": Preset(0.88, 0.02, (
        7936, 9807, 10063, 10205, 9946, 10125, 10116, 10125, 10172, 10171, 10183, 10170, 10170, 10236, 10263, 10264,
        10277, 10321, 10338, 10361, 10396, 10454, 10492, 10566, 10696, 10879, 11179)),
    "qwen": Preset(0.80, 0.03, (
        10195, 10233, 10243, 10185, 10321, 10208, 10260, 10233, 10258, 10292, 10316, 10306, 10289, 10347, 10329, 10402,
        10378, 10384, 10413, 10444, 10526, 10400, 10555, 10439, 10357, 10118, 7603)),
    "qwen-2509": Preset(0.80, 0.03, (
        10186, 10241, 10236, 10205, 10298, 10221, 10248, 10246, 10269, 10275, 10323, 10311, 10298, 10353, 10343, 10397,
        10387, 10393, 10404, 10458, 10507, 10418, 10518, 10426, 10311, 10068, 7628)),
}
# fmt: on


@dataclass(frozen=True)
class Course:
    """Which steps of a run are full and where the unedited tokens jump to; steps are counted from 0.

    Attributes:
        total: T.
        warmup: W.
        post: Q.
        forced: the forced steps.
    """

    total: int
    warmup: int
    post: int
    forced: tuple[int, ...]

    @property
    def regional(self) -> bool:
        """Whether there is any step between warm-up and post steps."""
        return self.warmup < self.total - self.post

    def is_region(self, n: int) -> bool:
        """Whether step `n` computes edited tokens only, if anything."""
        return self.warmup <= n < self.total - self.post and n not in self.forced

    @property
    def jumps(self) -> dict[int, int]:
        """At these steps the unedited tokens go on to those."""
        stops = [self.warmup - 1, *self.forced, self.total - self.post]
        return dict(pairwise(stops)) if self.regional else {}

    def check(self) -> None:
        """Refuse forced steps that do not lie within the region steps."""
        low, high = self.warmup + 2, self.total - self.post - 1
        wrong = [n + 1 for n in self.forced if not low <= n + 1 <= high]
        if self.regional and wrong:
            raise OptionError(
                f"regione: forced={tuple(n + 1 for n in self.forced)}, but in a run of {self.total} steps with "
                f"warmup_steps={self.warmup} and post_steps={self.post} a forced step must lie between {low} and "
                f"{high}: give others, or forced=()"
            )


def decays(sigmas: Sequence[float], gammas: Sequence[float] | None, course: Course, delta: float) -> list[float | None]:
    """For every step the decay d_n at which it stands in, None if it is computed; depends on no latent."""
    found: list[float | None] = [None] * course.total
    product = 1.0
    for n in range(course.warmup + 1, course.total - course.post):
        if gammas is None or not course.is_region(n):
            product = 1.0
            continue
        decay = gammas[n - 1] * (1 - (sigmas[n - 1] - sigmas[n]))
        product *= decay
        if decay >= 1 or 1 - product > delta:
            product = 1.0
        else:
            found[n] = decay
    return found


def factor(found: Sequence[float | None], n: int, rule: Literal["product", "last"], computed: int = -1) -> float:
    """What the velocity of the last computed step is multiplied with at step `n`; it was not before step `computed`."""
    total = 1.0
    while n > computed and (decay := found[n]) is not None:
        total, n = total * decay, computed if rule == "last" else n - 1
    return total


class Regions(Schedule, Decay):
    """Decides every step, finds the region when the warm-up ends, knows what is live, and lets velocities decay."""

    listens: ClassVar[bool] = True

    def __init__(self, method: RegionE, eta: float, delta: float, gammas: Sequence[float] | None, host: Host) -> None:
        Decay.__init__(self, lambda step, last: factor(self.table, step.n, self.m.factor, last.n))
        self.m, self.eta, self.delta, self.gammas, self.host = method, eta, delta, gammas, host
        self.course = Course(0, method.warmup_steps, 0, ())
        self.table: list[float | None] = []
        self.grid = (0, 0)
        self.mask: Tensor | None = None  # [B, L], True is edited
        self.live: Live | None = None
        self.begin = 0

    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """By the table; it is made at the first step."""
        if not self.table:
            self._tabulate(step, call.sigmas)
        if step.n < self.course.warmup:
            return WARMUP
        if step.n >= self.course.total - self.course.post:
            return TAIL
        if self.mask is None:
            return NO_REGION
        if step.n in self.course.forced:
            return FORCED
        if not any(len(one) for one in ([self.live] if isinstance(self.live, Tensor) else self.live or ())):
            return NOTHING
        return REGION if self.table[step.n] is None else DECAYS

    def _tabulate(self, step: Step, sigmas: Sequence[float]) -> None:
        assert step.total is not None
        self.begin = step.i - step.n
        forced = tuple(n - 1 for n in self.m.forced)
        self.course = Course(step.total, self.m.warmup_steps, self.m.post_steps, forced)
        self.course.check()
        gammas = self.gammas if self.delta > 0 and self.course.regional else None
        if gammas is not None and len(gammas) != step.total - 1:
            raise OptionError(
                f"regione: gammas are for runs of {len(gammas) + 1} steps, this one has {step.total}: fit others with "
                "elision.fit, sample with as many steps, or compute every region step with delta=0"
            )
        self.table = decays(sigmas[self.begin :], gammas, self.course, self.delta)

    def update(self, step: Step, site: Site, call: Call, out: Any, computed: bool) -> None:
        """At the last step of the warm-up: the region."""
        if step.n == 0 or step.n == self.course.warmup - 1:
            reference = self._reference(step, call)
            if step.n == self.course.warmup - 1 and self.course.regional:
                estimate = call.x.float() + (call.sigmas[-1] - call.sigmas[step.i]) * out.float()
                self.mask = edited(estimate, reference, self.grid, self.eta)
                self.live = indices(self.mask)

    def _reference(self, step: Step, call: Call) -> Tensor:
        """The tokens [B, L, d] of the picture that is edited."""
        latent = self.host.adapter.latent
        x, tokens = call.x, call.get(latent)
        assert self.host.adapter.grids is not None
        grids = self.host.adapter.grids(call)
        if x.ndim != 3 or len(grids) <= self.m.reference or grids[0][0] * grids[0][1] != x.shape[1]:
            raise UnsupportedTarget(
                f"regione edits pictures, and {type(self.host.model).__name__} was called with {len(grids) - 1} "
                f"(latent {tuple(x.shape)}, {latent} {tuple(tokens.shape)}): use an editing pipeline, "
                "such as FluxKontextPipeline or QwenImageEditPipeline"
            )
        mine = grids[self.m.reference]
        if mine != grids[0]:
            raise UnsupportedTarget(
                f"regione compares the result, {grids[0][0]} x {grids[0][1]} tokens, with the picture that is edited, "
                f"and that has {mine[0]} x {mine[1]}: draw it in the size of the picture"
            )
        self.grid = mine
        start = sum(height * width for height, width in grids[: self.m.reference])
        rows = slice(0, len(x)) if step.cond is None or len(tokens) == len(x) else step.cond
        reference: Tensor = tokens[rows, start : start + x.shape[1]]
        return reference

    def tensors(self) -> Iterable[Tensor]:
        """The kept velocity and the region."""
        kept, mask = Decay.tensors(self), self.mask
        return kept if mask is None else (*kept, mask)

    def extra(self) -> dict[str, Any]:
        """The region of every image, and the thresholds."""
        if self.mask is None:
            return {}
        shown = {"grid": list(self.grid), "mask": as_rows(self.mask, self.grid)}
        return shown | {"edited": self.mask.sum(1).tolist(), "eta": self.eta, "delta": self.delta}

    def numbers(self) -> str:
        """The share of edited tokens."""
        return "" if self.mask is None else f"{self.mask.float().mean():.0%} of the tokens are edited"

    def notes(self) -> list[str]:
        """What a careful user should know of the region."""
        if self.mask is None:
            missing = self.table and self.course.regional
            return ["the region was not found: the run began or broke off inside"] if missing else []
        return []


class Jumps(Control):
    """Live tokens of every step, and how far each of them goes."""

    def __init__(self, regions: Regions, keep_kv: bool) -> None:
        self.r, self.keep_kv = regions, keep_kv

    def tokens(self, step: Step) -> Live | None:
        """The edited ones at region steps."""
        return self.r.live if self.r.mask is not None and self.r.course.is_region(step.n) else None

    def keeps(self, step: Step) -> bool:
        """At every step from which unedited tokens jump."""
        known = self.r.mask is not None or step.n < self.r.course.warmup
        return self.keep_kv and known and step.n in self.r.course.jumps

    def dt(self, step: Step, sigmas: Sequence[float], stood_in: bool) -> Tensor | None:
        """The scheduler's own for edited tokens; unedited ones jump from full steps and stand still at region steps."""
        mask, course = self.r.mask, self.r.course
        if mask is None or not (step.n in course.jumps or course.is_region(step.n)):
            return None
        to = course.jumps.get(step.n)
        far = 0.0 if to is None else sigmas[self.r.begin + to] - sigmas[step.i]
        return torch.full(mask.shape, far, device=mask.device).masked_fill_(mask, nan).unsqueeze(-1)


@register
@dataclass(frozen=True)
class RegionE(DenoiseMethod):
    """Compute edited tokens only, let the others jump to the next full step, reuse decaying velocities in between."""

    name: ClassVar[str] = "regione"
    description: ClassVar[str] = "editing: compute the edited tokens only, jump the others, decay the velocity"
    paper: ClassVar[Paper] = Paper(
        "RegionE: Adaptive Region-Aware Generation for Efficient Image Editing",
        "ICLR 2026",
        "https://arxiv.org/abs/2510.25590",
    )
    needs_profile: ClassVar[bool] = True
    levels: ClassVar[tuple[Level, ...]] = ("kv",)

    preset: Literal["kontext", "step1x-v1p1", "step1x-v1p2", "qwen", "qwen-2509"] | None = option(
        None, "published eta, delta and gammas, for runs of 28 steps", choices=(None, *PRESETS)
    )
    eta: float | None = option(None, "cosine up to which a token is edited; None is the preset's or 0.93", ge=-2, le=2)
    delta: float | None = option(
        None, "largest decay that is bridged; 0 computes every region step, None is the preset's or 0.04", ge=0, le=1
    )
    warmup_steps: int = option(6, "full steps at the start (W)", ge=1)
    post_steps: int = option(2, "full steps at the end (Q)", ge=0)
    forced: tuple[int, ...] = option((16,), "full steps in between, counted from 1; () is none")
    gammas: tuple[float, ...] | None = option(
        None, "ratio of velocities per transition, one less than steps; None is the preset's or the profile's"
    )
    factor: Literal["product", "last"] = option(
        "product", "what a reused velocity is multiplied with", choices=("product", "last")
    )
    keep_kv: bool = option(True, "attend to the tokens that are left out, too", choices=(True, False))
    reference: int = option(1, "which picture of the call, counted from 1, is edited", ge=1)
    norm: Literal["whole", "token"] = option(
        "whole", "fit: ratios of whole velocities, or means of ratios of tokens", choices=("whole", "token")
    )

    def __post_init__(self) -> None:
        """Forced steps are ascending and not adjacent; gammas are positive."""
        super().__post_init__()
        forced: Any = self.forced
        whole = isinstance(forced, (tuple, list)) and all(type(n) is int and n > 0 for n in forced)
        if not whole or any(b - a < 2 for a, b in pairwise(forced)):
            raise OptionError(
                f"regione: forced={forced!r} are not steps counted from 1, ascending and not next to each other"
            )
        gammas: Any = self.gammas
        if gammas is None:
            return
        fine = isinstance(gammas, (tuple, list)) and all(type(g) in (int, float) and 0 < g < 10 for g in gammas)
        if not (fine and gammas):
            raise OptionError(f"regione: gammas={gammas!r} are not one or more positive numbers below 10")

    @property
    def wants_profile(self) -> bool:
        """Whether gammas are left to the profile."""
        return self.preset is None and self.gammas is None and self.delta != 0

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """The guided velocity, keys and values of every attention, and the sampler's steps and tokens."""
        kv, guided = host.site("kv", self.name), host.site("guided", self.name)
        known = PRESETS["kontext"] if self.preset is None else PRESETS[self.preset]
        gammas = self.gammas
        if gammas is None and profile is not None:
            gammas = tuple(profile.tensors["gammas"].tolist())
        elif gammas is None and self.preset is not None:
            gammas = known.gammas
        eta = known.eta if self.eta is None else self.eta
        delta = known.delta if self.delta is None else self.delta
        group = Group(self.name, guided, lambda: Regions(self, eta, delta, gammas, host))
        claims = Claims(frozenset((*guided, *kv)), frozenset(("dt", "tokens")), needs_total=True, needs_every_step=True)

        def control(schedules: Sequence[Schedule]) -> Control:
            (regions,) = schedules
            assert isinstance(regions, Regions)
            return Jumps(regions, self.keep_kv)

        return Plan([group], claims, control=control)

    def fit(self, target: Any, calls: Sequence[Any], **settings: Any) -> Profile:
        """Measure gamma on runs of `calls`."""
        from elision.denoise.fit.regione import calibrate  # it imports the engine

        return calibrate(self, target, calls, **settings)
