"""What ERTACache's fit refuses, sees and offers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import elision
from elision.denoise.methods.ertacache import ERTACache
from elision.errors import OptionError, ProfileError, ProfileMismatch, UnsupportedTarget
from tests.denoise.erta import T, fit, run
from tests.models import Loop, changed, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


def test_a_profile_is_bound_to_steps_grid_and_model() -> None:
    loop = Loop("flux")
    profile = fit(loop, threshold=0.4)
    with pytest.raises(ProfileMismatch, match="runs of 8 steps, this one has 12"):
        run(loop, profile, steps=12)
    with pytest.raises(ProfileMismatch, match="weights"):
        run(Loop("flux", seed=3), profile)
    with pytest.raises(ProfileMismatch, match="scheduler_config"):
        run(Loop("flux", scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)), profile)
    real = loop.scheduler.set_timesteps
    loop.scheduler.set_timesteps = lambda n: real(sigmas=np.linspace(1.0, 0.3, n).tolist())  # as dynamic shifting does
    with pytest.raises(ProfileMismatch, match=r"noise level .* at step 1"):
        run(loop, profile)
    del loop.scheduler.set_timesteps
    with pytest.raises(ProfileMismatch, match="has 5"):
        run(loop, profile, begin=3)
    run(loop, profile)


def test_a_profile_or_a_list_by_hand_is_needed() -> None:
    loop = Loop("flux")
    with pytest.raises(ProfileError, match="ertacache needs a profile"):
        elision.apply(loop, "ertacache")
    with pytest.raises(ProfileError, match="ertacache needs a profile"):
        elision.apply(loop, "ertacache", reused=(2, 3))
    _, report = run(loop, None, {"reused": (2, 3), "phi": 1.0, "rectify": "off"})
    assert report.strip() == "CCrrCCCC"
    with pytest.raises(OptionError, match="phi is the step factor"):
        ERTACache(phi=0.5, adjust=False)


def test_options_that_contradict_the_profile_are_refused() -> None:
    loop = Loop("flux")
    profile = fit(loop, threshold=0.4)
    with pytest.raises(OptionError, match=r"threshold=0\.7, but the profile was fitted with 0\.4"):
        run(loop, profile, {"threshold": 0.7})
    run(loop, profile, {"threshold": 0.4})
    listed = profile.tensors["reused"].tolist()
    with pytest.raises(OptionError, match=r"steps \[7\] of reused= were not skipped"):
        run(loop, profile, {"reused": (*listed, 7)})
    _, report = run(loop, profile, {"reused": tuple(listed[:1]), "adjust": False})
    assert report.strip().count("p") == 1


def test_other_schedulers_need_the_step_sizes_off() -> None:
    loop = Loop("dit", scheduler=DDIMScheduler())
    profile = fit(loop, threshold=1e9)
    with pytest.raises(UnsupportedTarget, match="flow-matching Euler, not for DDIMScheduler"):
        run(loop, profile)
    _, report = run(loop, profile, {"adjust": False}, mode="sequential")
    assert report.strip() == "CppppppC"
    with pytest.raises(UnsupportedTarget, match="DDIMScheduler"):
        fit(loop, threshold=1e9, refit=True)


def test_a_guidance_branch_without_correction_is_refused() -> None:
    loop = Loop("flux")
    profile = fit(loop, mode="distilled", threshold=1e9)
    with pytest.raises(ProfileMismatch, match="no correction for the 'rest' guidance branch"):
        run(loop, profile, {"adjust": False}, mode="sequential")


def test_variants_of_the_fit() -> None:
    loop = Loop("sd3")
    base = fit(loop, threshold=0.5)
    ratios = fit(loop, threshold=0.5, average="ratios")
    assert torch.equal(base.tensors["reused"], ratios.tensors["reused"])
    assert not torch.equal(base.tensors["phi"], ratios.tensors["phi"])
    refit = fit(loop, threshold=0.5, refit=True)
    assert torch.equal(base.tensors["phi"], refit.tensors["phi"])
    assert not torch.equal(base.tensors["K.cond.scalar"], refit.tensors["K.cond.scalar"])
    alone = fit(loop, threshold=0.5, pool="alone")
    single = [fit(loop, (seed,), threshold=0.5).tensors["relative_errors"] for seed in (5, 6)]
    torch.testing.assert_close(alone.tensors["relative_errors"], torch.cat(single), rtol=1e-6, atol=0)
    mean = alone.tensors["relative_errors"].mean(0)
    assert alone.tensors["reused"].tolist() == [n for n in range(1, T - 1) if mean[n] < 0.5]
    assert (base.tensors["phi"] >= 0).all()
    assert (base.tensors["phi"] <= 1).all()


def test_fit_sees_the_same_noise_in_every_pass_and_leaves_no_trace() -> None:
    """Generators are put back, and global random numbers are not disturbed."""
    loop = Loop("flux")
    seen: list[float] = []

    def call(target: Loop) -> None:
        seen.append(float(torch.randn(())))
        target(steps=T)

    torch.manual_seed(4)
    want = torch.randn(3)
    torch.manual_seed(4)
    before = snapshot(loop.model, loop.scheduler)
    elision.fit(loop, "ertacache", calls=[call, call], threshold=0.4)
    assert torch.equal(torch.randn(3), want)
    left = [key for key in changed(before, snapshot(loop.model, loop.scheduler)) if key.startswith("0:")]
    assert left == []
    assert "step" not in vars(loop.scheduler)
    assert len(set(seen)) == 2
    generator = torch.Generator().manual_seed(9)
    state = generator.get_state()
    elision.fit(Drawing(loop), "ertacache", calls=[{"generator": generator}], threshold=0.4)
    assert torch.equal(generator.get_state(), state)


class Drawing:
    """A pipeline that draws its noise from a generator."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.transformer, self.scheduler = loop, loop.model, loop.scheduler

    def __call__(self, generator: torch.Generator) -> Tensor:
        return self.loop(seed=int(torch.randint(1000, (), generator=generator)), steps=T)


def test_fit_refuses() -> None:
    loop = Loop("flux")
    with pytest.raises(OptionError, match=r"the calls have \[4, 8\] steps"):
        elision.fit(loop, "ertacache", calls=[{"steps": 8}, {"steps": 4}])
    with pytest.raises(OptionError, match="1 calls made 2 runs"):
        elision.fit(loop, "ertacache", calls=[lambda target: (target(steps=4), target(steps=4))])
    two = Loop("wan")
    two.transformer_2 = Loop("wan", seed=1).model  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedTarget, match="2 denoisers"):
        elision.fit(two, "ertacache", calls=[{"steps": 4}])


def test_a_bare_denoiser_can_be_fitted_and_run_without_step_sizes() -> None:
    loop = Loop("flux")

    def sample(model: nn.Module) -> None:
        loop(steps=T)

    profile = elision.fit(loop.model, "ertacache", calls=[sample], threshold=1e9)
    with elision.apply(loop.model, "ertacache", profile=profile, steps=T, adjust=False) as applied:
        loop(steps=T)
    assert applied.report().strip() == "CppppppC"  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedTarget, match="bare denoiser"):
        elision.apply(loop.model, "ertacache", profile=profile, steps=T)
