"""Every method at every level it has, once with options that elide nothing and once with some that elide a lot."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import elision
from elision.denoise.adapters import Adapter, adapter_for
from elision.denoise.engine import DenoiseApplied
from elision.method import create
from elision.profile import Profile, fingerprint
from tests.denoise.adapters.subjects import ClassLoop
from tests.denoise.adapters.table import SUBJECTS

STEPS = 4
LONG = 5  # what curvature, or a region between full steps, takes
Options = dict[str, Any]


class Setting(NamedTuple):
    """A method at a level.

    Attributes:
        level: the site.
        limit: options under which every step is computed.
        active: options under which some are not.
        steps: of a run.
    """

    method: str
    level: str
    limit: Options
    active: Options
    steps: int = STEPS


_ALL = tuple(range(1, STEPS))
SETTINGS: tuple[Setting, ...] = (
    Setting("easycache", "model", {"threshold": 0.0, "warmup_steps": 0}, {"threshold": 1e9, "warmup_steps": 2}),
    Setting(
        "ertacache",
        "model",
        {"reused": _ALL, "warmup_steps": STEPS, "adjust": False, "rectify": "off"},
        {"reused": (2,), "adjust": False, "rectify": "off"},
    ),
    Setting(
        "worldcache",
        "model",
        {"threshold": 0.0, "warmup_steps": 2, "site": "model"},
        {"threshold": 1e9, "warmup_steps": 3, "n_max": 2, "site": "model"},
        LONG,
    ),
    Setting("random_skip", "model", {"rate": 0.0}, {"rate": 1.0, "warmup_steps": 2}),
    Setting("stale", "model", {"interval": 1}, {"interval": 3}),
    Setting("uniform", "model", {"interval": 1, "site": "model"}, {"interval": 2, "site": "model"}),
    Setting(
        "worldcache",
        "head",
        {"threshold": 0.0, "warmup_steps": 2},
        {"threshold": 1e9, "warmup_steps": 3, "n_max": 2},
        LONG,
    ),
    Setting("taylorseer", "head", {"interval": 1, "site": "head"}, {"interval": 3, "first_enhance": 2, "site": "head"}),
    Setting(
        "taylorseer", "stack", {"interval": 1, "site": "stack"}, {"interval": 3, "first_enhance": 2, "site": "stack"}
    ),
    Setting("uniform", "stack", {"interval": 1, "site": "stack"}, {"interval": 2, "site": "stack"}),
    Setting("teacache", "stack", {"threshold": 0.0}, {"threshold": 1e9}),
    Setting("first_block", "run", {"threshold": 0.0}, {"threshold": 1e9}),
    Setting(
        "profilingdit",
        "run",
        {"blocks": (1,), "warmup_steps": 1, "schedule": "uniform", "interval": 1},
        {"blocks": (1,), "warmup_steps": 1, "schedule": "uniform", "interval": 2},
    ),
    Setting(
        "regione",
        "kv",
        {"delta": 0, "warmup_steps": LONG},
        {"gammas": (1.0,) * (LONG - 1), "delta": 0.25, "eta": 0.7, "warmup_steps": 2, "post_steps": 1, "forced": ()},
        LONG,
    ),
    Setting("bac", "branch", {"num_caches": STEPS}, {"num_caches": 2, "union_blocks": 1}),
    Setting("taylorseer", "branch", {"interval": 1}, {"interval": 3, "first_enhance": 2}),
    Setting("uniform", "branch", {"interval": 1}, {"interval": 2}),
)


@functools.cache
def _adapter(subject: str) -> Adapter:
    return adapter_for(SUBJECTS[subject].make())


def able(subject: str, setting: Setting) -> bool:
    """Whether the class has what the method needs."""
    adapter = _adapter(subject)
    needs_indicator = setting.method == "teacache"
    return setting.level in adapter.levels and not (needs_indicator and adapter.modulated is None)


def apply(loop: ClassLoop, method: str, options: Options, steps: int = STEPS, **settings: Any) -> DenoiseApplied:
    """`elision.apply`, with a profile of one run where one is wanted."""
    profile: Profile | None = None
    if create(method, **options).wants_profile:
        found = elision.fit(loop, method, calls=[{"steps": steps, "mode": "batched"}], **options)
        profile = replace(found, fingerprint=fingerprint(method, loop.model, loop.scheduler))
    applied = elision.apply(loop, method, profile=profile, **settings, **options)
    assert isinstance(applied, DenoiseApplied)
    return applied
