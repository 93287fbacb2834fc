"""At its limit setting a method computes everything, and the output equals the uncached one bit for bit."""

from __future__ import annotations

import pytest
import torch

from elision.errors import UnsupportedTarget
from tests.conformance.settings import (
    ACTIVE,
    EDITING,
    LIMITS,
    ONLY_ON,
    STEPS,
    Options,
    apply,
    cached,
    cases,
    impossible,
    known_methods,
    possible,
    steers,
)
from tests.models import KINDS, Loop, changed, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning"),
    pytest.mark.usefixtures("no_flops"),
]


def test_every_method_is_declared() -> None:
    assert sorted(LIMITS) == sorted(ACTIVE) == known_methods()


def test_every_method_meets_every_kind() -> None:
    """A method that works nowhere would make the whole suite pass without testing anything."""
    for method, several in ACTIVE.items():
        reached = {kind for kind in KINDS for options in several if possible(method, options, kind)}
        assert reached >= set(ONLY_ON.get(method, set(KINDS) - {"unet", *EDITING})), method


@pytest.mark.parametrize(("method", "options", "kind"), cases(LIMITS))
def test_limit_is_exact(method: str, options: Options, kind: str) -> None:
    _check_limit(method, options, kind, "sequential")


@pytest.mark.parametrize(("method", "options", "kind"), cases(LIMITS, ("flux", "dit", "unet")))
def test_limit_is_exact_with_batched_guidance(method: str, options: Options, kind: str) -> None:
    _check_limit(method, options, kind, "batched")


def _check_limit(method: str, options: Options, kind: str, mode: str) -> None:
    loop = Loop(kind)
    plain = loop(steps=STEPS, mode=mode, batch=2)
    calls = loop.called
    out, report = cached(loop, method, options, mode=mode, batch=2)
    assert torch.equal(plain, out)
    assert report.strip() == "C" * STEPS
    assert report.outputs_stood_in == report.calls_elided == 0
    assert report.calls == loop.called - calls == calls


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE))
def test_active_is_not_exact(method: str, options: Options, kind: str) -> None:
    """The other settings of this suite really elide, so that the tests that use them can fail."""
    loop = Loop(kind)
    plain = loop(steps=STEPS, mode="sequential")
    out, report = cached(loop, method, options, mode="sequential")
    assert not torch.equal(plain, out)
    assert report.outputs_stood_in > 0
    assert report.outputs_computed > 0
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("method", "options", "kind"), impossible(ACTIVE))
def test_unsupported_is_refused_untouched(method: str, options: Options, kind: str) -> None:
    loop = Loop(kind)
    plain = loop(steps=2)
    before = snapshot(loop.model, loop.scheduler, loop)
    with pytest.raises(UnsupportedTarget, match=type(loop.model).__name__):
        apply(loop, method, options)
    assert changed(before, snapshot(loop.model, loop.scheduler, loop)) == []
    assert torch.equal(plain, loop(steps=2))
    with apply(loop, "uniform", {"site": "model", "interval": 2}):  # the refusal holds nothing
        loop(steps=4)


@pytest.mark.parametrize("kind", ["flux", "unet"])
def test_a_bare_denoiser_takes_the_same_limits(kind: str) -> None:
    loop = Loop(kind)
    plain = loop(steps=STEPS)
    for method, several in LIMITS.items():
        for options in several:
            if possible(method, options, kind) and not steers(method, options):
                with apply(loop, method, options, bare=True, steps=STEPS) as run:
                    assert torch.equal(plain, loop(steps=STEPS)), (method, options)
                assert run.report().strip() == "C" * STEPS
