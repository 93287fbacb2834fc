"""ControlNet residuals are counted once, and attention that returns a third value keeps all three."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from elision.denoise.engine import DenoiseApplied
from tests.conformance.settings import Options, apply
from tests.models import Loop, draw

pytestmark = [
    pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning"),  # two steps leave nothing but the warm-up
    pytest.mark.usefixtures("no_flops"),
]
STAND_INS: list[tuple[str, Options, str]] = [
    ("first_block", {"threshold": 1e9}, "Cr"),
    ("uniform", {"interval": 2, "site": "stack"}, "Cr"),
    ("taylorseer", {"interval": 2, "first_enhance": 1, "site": "stack"}, "Cp"),
    ("uniform", {"interval": 2, "site": "branch"}, "Cr"),
    ("taylorseer", {"interval": 2, "first_enhance": 1}, "Cp"),
    ("taylorseer", {"interval": 2, "first_enhance": 1, "site": "head"}, "Cp"),
    ("bac", {"schedule": "uniform", "interval": 2}, "Cr"),
    ("profilingdit", {"blocks": (0, 1, 2), "warmup_steps": 0, "schedule": "uniform", "interval": 2}, "Cr"),
]


class Still:
    """A denoiser under a clock: the same call at every step, so that a right stand-in equals the truth."""

    def __init__(self, kind: str = "flux", **extra: Any) -> None:
        self.loop = Loop(kind)
        self.extra = extra

    def __call__(self, run: DenoiseApplied | None, steps: int = 2) -> list[Tensor]:
        """One call per step at one latent and one time."""
        loop = self.loop
        x, t = draw(*loop.kind.latent(1, 4), seed=1), torch.tensor(500.0)
        loop.scheduler.set_timesteps(steps)
        outs = []
        with torch.no_grad():
            for time in loop.scheduler.timesteps:
                outs.append(loop.call(x, t, loop.kind.inputs(1, 4, 3), **self.extra))
                loop.scheduler.step(outs[-1], time, x)
        return outs


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("method", "options", "want"), STAND_INS)
@pytest.mark.parametrize("where", ["controlnet_block_samples", "controlnet_single_block_samples", "both"])
def test_flux_controlnet_residuals_are_counted_once(method: str, options: Options, want: str, where: str) -> None:
    """One residual per block, the last block's among them: the stand-in must not contain what is added behind it."""
    double, single = ([draw(1, 16, 16, seed=40 + i + k) for i in range(2)] for k in (0, 5))
    extra: dict[str, Any] = {}
    if where in ("controlnet_block_samples", "both"):
        extra["controlnet_block_samples"] = double
    if where in ("controlnet_single_block_samples", "both"):
        extra["controlnet_single_block_samples"] = single
    still = Still(**extra)
    truth = still(None)
    assert relative(Still()(None)[0], truth[0]) > 0.05  # the residuals matter
    with apply(still.loop, method, options) as run:
        outs = still(run)
    assert run.report().strip() == want
    assert torch.equal(outs[0], truth[0])
    assert relative(outs[1], truth[1]) < 1e-5


@pytest.mark.parametrize(("method", "options", "want"), STAND_INS[:3])
def test_a_fresh_residual_behind_the_last_block_is_used(method: str, options: Options, want: str) -> None:
    """What is added after the stand-in comes from the current step, once."""
    samples = [draw(1, 16, 16, seed=40), draw(1, 16, 16, seed=41)]
    still = Still(controlnet_single_block_samples=samples)
    with apply(still.loop, method, options) as run:
        loop, x, t = still.loop, draw(1, 16, 4, seed=1), torch.tensor(500.0)
        loop.scheduler.set_timesteps(2)
        outs = []
        with torch.no_grad():
            for n, time in enumerate(loop.scheduler.timesteps):
                more = [samples[0], samples[1] * (1 + n)]
                outs.append(loop.call(x, t, loop.kind.inputs(1, 4, 3), controlnet_single_block_samples=more))
                loop.scheduler.step(outs[-1], time, x)
    want_second = _plain(Still(controlnet_single_block_samples=[samples[0], samples[1] * 2]))
    assert run.report().strip() == want
    assert relative(outs[1], want_second) < 1e-5


def _plain(still: Still) -> Tensor:
    return still(None)[0]


@pytest.mark.parametrize(("method", "options", "want"), STAND_INS)
def test_sd3_controlnet_residuals_are_counted_once(method: str, options: Options, want: str) -> None:
    still = Still("sd3", block_controlnet_hidden_states=[draw(1, 4, 16, seed=50 + i) for i in range(3)])
    truth = still(None)
    with apply(still.loop, method, options) as run:
        outs = still(run)
    assert run.report().strip() == want
    assert relative(outs[1], truth[1]) < 1e-5


class _WithImagePrompt(torch.nn.Module):
    """A Flux attention processor that returns a third value, as the IP-adapter's does."""

    def __init__(self, real: Any) -> None:
        super().__init__()
        self.real = real

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        image, text = self.real(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return image, text, 0.5 * hidden_states


@pytest.mark.parametrize(("method", "options", "want"), STAND_INS)
def test_attention_with_an_image_prompt_returns_three_values(method: str, options: Options, want: str) -> None:
    still = Still()
    bare = still(None)
    for block in still.loop.model.transformer_blocks:  # type: ignore[union-attr]
        block.attn.processor = _WithImagePrompt(block.attn.processor)  # type: ignore[union-attr]
    truth = still(None)
    assert relative(bare[0], truth[0]) > 1e-3
    with apply(still.loop, method, options) as run:
        outs = still(run)
    assert run.report().strip() == want
    assert relative(outs[1], truth[1]) < 1e-5


def test_shared_or_chunked_modules_are_refused_by_name() -> None:
    """A branch that runs twice in one call has no single value."""
    loop = Loop("dit")
    for block in loop.model.transformer_blocks:  # type: ignore[union-attr]
        block.set_chunk_feed_forward(2, 1)  # type: ignore[union-attr, operator]
    from elision.errors import UnsupportedTarget

    with pytest.raises(UnsupportedTarget, match=r"transformer_blocks\.0\.ff ran twice"), apply(loop, "uniform", {}):
        loop(steps=4)
    with apply(loop, "uniform", {"site": "stack"}):
        loop(steps=4)
