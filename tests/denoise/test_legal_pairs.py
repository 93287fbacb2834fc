"""Every pair of methods that the legality table allows, end to end; the table itself is written down here."""

from __future__ import annotations

import functools
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision.errors import Conflict
from elision.method import Method, create
from tests.conformance.settings import STEPS, profile_for
from tests.models import Loop, changed, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")

Options = dict[str, Any]
WORLD: Options = {"threshold": 1e9, "warmup_steps": 3, "n_max": 2}
ERTA: Options = {"rectify": "off"}
# A setting that elides, and one that elides nothing, of every method at every level that it works at.
SETTINGS: dict[str, tuple[Options, Options]] = {
    "bac": ({"schedule": "uniform", "interval": 3}, {"schedule": "uniform", "interval": 1}),
    "easycache": ({"threshold": 0.6, "warmup_steps": 2}, {"threshold": 0.0}),
    "ertacache": (ERTA | {"reused": (2, 4), "phi": 0.7}, ERTA | {"reused": (0, STEPS - 1), "adjust": False}),
    "first_block": ({"threshold": 1.5, "max_consecutive": 1}, {"threshold": 0.0}),
    "profilingdit": (
        {"blocks": (1,), "warmup_steps": 1, "schedule": "uniform", "interval": 2},
        {"blocks": (1,), "warmup_steps": STEPS, "schedule": "uniform"},
    ),
    "random_skip": ({"rate": 0.4, "seed": 3}, {"rate": 0.0}),
    "stale": ({"interval": 2}, {"interval": 1}),
    "taylorseer": ({"interval": 5, "first_enhance": 1}, {"interval": 1}),
    "taylorseer@stack": ({"interval": 3, "first_enhance": 1, "site": "stack"}, {"interval": 1, "site": "stack"}),
    "taylorseer@head": ({"interval": 3, "first_enhance": 1, "site": "head"}, {"interval": 1, "site": "head"}),
    "teacache": ({"threshold": 0.5}, {"threshold": 0.0}),
    "uniform": ({"interval": 4}, {"interval": 1}),
    "uniform@stack": ({"interval": 4, "site": "stack"}, {"interval": 1, "site": "stack"}),
    "uniform@model": ({"interval": 2, "site": "model"}, {"interval": 1, "site": "model"}),
    "worldcache": (WORLD, {"n_max": 0}),
    "worldcache@model": (WORLD | {"site": "model"}, {"n_max": 0, "site": "model"}),
}
# What may act inside of what: the outer one skips calls, the inner one acts in those that are left.
INSIDE_CALLS = {"first_block", "taylorseer", "taylorseer@stack", "taylorseer@head", "uniform", "uniform@stack"}
INSIDE_BLOCKS = {"taylorseer", "uniform"}
TABLE: dict[str, set[str]] = {
    "easycache": INSIDE_CALLS,
    "ertacache": INSIDE_CALLS,
    "random_skip": INSIDE_CALLS,
    "stale": INSIDE_CALLS,
    "uniform@model": INSIDE_CALLS - {"uniform", "uniform@stack"},  # a method does not act inside itself
    "worldcache@model": INSIDE_CALLS,
    "worldcache": INSIDE_CALLS - {"taylorseer@head"},
    "taylorseer@head": {"first_block", "uniform", "uniform@stack"},
    "taylorseer@stack": {"first_block", "uniform"},
    "teacache": {"first_block", *INSIDE_BLOCKS},
    "uniform@stack": {"first_block", "taylorseer"},
    "first_block": INSIDE_BLOCKS,
    "profilingdit": INSIDE_BLOCKS,
}
PAIRS = [(outer, inner) for outer, inners in TABLE.items() for inner in sorted(inners)]


def method(key: str, active: bool = True) -> Method:
    return create(key.partition("@")[0], **SETTINGS[key][not active])


def sample(*methods: Method) -> tuple[Tensor, Any]:
    """A run with guidance in two calls, and the session, whose report counts operations when it is asked for."""
    loop = loop_once()
    profiles = {m.name: profile_for(loop, m.name, _options(m)) for m in methods}
    with elision.apply(loop, list(methods), profile=profiles) as run:
        out = loop(steps=STEPS, mode="sequential")
    return out, run


def _options(m: Method) -> Options:
    return {name: getattr(m, name) for name in m.options()}


@functools.cache
def loop_once() -> Loop:
    return Loop("flux")


@functools.cache
def alone(key: str) -> Tensor:
    return sample(method(key))[0]


def test_the_table_is_what_is_accepted() -> None:
    loop, found = loop_once(), set()
    for a, b in combinations(SETTINGS, 2):
        profiles = {m.name: profile_for(loop, m.name, _options(m)) for m in (method(a), method(b))}
        try:
            elision.apply(loop, [method(a), method(b)], profile=profiles).remove()
        except Conflict:
            continue
        found.add(frozenset((a, b)))
    assert found == {frozenset(pair) for pair in PAIRS}


def test_the_documentation_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "denoise.md").read_text()
    rows = [f"| {outer} | {', '.join(sorted(inners))} |" for outer, inners in TABLE.items()]
    assert text.endswith("| outside | inside |\n|---|---|\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("key", SETTINGS)
def test_regione_goes_with_none(key: str) -> None:
    """It must see every step, and has the denoiser called with some of the tokens."""
    loop = Loop("kontext")
    region = create("regione", delta=0, warmup_steps=2)
    profiles = {m.name: profile_for(loop, m.name, _options(m)) for m in (method(key),)}
    with pytest.raises(Conflict, match="regione"):
        elision.apply(loop, [region, method(key)], profile=profiles)


@pytest.mark.parametrize(("outer", "inner"), PAIRS, ids=lambda key: key)
def test_a_legal_pair_acts_together_and_is_undone(outer: str, inner: str) -> None:
    loop = loop_once()
    plain = loop(steps=STEPS, mode="sequential")
    before = snapshot(loop.model, loop.scheduler)
    out, run = sample(method(outer), method(inner))
    left = [key for key in changed(before, snapshot(loop.model, loop.scheduler)) if not key.endswith("_step_index")]
    assert left == []
    assert torch.isfinite(out).all()
    for other in (plain, alone(outer), alone(inner)):
        assert not torch.equal(out, other)
    report = run.report()
    stood_in = {key.partition("@")[0]: 0 for key in (outer, inner)}
    for step in report.last.steps:
        for name, tally in step.groups.items():
            stood_in[name] += tally.stood_in
    assert all(stood_in.values()), stood_in
    assert report.flops_computed + report.flops_elided == report.calls * call_flops()
    again, _ = sample(method(inner), method(outer))
    assert torch.equal(again, out)
    assert torch.equal(loop(steps=STEPS, mode="sequential"), plain)


@functools.cache
def call_flops() -> int:
    report = sample(create("uniform", site="model", interval=1))[1].report()
    return report.flops_computed // report.calls  # type: ignore[no-any-return]


def test_runs_of_blocks_that_overlap_are_refused() -> None:
    """Were block 1 skipped by one, the other would learn a difference that lacks it."""
    loop = loop_once()
    first = create("profilingdit", blocks=(0, 1), warmup_steps=1, schedule="uniform", interval=2)
    with pytest.raises(Conflict, match=r"run.0-1 and run.1-3 overlap"):
        elision.apply(loop, [first, method("first_block")])


def test_the_block_that_a_method_decides_by_is_not_skipped_by_another() -> None:
    probe = create("profilingdit", blocks=(0,), warmup_steps=1, schedule="uniform", interval=2)
    for other in ("first_block", "teacache"):
        with pytest.raises(Conflict, match=r"skips transformer_blocks\.0 .*decides by what goes into it|tolerate gaps"):
            elision.apply(loop_once(), [probe, method(other)])


@pytest.mark.parametrize(("outer", "inner"), PAIRS, ids=lambda key: key)
def test_one_that_elides_nothing_leaves_the_other_alone(outer: str, inner: str) -> None:
    assert torch.equal(sample(method(outer, active=False), method(inner))[0], alone(inner))
    assert torch.equal(sample(method(outer), method(inner, active=False))[0], alone(outer))
