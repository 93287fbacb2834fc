"""Guidance as diffusers' pipelines do it: in one call, in two named ones, in two without names."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CosmosTextToWorldPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    ZImagePipeline,
)
from torch import Tensor

import elision
from elision.denoise.adapters import adapter_for
from elision.denoise.methods.easycache import EasyCache
from elision.denoise.methods.taylorseer import TaylorSeer
from elision.denoise.methods.uniform import Uniform
from elision.denoise.policy import DenoiseMethod
from elision.denoise.report import DenoiseReport
from elision.errors import ClockError
from tests.denoise.adapters.subjects import ClassLoop, text
from tests.denoise.adapters.table import SUBJECTS
from tests.models import draw

pytestmark = [
    pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning"),
    pytest.mark.usefixtures("no_flops"),
]
NAMES = pytest.mark.parametrize("name", SUBJECTS)
EASY = EasyCache(threshold=1e9, warmup_steps=2)
STEPS = 5


@functools.cache
def made(name: str) -> ClassLoop:
    return ClassLoop(SUBJECTS[name])


def sample(loop: ClassLoop, method: DenoiseMethod, **how: Any) -> tuple[Tensor, DenoiseReport, Any]:
    """A sample, the report, and the rows that were taken for the conditional ones."""
    with elision.apply(loop, method) as run:
        out = loop(steps=STEPS, name=run.step, **how)  # type: ignore[attr-defined]
        rows = run.clock.cond  # type: ignore[attr-defined]
    report = run.report()
    assert isinstance(report, DenoiseReport)
    return out, report, rows


@NAMES
@pytest.mark.parametrize("method", [EASY, TaylorSeer(interval=3, first_enhance=2)], ids=["easycache", "taylorseer"])
def test_one_call_equals_two_in_any_order(name: str, method: DenoiseMethod) -> None:
    loop = made(name)
    two, apart, _ = sample(loop, method, mode="sequential", batch=2)
    turned, other, _ = sample(loop, method, mode="sequential", batch=2, order=("uncond", "cond"))
    one, together, rows = sample(loop, method, mode="batched", batch=2)
    assert torch.equal(turned, two)
    assert apart.strip() == other.strip() == together.strip()
    assert apart.outputs_stood_in > 0
    assert torch.allclose(one, two, atol=2e-4 * float(two.abs().max()))
    assert rows == (slice(None, 2) if loop.kind.cond_first else slice(2, None))


@NAMES
def test_what_is_said_of_the_pipelines(name: str) -> None:
    """Calls can be named where the class has contexts, and have a known order where they are not."""
    loop = made(name)
    adapter = adapter_for(loop.model)
    named = callable(getattr(loop.model, "cache_context", None))
    assert named or "named" not in loop.kind.guidance.split()
    assert (loop.kind.guidance == "two unnamed calls") == (bool(adapter.calls) and not named)


class Pipeline:
    """A pipeline of diffusers around a subject; text is given as embeddings, latents are returned."""

    def __init__(self, pipe: Any, arguments: dict[str, Any]) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.arguments = arguments

    @torch.no_grad()
    def __call__(self, **more: Any) -> Tensor:
        out: Any = self.pipe(**{**self.arguments, **more, "output_type": "latent"})
        return out[0] if isinstance(out[0], Tensor) else torch.stack(out[0])


def lumina2() -> Pipeline:
    pipe = Lumina2Pipeline(made("Lumina2").model, FlowMatchEulerDiscreteScheduler(), None, None, None)
    ones = torch.ones(1, 3, dtype=torch.bool)
    arguments = {
        "prompt_embeds": text(1, 10),
        "prompt_attention_mask": ones,
        "negative_prompt_embeds": text(1, 20),
        "negative_prompt_attention_mask": ones,
        "height": 32,
        "width": 32,
        "latents": draw(1, 4, 4, 4, seed=1),
        "num_inference_steps": STEPS,
    }
    return Pipeline(pipe, arguments)


def z_image() -> Pipeline:
    pipe = ZImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, made("Z-Image").model)
    arguments = {
        "prompt_embeds": [text(1, 10)[0]],
        "negative_prompt_embeds": [text(1, 20)[0]],
        "height": 32,
        "width": 32,
        "latents": draw(1, 4, 4, 4, seed=1),
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
    }
    return Pipeline(pipe, arguments)


class Permissive:
    """A safety checker that checks nothing."""

    def to(self, device: Any) -> None:
        """Stay where it is."""

    def check_text_safety(self, prompt: str) -> bool:
        return True


def cosmos() -> Pipeline:
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    pipe = CosmosTextToWorldPipeline(None, None, made("Cosmos").model, None, scheduler, Permissive())
    arguments = {
        "prompt_embeds": text(1, 10),
        "negative_prompt_embeds": text(1, 20),
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "latents": draw(1, 4, 2, 4, 4, seed=1),
        "num_inference_steps": STEPS,
    }
    return Pipeline(pipe, arguments)


def cogvideox() -> Pipeline:
    pipe = CogVideoXPipeline(None, None, None, made("CogVideoX").model, CogVideoXDDIMScheduler())
    arguments = {
        "prompt_embeds": text(1, 10),
        "negative_prompt_embeds": text(1, 20),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "latents": draw(1, 2, 4, 4, 4, seed=1),
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
    }
    return Pipeline(pipe, arguments)


@pytest.mark.parametrize(("make", "calls"), [(lumina2, 2), (z_image, 1), (cosmos, 2), (cogvideox, 1)])
def test_pipelines_of_diffusers(make: Any, calls: int) -> None:
    """Nothing elided is nothing changed; steps are counted right, whatever the pipeline does in one."""
    target = make()
    plain = target()
    with elision.apply(target.pipe, Uniform(interval=1)) as run:
        assert torch.equal(target(), plain)
    assert (run.report().strip(), run.report().calls) == ("C" * STEPS, calls * STEPS)  # type: ignore[attr-defined]
    for method, strip in ((EASY, "CCrrC"), (TaylorSeer(interval=3, first_enhance=2), "CCppC")):
        with elision.apply(target.pipe, method) as run:
            out = target()
        report: Any = run.report()
        assert (report.strip(), report.run_count) == (strip, 1)
        assert not torch.equal(out, plain)
        assert torch.isfinite(out).all()


def test_unnamed_calls_of_a_pipeline_of_ones_own_are_asked_for() -> None:
    """Only diffusers' own pipelines are known to call in the order that the adapter says."""
    loop = made("Lumina2")
    with elision.apply(loop, Uniform(interval=2)), pytest.raises(ClockError, match="branches="):
        loop(steps=STEPS, mode="sequential")
    with elision.apply(loop, Uniform(interval=2), branches=("cond", "uncond")) as run:
        loop(steps=STEPS, mode="sequential")
    assert run.report().strip() == "CrCrC"  # type: ignore[attr-defined]
