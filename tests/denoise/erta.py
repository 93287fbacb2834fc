"""Runs and fits of ERTACache."""

from __future__ import annotations

from typing import Any

import elision
from elision.profile import Profile
from tests.models import KINDS

T = 8


# `fit` names no branches, so classes without `cache_context` are fitted with guidance in one call, which gives the
# same; without an adapter nothing tells which rows of that call are conditional
FIT_MODE = {"flux": "sequential", "wan": "sequential", "wan_i2v": "sequential", "unet": "distilled"}


def run(loop: Any, profile: Profile | None = None, options: dict[str, Any] | None = None, **how: Any) -> Any:
    """One run with the method; the sample and the report."""
    with elision.apply(loop, "ertacache", profile=profile, **(options or {})) as applied:
        out = loop(**{"steps": T, "name": applied.step, **how})  # type: ignore[attr-defined]
    return out, applied.report()


def fit(loop: Any, seeds: tuple[int, ...] = (5, 6), mode: str | None = None, **options: Any) -> Profile:
    kind = next(name for name, about in KINDS.items() if about == loop.kind)
    mode = mode or FIT_MODE.get(kind, "batched")
    calls = [{"seed": s, "steps": T, "mode": mode} for s in seeds]
    return elision.fit(loop, "ertacache", calls=calls, **options)
