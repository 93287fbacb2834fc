"""TeaCache's offline part: `fit` recovers a polynomial, and what it made is used."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import elision
from elision.denoise.methods.teacache import PRESETS
from elision.errors import OptionError, ProfileMismatch, UnsupportedTarget
from elision.profile import Profile
from tests.models import Loop, changed, snapshot

CALLS: list[Any] = [{"seed": s, "steps": 8} for s in range(3)]


def run_once(loop: Loop) -> None:
    loop(steps=8)


def test_fit_measures_changes_of_indicator_and_prediction() -> None:
    """The recorded pairs equal changes measured by hand, and the polynomial is their least-squares fit."""
    loop = Loop("flux")
    norm = loop.model.transformer_blocks[0].norm1  # type: ignore[index, union-attr]
    seen: list[torch.Tensor] = []
    heads: list[torch.Tensor] = []
    handles = [
        norm.register_forward_hook(lambda m, a, out: seen.append(out[0].clone())),  # type: ignore[union-attr, operator]
        loop.model.proj_out.register_forward_hook(lambda m, a, out: heads.append(out.clone())),  # type: ignore[union-attr, operator]
    ]
    loop(seed=4, steps=8)
    for handle in handles:
        handle.remove()
    profile = elision.fit(loop, "teacache", calls=[{"seed": 4, "steps": 8}], degree=2)
    pairs = profile.tensors["pairs"].numpy()
    want = [[float((b - a).abs().mean() / a.abs().mean()) for a, b in itertools.pairwise(row)] for row in (seen, heads)]
    np.testing.assert_allclose(pairs.T, want, rtol=1e-4)
    assert profile.tensors["coefficients"].numpy() == pytest.approx(np.polyfit(pairs[:, 0], pairs[:, 1], 2))
    assert profile.facts["steps_seen"] == 8
    assert profile.fingerprint["method"] == "teacache"


@pytest.mark.parametrize("calls", [CALLS, [run_once, run_once], [lambda target: target(steps=9)]])
def test_fit_leaves_no_trace_and_takes_every_kind_of_call(calls: list[Any]) -> None:
    loop = Loop("dit")
    plain = loop(steps=4)
    before = snapshot(loop.model, loop.scheduler)
    profile = elision.fit(loop, "teacache", calls=calls)
    left = [key for key in changed(before, snapshot(loop.model, loop.scheduler)) if key.startswith("0:")]
    assert left == []
    assert "step" not in vars(loop.scheduler)
    assert torch.equal(plain, loop(steps=4))
    assert len(profile.tensors["coefficients"]) == 5


def test_pairs_never_span_two_runs_or_two_branches() -> None:
    loop = Loop("flux")
    profile = elision.fit(loop, "teacache", calls=[{"steps": 5, "mode": "sequential"}] * 2)
    assert len(profile.tensors["pairs"]) == 2 * 2 * 4


def test_a_profile_decides_and_force_and_presets_work(tmp_path: Path) -> None:
    loop = Loop("flux")
    profile = elision.fit(loop, "teacache", calls=CALLS, degree=1)
    path = profile.save(tmp_path / "teacache.safetensors")
    results = {}
    polynomial = tuple(profile.tensors["coefficients"].tolist())
    for name, settings in {
        "object": {"profile": profile},
        "file": {"profile": path},
        "text": {"profile": str(path)},
        "mapping": {"profile": {"teacache": path}},
        "numbers": {"coefficients": polynomial},
    }.items():
        with elision.apply(loop, "teacache", threshold=0.9, **settings) as run:
            results[name] = loop(steps=8), run.report().strip()  # type: ignore[attr-defined]
    assert "r" in results["object"][1]
    assert all(torch.equal(out, results["object"][0]) for out, _ in results.values())
    strips = set()
    for coefficients in (None, (0.01, 0.0), (100.0, 0.0), "flux"):
        idle = pytest.warns(elision.ElisionWarning) if coefficients == (100.0, 0.0) else contextlib.nullcontext()
        with idle, elision.apply(loop, "teacache", threshold=0.9, coefficients=coefficients) as run:
            loop(steps=8)
        strips.add(run.report().strip())  # type: ignore[attr-defined]
    assert len(strips) >= 3
    assert len(PRESETS["flux"]) == 5


def test_explicit_coefficients_come_before_the_profile() -> None:
    loop = Loop("flux")
    profile = elision.fit(loop, "teacache", calls=CALLS, degree=1)
    with elision.apply(loop, "teacache", profile=profile, threshold=0.5, coefficients=(1e-6, 0.0)) as run:
        loop(steps=8)
    assert run.report().strip() == "CrrrrrrC"  # type: ignore[attr-defined]


def test_a_bare_denoiser_can_use_what_was_fitted_on_it() -> None:
    """Without a scheduler on either side; the number of steps is not part of what TeaCache learns."""
    loop = Loop("flux")

    def sample(model: torch.nn.Module) -> None:
        assert model is loop.model
        loop(steps=8)

    profile = elision.fit(loop.model, "teacache", calls=[sample, sample])
    with elision.apply(loop.model, "teacache", profile=profile, threshold=5.0, steps=8) as run:
        loop(steps=8)
    assert "r" in run.report().strip()  # type: ignore[attr-defined]


def test_fit_refuses() -> None:
    loop = Loop("flux")
    before = snapshot(loop.model, loop)
    with pytest.raises(OptionError, match="at least one call"):
        elision.fit(loop, "teacache", calls=[])
    with pytest.raises(OptionError, match=r"3 step pairs cannot fix a polynomial of degree 4"):
        elision.fit(loop, "teacache", calls=[{"steps": 4}])
    with pytest.raises(OptionError, match="easycache has no offline part"):
        elision.fit(loop, "easycache", calls=CALLS)
    with pytest.raises(OptionError, match="cannot be called"):
        elision.fit(type("Bare", (), {"transformer": loop.model})(), "teacache", calls=["a prompt"])
    with pytest.raises(elision.errors.UnknownName, match="degree"):
        elision.fit(loop, "teacache", calls=CALLS, degre=2)
    with pytest.raises(UnsupportedTarget, match="UNet2DConditionModel"):
        elision.fit(Loop("unet"), "teacache", calls=CALLS)

    def boom(target: Loop) -> None:
        target(steps=2)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        elision.fit(loop, "teacache", calls=[boom])
    assert [key for key in changed(before, snapshot(loop.model, loop)) if not key.endswith("called")] == []


def test_a_profile_of_another_model_is_refused() -> None:
    profile = elision.fit(Loop("flux"), "teacache", calls=CALLS)
    other = Loop("flux", seed=9)
    before = snapshot(other.model, other.scheduler)
    with pytest.raises(ProfileMismatch, match="weights"):
        elision.apply(other, "teacache", profile=profile)
    assert changed(before, snapshot(other.model, other.scheduler)) == []
    with elision.apply(other, "teacache", profile=profile, force=True, threshold=5.0) as run:
        other(steps=8)
    assert any("force" in note and "weights" in note for note in run.report().notes)
    assert isinstance(profile, Profile)
