"""What every registered method must declare to be tested: its limit settings, and settings that elide a lot.

A method that is registered and missing here fails `test_every_method_is_declared`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

import elision
from elision.denoise.engine import DenoiseApplied
from elision.denoise.report import DenoiseReport
from elision.method import create, find
from elision.profile import Profile, fingerprint
from tests.models import KINDS, Loop

Options = dict[str, Any]

STEPS = 8  # of every run, unless a test says otherwise
GAMMAS = (1.0,) * (STEPS - 1)

# Kinds that a method is for, where it is not for all that have its site: RegionE needs a picture that is edited.
ONLY_ON: dict[str, tuple[str, ...]] = {"regione": ("kontext", "qwen")}
EDITING = tuple(kind for kind, about in KINDS.items() if about.edits)
# Methods with a value per step rather than per call: they act after guidance.
AFTER_GUIDANCE = {"regione"}

# At these settings every step is computed and the output equals the uncached one bit for bit.
LIMITS: dict[str, list[Options]] = {
    "bac": [{"schedule": "uniform", "interval": 1}, {"num_caches": STEPS}],
    "easycache": [
        {"threshold": 0.0, "warmup_steps": 0, "tail_steps": 0},
        {"threshold": 1e9, "warmup_steps": STEPS},
        {"threshold": 0.0, "variant": "comfyui", "start": 0.0, "end": 1.0},
    ],
    "ertacache": [
        {"reused": (0, STEPS - 1), "adjust": False, "rectify": "off"},
        {"reused": (1, 2, 3), "warmup_steps": STEPS, "adjust": False, "rectify": "off"},
        {"reused": (1, 2, 5), "tail_steps": STEPS, "adjust": False, "rectify": "off"},
    ],
    "first_block": [{"threshold": 0.0}, {"threshold": 1e9, "warmup_steps": STEPS}],
    "profilingdit": [
        {"blocks": (1,), "warmup_steps": 1, "schedule": "uniform", "interval": 1},
        {"blocks": (1,), "warmup_steps": STEPS, "schedule": "uniform"},
        {"warmup_steps": 2, "refresh": tuple(range(2, STEPS))},
    ],
    "random_skip": [{"rate": 0.0}, {"rate": 1.0, "warmup_steps": STEPS}],
    "regione": [
        {"delta": 0, "warmup_steps": STEPS},
        {"delta": 0, "post_steps": STEPS},
        {"preset": "qwen", "warmup_steps": 5, "post_steps": 3},
    ],
    "stale": [{"interval": 1}, {"interval": 99, "warmup_steps": STEPS}],
    "taylorseer": [
        {"interval": 1},
        {"interval": 9, "first_enhance": STEPS},
        {"interval": 1, "site": "stack"},
        {"interval": 1, "site": "head"},
        {"interval": 1, "schedule": "diffusers", "max_order": 2, "basis": "newton"},
    ],
    "teacache": [{"threshold": 0.0}, {"threshold": 1e9, "warmup_steps": STEPS}],
    "uniform": [
        {"interval": 1},
        {"interval": 1, "site": "stack"},
        {"interval": 1, "site": "model"},
        {"interval": 9, "warmup_steps": STEPS},
    ],
    "worldcache": [
        {"n_max": 0, "warmup_steps": 0},
        {"threshold": 0.0, "warmup_steps": 3},
        {"threshold": 1e9, "warmup_steps": STEPS},
        {"threshold": 1e9, "warmup_steps": 3, "tail_steps": STEPS, "site": "model"},
    ],
}

# At these settings some steps are computed and some are not, on every tiny model.
ACTIVE: dict[str, list[Options]] = {
    "bac": [
        {"num_caches": 3, "union_blocks": 2},
        {"num_caches": 3, "schedule": "shared"},
        {"schedule": "uniform", "interval": 3},
    ],
    "easycache": [
        {"threshold": 0.6, "warmup_steps": 2},
        {"threshold": 0.6, "warmup_steps": 2, "order": 1},
        {"threshold": 1.2, "variant": "comfyui", "start": 0.25, "end": 0.9, "subsample": 2},
    ],
    "ertacache": [
        {"reused": (2, 3, 5), "adjust": False, "rectify": "off"},
        {"reused": (1, 3, 4, 6), "phi": 0.7, "rectify": "off"},
        {"reused": (2, 3, 5), "phi": 0.3, "rectify": "off", "feed": "nominal"},
    ],
    "first_block": [{"threshold": 1.5, "max_consecutive": 2}],
    "profilingdit": [
        {"warmup_steps": 2, "schedule": "uniform", "interval": 3},
        {"blocks": (0, 1), "warmup_steps": 1, "refresh": (1, 4)},
        {"blocks": (1,), "warmup_steps": 2, "schedule": "formula", "longest": 4, "shortest": 1},
    ],
    "random_skip": [{"rate": 0.5, "seed": 3}],
    "regione": [
        {"gammas": GAMMAS, "delta": 0.25, "eta": 0.7, "warmup_steps": 2, "post_steps": 1, "forced": (5,)},
        {"gammas": GAMMAS, "delta": 0.25, "eta": 2, "warmup_steps": 1, "post_steps": 0, "forced": ()},
        {
            "gammas": GAMMAS,
            "delta": 0.4,
            "eta": 0.7,
            "warmup_steps": 2,
            "forced": (),
            "keep_kv": False,
            "factor": "last",
        },
    ],
    "stale": [{"interval": 3}],
    "taylorseer": [
        {"interval": 3, "first_enhance": 2},
        {"interval": 3, "first_enhance": 1, "max_order": 2, "basis": "newton", "factors_dtype": "float32"},
        {"interval": 3, "first_enhance": 2, "site": "stack"},
        {"interval": 3, "first_enhance": 2, "site": "head", "max_order": 0},
        {"interval": 3, "first_enhance": 2, "schedule": "diffusers"},
    ],
    "teacache": [{"threshold": 0.5}, {"threshold": 0.5, "order": 2}],
    "uniform": [{"interval": 3}, {"interval": 3, "site": "stack"}, {"interval": 3, "site": "model"}],
    "worldcache": [
        {"threshold": 1e9, "warmup_steps": 3, "n_max": 2, "stable": 0.0, "chaotic": 0.0},
        {"threshold": 1.0, "warmup_steps": 3, "n_max": 2},
        {"threshold": 1e9, "warmup_steps": 2, "n_max": 3, "site": "model", "drift": "chaotic"},
    ],
}

# Methods whose branches decide by themselves: guidance in one call then is another decision than in two.
DECIDE_PER_BRANCH = {"first_block", "teacache"}


def kinds_for(method: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `kinds` that are tried; a method that is only for some stands in on those where flux is wanted."""
    if method in ONLY_ON:
        return ONLY_ON[method] if set(kinds) == set(KINDS) else ONLY_ON[method][: "flux" in kinds]
    return tuple(kind for kind in kinds if kind not in EDITING)


def home(method: str) -> str:
    """The kind of denoiser for tests that need but one."""
    return ONLY_ON.get(method, ("flux",))[0]


def possible(method: str, options: Options, kind: str) -> bool:
    """Whether the method has its site on this kind of denoiser."""
    if method in ONLY_ON or kind in EDITING:
        return kind in ONLY_ON.get(method, KINDS)
    if KINDS[kind].blocks:
        return True
    wanted = options.get("site", create(method, **options).levels[0] if method != "uniform" else "branch")
    return bool(wanted == "model")


def steers(method: str, options: Options) -> bool:
    """Whether these options change the sampler's steps, which a bare denoiser does not have."""
    return "phi" in options or method in AFTER_GUIDANCE


def label(method: str, options: Options) -> str:
    """A short test id."""
    return method + "".join(f"-{key}={value}" for key, value in options.items())


def cases(table: dict[str, list[Options]], kinds: tuple[str, ...] = tuple(KINDS)) -> list[Any]:
    """Every setting on every kind that has its site, as pytest parameters (method, options, kind)."""
    return [
        pytest.param(method, options, kind, id=f"{kind}-{label(method, options)}")
        for method, several in table.items()
        for kind in kinds_for(method, kinds)
        for options in several
        if possible(method, options, kind)
    ]


def impossible(table: dict[str, list[Options]]) -> list[Any]:
    """Every setting on every kind that lacks its site, as pytest parameters (method, options, kind)."""
    return [
        pytest.param(method, options, kind, id=f"{kind}-{label(method, options)}")
        for kind in KINDS
        for method, several in table.items()
        if method not in ONLY_ON and kind not in EDITING
        for options in several
        if not possible(method, options, kind)
    ]


@functools.cache
def _fitted(kind: str, method: str, options: tuple[tuple[str, Any], ...]) -> Profile:
    """What `fit` learns from one run of a fresh model of this kind."""
    return elision.fit(Loop(kind), method, calls=[{"steps": STEPS, "mode": "batched"}], **dict(options))


def profile_for(loop: Any, method: str, options: Options, bare: bool = False) -> Profile | None:
    """A profile for this very loop, where the method wants one at these options."""
    if not create(method, **options).wants_profile:
        return None
    kind = next(name for name, about in KINDS.items() if about == loop.kind)
    here = fingerprint(method, loop.model, None if bare else loop.scheduler)
    if not possible(method, options, kind):
        return Profile(here)
    return replace(_fitted(kind, method, tuple(options.items())), fingerprint=here)


def apply(loop: Any, method: str, options: Options, bare: bool = False, **settings: Any) -> DenoiseApplied:
    """`elision.apply`, typed for the denoise family, with a profile where one is wanted; `bare`: on the denoiser."""
    settings.setdefault("profile", profile_for(loop, method, options, bare))
    applied = elision.apply(loop.model if bare else loop, method, **settings, **options)
    assert isinstance(applied, DenoiseApplied)
    return applied


def cached(loop: Loop, method: str, options: Options, **how: Any) -> tuple[Tensor, DenoiseReport]:
    """One run with the method applied, branches named by `run.step`; the sample and the report."""
    with apply(loop, method, options) as run:
        out = loop(**{"steps": STEPS, "name": run.step, **how})
    return out, run.report()


def strip(report: DenoiseReport) -> str:
    """The letters of the latest run."""
    return report.strip()


def known_methods(family: str | None = "denoise") -> list[str]:
    """Names of the registered methods of the family that this suite runs; with None of all families."""
    return [row.name for row in elision.methods(family)]


Hook = Callable[[int], None]
__all__ = [
    "ACTIVE",
    "AFTER_GUIDANCE",
    "DECIDE_PER_BRANCH",
    "LIMITS",
    "STEPS",
    "Hook",
    "Options",
    "apply",
    "cached",
    "cases",
    "find",
    "home",
    "impossible",
    "known_methods",
    "label",
    "possible",
    "profile_for",
    "steers",
    "strip",
]
