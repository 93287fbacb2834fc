"""Offline parts on guidance in two calls that nothing names: `fit(..., branches=)`."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import elision
from elision.denoise.fit.profilingdit import Masked
from elision.errors import ClockError, OptionError
from elision.profile import Profile
from tests.models import Loop, changed, snapshot

NAMES = ("cond", "uncond")
FITTED: list[tuple[str, dict[str, Any]]] = [
    ("bac", {"num_caches": 3}),
    ("ertacache", {"threshold": 0.4}),
    ("ertacache", {"threshold": 0.4, "pool": "alone", "refit": True}),
    ("profilingdit", {"warmup_steps": 2, "schedule": "uniform"}),
    ("teacache", {"degree": 2, "threshold": 9.0}),
]


def unnamed(branch: str) -> contextlib.AbstractContextManager[None]:
    del branch
    return contextlib.nullcontext()


def learn(loop: Loop, method: str, options: dict[str, Any], **how: Any) -> Profile:
    """What a method learns from two runs that are guided in two calls per step."""
    naming = {"name": unnamed} if "branches" in how else {}
    calls: list[Any] = [{"seed": seed, "steps": 6, "mode": "sequential", **naming} for seed in (1, 2)]
    if method == "profilingdit":
        tokens = {"FluxTransformer2DModel": 16}.get(type(loop.model).__name__, 4)
        calls = [Masked(call, (torch.arange(tokens) % 2 == 0)[None]) for call in calls]
    return elision.fit(loop, method, calls=calls, **how, **options)


@pytest.mark.parametrize(("method", "options"), FITTED)
def test_branches_by_order_are_branches_by_name(method: str, options: dict[str, Any]) -> None:
    loop = Loop("flux")
    want, got = (learn(loop, method, options, **how) for how in ({}, {"branches": NAMES}))
    assert got.facts == want.facts
    assert {**got.fingerprint, "date": ""} == {**want.fingerprint, "date": ""}
    assert got.tensors.keys() == want.tensors.keys()
    assert all(torch.equal(got.tensors[key], want.tensors[key]) for key in want.tensors)


@pytest.mark.parametrize(("method", "options"), FITTED)
def test_a_class_that_cannot_name_them_needs_them(method: str, options: dict[str, Any]) -> None:
    loop = Loop("pixart")
    assert not hasattr(loop.model, "cache_context")
    before = snapshot(loop.model)
    with pytest.raises(ClockError, match=r"has no branch name.*branches=\('cond', 'uncond'\)"):
        learn(loop, method, options)
    with pytest.raises(ClockError, match="more than the 1 calls"):
        learn(loop, method, options, branches=("cond",))
    assert changed(before, snapshot(loop.model)) == []
    profile = learn(loop, method, options, branches=NAMES)
    with elision.apply(loop, method, profile=profile, branches=NAMES, **options) as run:
        loop(steps=6, mode="sequential")
    assert run.report().outputs_stood_in > 0  # type: ignore[attr-defined]


def test_the_order_of_the_branches_says_which_one_leads() -> None:
    """The leading branch is the one that is measured."""
    loop = Loop("flux")
    options = {"num_caches": 3}
    as_called, swapped = (learn(loop, "bac", options, branches=names) for names in (NAMES, NAMES[::-1]))
    assert not torch.equal(as_called.tensors["similarity"], swapped.tensors["similarity"])


def test_branches_must_be_different_names() -> None:
    for bad in ("cond", ("cond", "cond")):
        with pytest.raises(OptionError, match="no list of different names"):
            learn(Loop("flux"), "bac", {}, branches=bad)


def test_a_method_without_an_offline_part_still_says_so() -> None:
    with pytest.raises(OptionError, match="easycache has no offline part"):
        elision.fit(Loop("flux"), "easycache", calls=[{}], branches=NAMES)
