"""Every method on every class: nothing elided is nothing changed, and what is elided changes what it should."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from elision.denoise.methods.teacache import PRESETS
from elision.errors import UnsupportedTarget
from tests.conformance.settings import known_methods
from tests.denoise.adapters.settings import SETTINGS, STEPS, Setting, able, apply
from tests.denoise.adapters.subjects import ClassLoop
from tests.denoise.adapters.table import SUBJECTS
from tests.models import changed, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning"),
    pytest.mark.usefixtures("no_flops"),
]
CASES = [
    pytest.param(name, setting, id=f"{name}-{setting.method}-{setting.level}")
    for name in SUBJECTS
    for setting in SETTINGS
    if not (setting.method == "regione" and able(name, setting) and not SUBJECTS[name].edits)  # it is for edits
]


@functools.cache
def made(name: str) -> ClassLoop:
    """A loop that has run once, so that diffusers has left behind what it leaves by itself."""
    loop = ClassLoop(SUBJECTS[name])
    loop(steps=1, mode="sequential")
    return loop


@functools.cache
def plain(name: str, steps: int, mode: str) -> Tensor:
    """An uncached sample, without guidance ("distilled") or with it."""
    return made(name)(steps=steps, mode=mode)


def test_every_method_is_here() -> None:
    """With a setting at a level of its own, which all classes are then tested at."""
    assert sorted({setting.method for setting in SETTINGS}) == known_methods()


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_method(name: str, setting: Setting) -> None:
    loop = made(name)
    if not able(name, setting):
        with pytest.raises(UnsupportedTarget, match=type(loop.model).__name__):
            apply(loop, setting.method, setting.active)
        return
    before = snapshot(loop.model)
    for options, elides, mode in ((setting.limit, False, "distilled"), (setting.active, True, "sequential")):
        with apply(loop, setting.method, options) as run:
            out = loop(steps=setting.steps, mode=mode, name=run.step)
        report = run.report()
        assert torch.equal(out, plain(name, setting.steps, mode)) is not elides
        assert (report.outputs_stood_in > 0) is elides
        assert report.outputs_computed > 0
        assert torch.isfinite(out).all()
        assert report.calls == setting.steps * (2 if mode == "sequential" else 1)
    assert changed(before, snapshot(loop.model)) == []


@pytest.mark.parametrize(
    ("preset", "name"),
    [("flux", "Flux"), ("hunyuan-video", "HunyuanVideo"), ("ltx", "LTX"), ("lumina2", "Lumina2"), ("mochi", "Mochi")],
)
def test_published_polynomials(preset: str, name: str) -> None:
    """They can be named on the classes that they were made for."""
    loop = made(name)
    with apply(loop, "teacache", {"coefficients": preset, "threshold": 1e9}) as run:
        loop(steps=STEPS)
    assert run.report().strip() == "C" + "r" * (STEPS - 2) + "C"
    assert 0.04 < np.poly1d(PRESETS[preset])(0.05) < 0.2  # near the change of the input, where that is small
