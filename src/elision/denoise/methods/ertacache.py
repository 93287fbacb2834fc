"""ERTACache: skip a list of steps found offline, with smaller solver steps and corrected outputs where it skips.

Paper: "ERTACache: Error Rectification and Timesteps Adjustment for Efficient Diffusion", ICLR 2026,
https://arxiv.org/abs/2508.21091. Its code was not public; what is built here follows public notes and reviews of it.
With r the residual (output minus latent) of the last computed step, a skipped step uses v~ = x + r, and

(a) list    which steps are skipped is found by `elision.fit`: calibration runs in which the network always runs but
            skipped steps continue with v~; step i is skipped if |v~ - v_i|_1 / |r_i|_1 < `threshold`, with r_i the
            residual of the uncached run;
(b) step    a skipped step goes only a part of its way, f_i = clip(1 - |v~ - v_i|_1 / |v_i - v_(i-1)|_1, 0, 1), and
            what is left of the time is spread over the steps to come: with s the noise level that was reached, a step
            from grid point s_i to s_(i+1) goes (s - s_T) (s_i - s_(i+1)) / (s_i - s_T), times f_i if it is skipped. The
            last step takes what remains; the network is told s;
(c) output  the error v~ - v is modelled as sigmoid(K_i v~ + B_i), linearised, and subtracted; K and B are its least
            squares fit: K_i = 4 cov(v~, error) / var(v~), B_i = 4 (mean(error) - 1/2) - K_i mean(v~).

Inferred, and therefore options: the error is averaged over all calibration runs while they share their decisions, or
each run decides by itself and the averages are compared (`pool`); f_i is a ratio of means or a mean of ratios
(`average`); K and B are numbers or one for every channel (`granularity`), measured with or without (b) at work
(`refit`); the true sigmoid, whose error is never negative (`rectify="sigmoid"`); the network is told the time of the
grid (`feed="nominal"`); at most `max_frozen` skipped steps in a row may have f_i below 0.05, the next is computed. Also
inferred: decisions and f are those of the conditional branch; every branch has its own r, K and B (all branches but the
conditional one share K and B); the first step and `tail_steps` at the end are computed; (b) on uneven grids. Notes that
print the last term of B as 4 K mean(v~) contradict the least squares fit, and that of the time left lacks a factor 1/T.

Without a profile the list can be given by hand (`reused`), and one step factor for all of it (`phi`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from elision.denoise.control import Control
from elision.denoise.policy import Claims, DenoiseMethod, Group, Host, Plan
from elision.denoise.predictors import Residual, Reuse
from elision.denoise.schedules import Skips
from elision.denoise.sites import Call, channel_axis
from elision.denoise.steps import Step
from elision.errors import OptionError, ProfileMismatch
from elision.method import Paper, option, register
from elision.profile import Profile

FROZEN = 0.05  # a step factor below it leaves the latent where it is


class StepSizes(Control):
    """(b): skipped steps go a part of their way, and the steps to come share what is left."""

    def __init__(self, phi: Mapping[int, float], feed: bool = True, always: frozenset[int] = frozenset()) -> None:
        self.phi, self.feed, self.always = phi, feed, always
        self.reached: float | None = None  # the noise level of the latent, once it has left the grid

    def dt(self, step: Step, sigmas: Sequence[float], stood_in: bool) -> float | None:
        """A share of the time left, times the factor of a skipped step."""
        skipped = (stood_in or step.n in self.always) and not step.last
        phi = self.phi.get(step.n, 1.0) if skipped else 1.0
        if self.reached is None and phi == 1.0:
            return None
        here, following, end = sigmas[step.i], sigmas[step.i + 1], sigmas[-1]
        start = here if self.reached is None else self.reached
        share = 1.0 if step.last or here == end else (here - following) / (here - end)
        change = (start - end) * share * phi
        self.reached = start - change
        return -change

    def time(self, step: Step) -> float | None:
        """The noise level that was reached."""
        return self.reached if self.feed else None


class Rectified(Residual):
    """(c): the last residual on the current latent, minus the modelled error.

    Args:
        tables: K and B [T, C] of the conditional branch ("cond") and of the others ("rest"); C is 1 for plain numbers.
        sigmoid: the true sigmoid instead of its linearisation.
    """

    def __init__(self, tables: Mapping[str, tuple[Tensor, Tensor]], sigmoid: bool) -> None:
        super().__init__(Reuse())
        self.kind = "predicted"  # type: ignore[misc]
        self._tables, self._sigmoid = tables, sigmoid

    def predict(self, step: Step, x: Tensor, call: Call) -> Tensor:
        """v~ minus the error that K and B of this step say it has."""
        v = super().predict(step, x, call)
        z = self._rows(step, v, 0) * v.float() + self._rows(step, v, 1)
        error = torch.sigmoid(z) if self._sigmoid else z / 4 + 0.5
        return (v.float() - error).to(v.dtype)

    def _rows(self, step: Step, v: Tensor, which: int) -> Tensor:
        """K or B of this step for every row [B, 1, .., C, .., 1]."""
        parts = step.rows(len(v))
        missing = sorted(parts.keys() - self._tables.keys())
        if missing:
            raise ProfileMismatch(
                f"this ertacache profile has no correction for the {missing[0]!r} guidance branch: fit it on runs that "
                "are guided like this one, or pass rectify='off'"
            )
        width = next(iter(self._tables.values()))[which].shape[1]
        rows = torch.empty(len(v), width, dtype=torch.float32)
        for name, mine in parts.items():
            rows[mine] = self._tables[name][which][step.n].float()
        shape = [len(v)] + [1] * (v.ndim - 1)
        shape[channel_axis(v)] = width
        return rows.view(shape).to(v.device)


def bounded(reused: frozenset[int], phi: Mapping[int, float], most: int) -> frozenset[int]:
    """The list without the steps that would let the latent stand still more than `most` times in a row."""
    kept, standing = set(), 0
    for n in range(max(reused, default=-1) + 1):
        frozen = n in reused and phi.get(n, 1.0) < FROZEN
        standing = standing + 1 if frozen else 0
        if standing > most:
            standing = 0
        elif n in reused:
            kept.add(n)
    return frozenset(kept)


@register
@dataclass(frozen=True)
class ERTACache(DenoiseMethod):
    """Skip the steps of a list found offline, with smaller solver steps and a linear correction where it skips."""

    name: ClassVar[str] = "ertacache"
    description: ClassVar[str] = "skip steps by an offline list, shrink their solver step, correct what is reused"
    paper: ClassVar[Paper] = Paper(
        "ERTACache: Error Rectification and Timesteps Adjustment for Efficient Diffusion",
        "ICLR 2026",
        "https://arxiv.org/abs/2508.21091",
    )
    needs_profile: ClassVar[bool] = True

    threshold: float = option(0.1, "fit: relative error (lambda) below which a step is skipped", ge=0)
    pool: Literal["together", "alone"] = option(
        "together", "fit: runs share their decisions, or decide by themselves", choices=("together", "alone")
    )
    average: Literal["means", "ratios"] = option(
        "means", "fit: step factors are ratios of means, or means of ratios", choices=("means", "ratios")
    )
    refit: bool = option(False, "fit: measure K and B with the step factors at work", choices=(False, True))
    adjust: bool = option(True, "(b) shrink the solver step of skipped steps", choices=(False, True))
    feed: Literal["reached", "nominal"] = option(
        "reached", "the time that the network is told under (b)", choices=("reached", "nominal")
    )
    max_frozen: int = option(3, "most skipped steps in a row with a factor of about 0", ge=0)
    rectify: Literal["linear", "sigmoid", "off"] = option(
        "linear", "(c) how the error is modelled", choices=("linear", "sigmoid", "off")
    )
    granularity: Literal["scalar", "channel"] = option(
        "scalar", "one K and B, or one for every channel", choices=("scalar", "channel")
    )
    warmup_steps: int = option(1, "steps that are always computed at the start", ge=1)
    tail_steps: int = option(1, "steps that are always computed at the end", ge=0)
    reused: tuple[int, ...] | None = option(None, "steps to skip, counted from 0; None takes the profile's")
    phi: float | None = option(None, "one step factor for all skipped steps; None takes the profile's", ge=0, le=1)

    def __post_init__(self) -> None:
        """A list by hand must be one, and a factor needs (b)."""
        super().__post_init__()
        given = self.reused
        listed = isinstance(given, (tuple, list)) and all(type(n) is int and n >= 0 for n in given)
        if given is not None and not (listed and given):
            raise OptionError(f"ertacache: reused={given!r} is no list of one or more steps counted from 0")
        if self.phi is not None and not self.adjust:
            raise OptionError("ertacache: phi is the step factor of adjust=True; set that or leave it out")

    @property
    def wants_profile(self) -> bool:
        """Whether something is left to the profile."""
        return self.reused is None or self.rectify != "off" or (self.adjust and self.phi is None)

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """The list at the denoiser itself, the corrected residual, and the step sizes."""
        sites = host.site("model", self.name)
        tensors = {} if profile is None else dict(profile.tensors)
        listed, phi = self._list(profile)
        reused = bounded(listed, phi, self.max_frozen) if self.adjust else listed
        dropped = sorted(listed - reused)
        notes = [f"ertacache computes steps {dropped}: their step factors are about 0"] if dropped else []
        sigmas = tensors["sigmas"].tolist() if profile is not None else None
        tables = {
            name: (tensors[f"K.{name}.{self.granularity}"], tensors[f"B.{name}.{self.granularity}"])
            for name in ("cond", "rest")
            if f"K.{name}.{self.granularity}" in tensors
        }
        group = Group(
            self.name,
            sites,
            lambda: Skips(reused, self.warmup_steps, self.tail_steps, sigmas),
            lambda: Residual(Reuse()) if self.rectify == "off" else Rectified(tables, self.rectify == "sigmoid"),
        )
        steers, feed = self.adjust and bool(reused), self.feed == "reached"
        controls = frozenset(("dt", "time") if feed else ("dt",)) if steers else frozenset()
        claims = Claims(frozenset(sites), controls, needs_total=self.tail_steps > 0)
        return Plan([group], claims, notes, (lambda _: StepSizes(phi, feed)) if steers else None)

    def _list(self, profile: Profile | None) -> tuple[frozenset[int], dict[int, float]]:
        """The steps to skip and their step factors, from the options and the profile."""
        listed, phi = frozenset(self.reused or ()), {}
        if profile is not None:
            lam, known = profile.facts["threshold"], frozenset(profile.tensors["reused"].tolist())
            if self.threshold not in (ERTACache.threshold, lam):
                raise OptionError(
                    f"ertacache: threshold={self.threshold:g}, but the profile was fitted with {lam:g}: leave it out, "
                    "or fit another profile"
                )
            if listed - known:
                raise OptionError(
                    f"ertacache: steps {sorted(listed - known)} of reused= were not skipped when the profile was "
                    "fitted: fit it with this list"
                )
            listed = listed or known
            phi = dict(enumerate(profile.tensors["phi"].tolist()))
        return listed, phi if self.phi is None else dict.fromkeys(listed, self.phi)

    def fit(self, target: Any, calls: Sequence[Any], **settings: Any) -> Profile:
        """Find the list, the step factors and the corrections on runs of `calls`."""
        from elision.denoise.fit.ertacache import calibrate  # it imports the engine

        return calibrate(self, target, calls, **settings)
