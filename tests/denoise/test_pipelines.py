"""Real diffusers pipelines and every kind of scheduler, end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from torch import Tensor

import elision
from elision.denoise.methods.easycache import EasyCache
from elision.denoise.methods.taylorseer import TaylorSeer
from elision.errors import ClockError
from elision.zoo.garments_flux import CONFIG, GarmentsPipeline
from tests.models import KINDS, Loop, changed, draw, randomise, snapshot

quiet = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
TAYLOR = TaylorSeer(interval=3, first_enhance=2)
EASY = EasyCache(threshold=1e9, warmup_steps=3)


def vae(channels: int = 4) -> AutoencoderKL:
    """The smallest autoencoder that runs."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(4,),
        norm_num_groups=2,
        latent_channels=channels,
        sample_size=8,
        layers_per_block=1,
        shift_factor=0.0,
    )
    return model.eval().requires_grad_(False)


class Garments:
    """The zoo's own pipeline, untrained: guidance in two named calls, in one, or none."""

    def __init__(self) -> None:
        from diffusers import FluxTransformer2DModel

        config = {**CONFIG, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
        torch.manual_seed(0)
        self.pipe = GarmentsPipeline(randomise(FluxTransformer2DModel(**config)), FlowMatchEulerDiscreteScheduler())
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, **how: Any) -> Tensor:
        latents = draw(2, 64, 16, seed=0)
        out: Tensor = self.pipe([1, 5], num_inference_steps=8, latents=latents, output_type="pt", **how).images
        return out


class Dit:
    def __init__(self) -> None:
        self.pipe = DiTPipeline(KINDS["dit"].make(), vae(), DDIMScheduler())
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, **how: Any) -> Any:
        seed = torch.Generator().manual_seed(0)
        return torch.from_numpy(
            self.pipe([3, 7], generator=seed, num_inference_steps=8, output_type="np", **how).images
        )


class PixArt:
    def __init__(self) -> None:
        self.pipe = PixArtAlphaPipeline(None, None, vae(), KINDS["pixart"].make(), DPMSolverMultistepScheduler())
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, **how: Any) -> Any:
        return self.pipe(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=draw(1, 3, 8, seed=1),
            prompt_attention_mask=torch.ones(1, 3),
            negative_prompt_embeds=draw(1, 3, 8, seed=2),
            negative_prompt_attention_mask=torch.ones(1, 3),
            latents=draw(1, 4, 8, 8, seed=0),
            height=8,
            width=8,
            num_inference_steps=8,
            use_resolution_binning=False,
            output_type="latent",
            **how,
        ).images


class Flux:
    """Guidance-distilled or true CFG, through diffusers' own pipeline."""

    def __init__(self, kind: type = FluxPipeline) -> None:
        self.pipe = kind(FlowMatchEulerDiscreteScheduler(), vae(1), None, None, None, None, KINDS["flux"].make())
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, true_cfg: bool = False, **how: Any) -> Any:
        if true_cfg:
            how |= {
                "negative_prompt_embeds": draw(1, 3, 8, seed=3),
                "negative_pooled_prompt_embeds": draw(1, 8, seed=4),
                "true_cfg_scale": 3.0,
            }
        return self.pipe(
            prompt_embeds=draw(1, 3, 8, seed=1),
            pooled_prompt_embeds=draw(1, 8, seed=2),
            num_inference_steps=8,
            output_type="latent",
            **{"latents": draw(1, 16, 4, seed=0), "height": 8, "width": 8, **how},
        ).images


def check(target: Any, options: elision.Method, strip: str, **how: Any) -> Any:
    """Cached differs from plain, strip as expected, twice the same, and nothing stays behind."""
    plain = target(**how)
    modules = [m for m in target.pipe.components.values() if isinstance(m, torch.nn.Module)]
    before = snapshot(*modules, target.pipe)
    with elision.apply(target.pipe, options, shadow=True) as run:
        out = target(**how)
        again = target(**how)
    report: Any = run.report()
    assert report.strip() == strip
    assert report.run_count == 2
    assert [r.total for r in report.runs] == [len(strip)] * 2
    assert torch.equal(out, again)
    assert not torch.equal(out, plain)
    assert torch.isfinite(out).all()
    assert torch.equal(target(**how), plain)
    left = changed(before, snapshot(*modules, target.pipe))
    assert [key for key in left if not key.endswith("_joint_attention_kwargs")] == []  # the pipeline's own, every call
    assert "step" not in vars(target.pipe.scheduler)
    return report


@quiet
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_garments(batched: bool, scale: float) -> None:
    how = {"batched_cfg": batched, "guidance_scale": scale}
    report = check(Garments(), TAYLOR, "CCppCppC", **how)
    assert report.calls == 2 * 8 * (1 if batched or scale == 1 else 2)
    check(Garments(), EASY, "CCCrrrrC", **how)


@quiet
def test_garments_sequential_equals_batched() -> None:
    pipe = Garments()
    for method in (TAYLOR, EASY):
        with elision.apply(pipe.pipe, method):
            assert torch.allclose(pipe(), pipe(batched_cfg=True), atol=1e-4)


@quiet
def test_garments_with_a_swapped_scheduler() -> None:
    pipe = Garments()
    with elision.apply(pipe.pipe, TAYLOR) as run:
        want = pipe()
        pipe.pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        assert torch.equal(pipe(), want)
        assert torch.equal(pipe(), want)
    assert [run.report().strip(r) for r in run.report().runs] == ["CCppCppC"] * 3  # type: ignore[attr-defined]


@quiet
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit_pipeline(scale: float) -> None:
    check(Dit(), TAYLOR, "CCppCppC", guidance_scale=scale)
    check(Dit(), EASY, "CCCrrrrC", guidance_scale=scale)


@quiet
def test_dit_statistics_see_the_conditional_half() -> None:
    """It comes first in this pipeline, so that the decisions are those of the conditional branch alone."""
    pipe = Dit()
    with elision.apply(pipe.pipe, EASY) as run:
        pipe(guidance_scale=4.0)
        cond = run.clock.cond  # type: ignore[attr-defined]
    assert (cond.start, cond.stop) == (None, 2)


@quiet
def test_pixart_pipeline() -> None:
    check(PixArt(), TAYLOR, "CCppCppC")
    check(PixArt(), EASY, "CCCrrrrC")
    check(PixArt(), EASY, "CCCrrrrC", guidance_scale=1.0)


@quiet
@pytest.mark.parametrize("true_cfg", [False, True])
def test_flux_pipeline(true_cfg: bool) -> None:
    report = check(Flux(), TAYLOR, "CCppCppC", true_cfg=true_cfg)
    assert {row.branch for row in report.shadow} == ({"cond", "uncond"} if true_cfg else {"cond"})
    check(Flux(), EASY, "CCCrrrrC", true_cfg=true_cfg)


@quiet
def test_flux_image_to_image() -> None:
    """Strength 0.75 of 8 steps: six steps, of which the first has index 2 in the grid."""
    target = Flux(FluxImg2ImgPipeline)
    image = draw(1, 3, 8, 8, seed=5).sigmoid()

    def call() -> Any:
        return target(image=image, strength=0.75, latents=None, generator=torch.Generator().manual_seed(0))

    plain = call()
    with elision.apply(target.pipe, TAYLOR) as run:
        out = call()
    report: Any = run.report()
    assert report.strip() == "CCppCp"
    assert report.last.total == 6
    grid = [float(t) for t in target.pipe.scheduler.timesteps]
    assert [s.t for s in report.last.steps] == grid[2:]
    assert not torch.equal(plain, out)
    assert torch.equal(call(), plain)


@quiet
def test_sd3_skip_layer_guidance_is_refused_not_wrong() -> None:
    """Its extra call in a step is unnamed: two values of one site cannot be told apart."""
    pipe = StableDiffusion3Pipeline(
        KINDS["sd3"].make(), FlowMatchEulerDiscreteScheduler(), vae(), None, None, None, None, None, None
    )
    pipe.set_progress_bar_config(disable=True)

    def call(**how: Any) -> Tensor:
        out: Tensor = pipe(
            prompt_embeds=draw(1, 3, 8, seed=1),
            pooled_prompt_embeds=draw(1, 8, seed=2),
            negative_prompt_embeds=draw(1, 3, 8, seed=3),
            negative_pooled_prompt_embeds=draw(1, 8, seed=4),
            latents=draw(1, 4, 4, 4, seed=0),
            height=4,
            width=4,
            num_inference_steps=8,
            output_type="latent",
            **how,
        ).images
        return out

    plain = call()
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with elision.apply(pipe, TAYLOR) as run:
        out = call()
        with pytest.raises(ClockError, match="no branch name"):
            call(**skipping)
        assert torch.equal(call(), out)
    assert run.report().strip() == "CCppCppC"  # type: ignore[attr-defined]
    assert torch.equal(call(), plain)


@quiet
def test_wan_pipeline_with_two_experts() -> None:
    """Wan 2.2's own pipeline: it hands over at `boundary_ratio`, and passes step metadata with the context."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    coder = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    first, second = KINDS["wan"].make(0), KINDS["wan"].make(1)
    pipe = WanPipeline(
        None, None, coder, UniPCMultistepScheduler(), transformer=first, transformer_2=second, boundary_ratio=0.5
    )
    pipe.set_progress_bar_config(disable=True)

    def call() -> Tensor:
        out: Tensor = pipe(
            prompt_embeds=draw(1, 3, 8, seed=1),
            negative_prompt_embeds=draw(1, 3, 8, seed=2),
            latents=draw(1, 4, 2, 4, 4, seed=0),
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=8,
            output_type="latent",
        ).frames
        return out

    plain = call()
    before = snapshot(first, second)
    with elision.apply(pipe, TAYLOR) as run:
        out = call()
        assert torch.equal(call(), out)
    report: Any = run.report()
    strip = report.strip()
    assert len(strip) == 8
    assert strip.startswith("CCpp")
    handover = sum(float(t) >= 500 for t in pipe.scheduler.timesteps)
    assert strip[handover] == "C"
    assert report.calls == 2 * 2 * 8
    assert torch.equal(call(), plain)
    assert changed(before, snapshot(first, second)) == []
    with elision.apply(second, "uniform", interval=2, site="model") as bare:  # a bare denoiser is told by metadata
        call()
    assert {step.n for step in bare.report().last.steps} == set(range(handover, 8))  # type: ignore[attr-defined]
    assert bare.report().last.total == 8  # type: ignore[attr-defined]


@quiet
@pytest.mark.parametrize(
    "make",
    [
        FlowMatchHeunDiscreteScheduler,
        EulerDiscreteScheduler,
        DDIMScheduler,
        UniPCMultistepScheduler,
        DPMSolverMultistepScheduler,
    ],
)
@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_every_kind_of_scheduler(make: Any, kind: str) -> None:
    loop = Loop(kind, make())
    plain = loop(steps=6, mode="batched")
    total = len(loop.scheduler.timesteps)
    with elision.apply(loop, "easycache", threshold=1e9, warmup_steps=2) as run:
        out = loop(steps=6, mode="batched")
    assert run.report().strip() == "CC" + "r" * (total - 3) + "C"  # type: ignore[attr-defined]
    assert torch.isfinite(out).all()
    assert torch.equal(loop(steps=6, mode="batched"), plain)
