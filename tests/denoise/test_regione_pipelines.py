"""RegionE through diffusers' own editing pipelines, and its offline part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from torch import Tensor

import elision
from elision.denoise.engine import DenoiseApplied
from elision.errors import OptionError, ProfileError, UnsupportedTarget
from elision.profile import Profile
from tests.conformance.settings import GAMMAS, STEPS
from tests.denoise.test_pipelines import vae
from tests.models import KINDS, Loop, changed, draw, randomise, snapshot

OPTIONS: dict[str, Any] = {"gammas": GAMMAS, "delta": 0.3, "warmup_steps": 2, "post_steps": 1, "forced": (5,)}


def noise_and_picture(channels: int) -> tuple[Tensor, Tensor]:
    """Latents [1, C, 12, 12] so large that the first estimates are about the noise, and the opposite in a corner."""
    noise = 6 * draw(1, channels, 12, 12, seed=0)
    picture = noise.clone()
    picture[..., :6, :8] *= -1
    return noise, picture


class Kontext:
    """Guidance-distilled, or true guidance in two calls without names."""

    def __init__(self) -> None:
        self.pipe = FluxKontextPipeline(
            FlowMatchEulerDiscreteScheduler(), vae(1), None, None, None, None, KINDS["kontext"].make()
        )
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, guided: bool = False, **how: Any) -> Tensor:
        if guided:
            how |= {
                "true_cfg_scale": 2.0,
                "negative_prompt_embeds": draw(1, 3, 8, seed=3),
                "negative_pooled_prompt_embeds": draw(1, 8, seed=4),
            }
        noise, picture = noise_and_picture(1)
        out: Tensor = self.pipe(
            image=picture,
            prompt_embeds=draw(1, 3, 8, seed=1),
            pooled_prompt_embeds=draw(1, 8, seed=2),
            latents=self.pipe._pack_latents(noise, 1, 1, 12, 12),
            height=12,
            width=12,
            max_area=12 * 12,
            num_inference_steps=STEPS,
            output_type="latent",
            **how,
        ).images
        return out


class Qwen:
    """Guidance in two named calls, rescaled to the norm of the conditional one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, later: bool = False) -> None:
        monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (96, 96, None))
        torch.manual_seed(0)
        model = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=later,
        )
        scheduler = FlowMatchEulerDiscreteScheduler()
        self.pipe = QwenImageEditPipeline(scheduler, None, None, None, None, randomise(model))
        self.pipe._encode_vae_image = lambda image, generator: noise_and_picture(16)[1][:, :, None]
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, guided: bool = True, **how: Any) -> Tensor:
        if guided:
            how |= {
                "true_cfg_scale": 4.0,
                "negative_prompt_embeds": draw(1, 5, 8, seed=3),
                "negative_prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long),
            }
        out: Tensor = self.pipe(
            image=Image.new("RGB", (96, 96)),
            prompt_embeds=draw(1, 4, 8, seed=1),
            prompt_embeds_mask=torch.tensor([[1, 1, 1, 0]]),
            latents=self.pipe._pack_latents(noise_and_picture(16)[0], 1, 16, 12, 12),
            num_inference_steps=STEPS,
            output_type="latent",
            **how,
        ).images
        return out


def apply(pipe: Any, **options: Any) -> DenoiseApplied:
    run = elision.apply(pipe, "regione", **options)
    assert isinstance(run, DenoiseApplied)
    return run


def check(editor: Any, calls: int, **settings: Any) -> None:
    """One pipeline: nothing elided is bit-identical, something elided is not, and it comes off without a trace."""
    guided = calls == 2
    plain = editor(guided)
    before = snapshot(editor.pipe.transformer, editor.pipe.scheduler)
    limit = apply(editor.pipe, **{**OPTIONS, "warmup_steps": STEPS}, **settings)
    with pytest.warns(elision.errors.ElisionWarning, match="elided nothing"):
        same = editor(guided)
    assert torch.equal(same, plain)
    limit.remove()
    with apply(editor.pipe, **OPTIONS, eta=0.5, **settings) as run:
        out, again = editor(guided), editor(guided)
    report = run.report()
    assert report.last is not None
    assert torch.equal(out, again)
    assert torch.isfinite(out).all()
    edited = report.last.extra["regione"]["edited"][0]
    assert 0 < edited < 36, edited
    assert report.strip() == "CCmpCppC"
    assert report.calls == 2 * STEPS * calls
    assert report.calls_elided == 2 * 3 * calls
    assert report.flops_elided
    with apply(editor.pipe, **{**OPTIONS, "delta": 0}, eta=2, **settings):
        all_edited = editor(guided)
    assert (all_edited - plain).norm() < (out - plain).norm()
    left = changed(before, snapshot(editor.pipe.transformer, editor.pipe.scheduler))
    assert [key for key in left if not key.endswith("_step_index")] == []
    assert torch.equal(editor(guided), plain)


def test_kontext() -> None:
    check(Kontext(), calls=1)


def test_kontext_with_true_guidance() -> None:
    """Two calls that the pipeline does not name, with a store for each."""
    check(Kontext(), calls=2, branches=("cond", "uncond"))


@pytest.mark.parametrize("later", [False, True], ids=["edit", "zero_cond_t"])
def test_qwen(monkeypatch: pytest.MonkeyPatch, later: bool) -> None:
    check(Qwen(monkeypatch, later), calls=2)


def test_a_text_to_image_pipeline_is_refused() -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae(1), None, None, None, None, KINDS["flux"].make())
    pipe.set_progress_bar_config(disable=True)
    with apply(pipe, **OPTIONS), pytest.raises(UnsupportedTarget, match="editing pipeline"):
        pipe(
            prompt_embeds=draw(1, 3, 8, seed=1),
            pooled_prompt_embeds=draw(1, 8, seed=2),
            height=12,
            width=12,
            num_inference_steps=STEPS,
            output_type="latent",
        )


# -- fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["whole", "token"])
def test_gammas_are_ratios_of_guided_velocities(norm: str) -> None:
    """Against velocities noted at the scheduler, over two calls of two images."""
    loop = Loop("kontext")
    seen: list[Tensor] = []
    step = loop.scheduler.step

    def noting(v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(v.double())
        return step(v, *args, **kwargs)

    calls: list[Any] = [{"steps": STEPS, "mode": "sequential", "batch": 2, "seed": seed} for seed in (1, 2)]
    profile = elision.fit(loop, "regione", calls=calls, norm=norm)
    loop.scheduler.step = noting
    for call in calls:
        loop(**call)
    sigmas = loop.scheduler.sigmas.double()
    rows = []
    for run in (seen[:STEPS], seen[STEPS:]):
        for a, b, here, following in zip(run, run[1:], sigmas, sigmas[1:], strict=False):
            axes = (1, 2) if norm == "whole" else 2
            ratio = b.norm(dim=axes) / a.norm(dim=axes)
            rows.append((ratio.flatten(1).mean(1) if norm == "token" else ratio) / (1 - (here - following)))
    want = torch.cat([torch.stack(rows[: STEPS - 1], 1), torch.stack(rows[STEPS - 1 :], 1)]).mean(0)
    assert torch.allclose(profile.tensors["gammas"].double(), want, rtol=1e-5)
    assert profile.facts["images"] == 4
    assert profile.facts["steps"] == STEPS


def test_a_profile_gives_the_gammas(tmp_path: Any) -> None:
    loop = Loop("kontext")
    profile = elision.fit(loop, "regione", calls=[{"steps": STEPS}])
    profile.save(tmp_path / "kontext.safetensors")
    gammas = tuple(float(g) for g in profile.tensors["gammas"])
    options: dict[str, Any] = {k: v for k, v in OPTIONS.items() if k != "gammas"}
    with apply(loop, profile=tmp_path / "kontext.safetensors", eta=0.7, **options) as run:
        out = loop(steps=STEPS)
    assert run.report().last is not None
    with apply(loop, gammas=gammas, eta=0.7, **options):
        assert torch.equal(loop(steps=STEPS), out)
    assert isinstance(Profile.load(tmp_path / "kontext.safetensors"), Profile)


def test_calls_of_several_lengths_are_refused() -> None:
    with pytest.raises(ProfileError, match=r"one number of steps, at least 2; the calls had \[4, 8\]"):
        elision.fit(Loop("kontext"), "regione", calls=[{"steps": 8}, {"steps": 4}])
    with pytest.raises((OptionError, UnsupportedTarget), match="scheduler"):
        elision.fit(Loop("kontext").model, "regione", calls=[lambda model: None])
