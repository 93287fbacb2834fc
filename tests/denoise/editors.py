"""A network of known velocities in an editing loop, and RegionE at work on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

import elision
from elision.denoise.engine import DenoiseApplied


class Table(FluxTransformer2DModel):  # type: ignore[misc]
    """Velocities from a function of the step and the tokens that the network is given, by their positions."""

    def __init__(self, velocity: Callable[[float, Tensor, Tensor], Tensor], width: int) -> None:
        nn.Module.__init__(self)
        self.transformer_blocks = nn.ModuleList()
        self.single_transformer_blocks = nn.ModuleList()
        self.velocity, self.width = velocity, width
        self.calls: list[tuple[float, int]] = []

    def forward(  # type: ignore[no-untyped-def]
        self, hidden_states, encoder_hidden_states=None, timestep=None, img_ids=None, txt_ids=None, return_dict=True
    ):
        noise = img_ids[:, 0] == 0
        where = (img_ids[:, 1] * self.width + img_ids[:, 2]).long()[noise]
        self.calls.append((float(timestep[0]), int(noise.sum())))
        out = torch.zeros_like(hidden_states)
        out[:, noise] = self.velocity(float(timestep[0]), where, hidden_states[:, noise])
        return (out,)


class Editor:
    """An editing pipeline in miniature around any Flux-like denoiser; returns the latents after every step."""

    def __init__(
        self, model: nn.Module, x: Tensor, ref: Tensor, grid: tuple[int, int], sigmas: Any, **call: Any
    ) -> None:
        self.transformer, self.scheduler = model, FlowMatchEulerDiscreteScheduler()
        self.x, self.ref, self.sigmas, self.call = x, ref, sigmas, call
        sides = [torch.arange(n).float() for n in (2, *grid)]
        self.ids = torch.cartesian_prod(*sides)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        x, seen = self.x, []
        self.scheduler.set_timesteps(sigmas=[float(s) for s in self.sigmas[:-1]])
        for t in self.scheduler.timesteps:
            v = self.transformer(
                hidden_states=torch.cat([x, self.ref], 1),
                timestep=(t / 1000).expand(1),
                img_ids=self.ids,
                return_dict=False,
                **self.call,
            )[0][:, : x.shape[1]]
            x = self.scheduler.step(v, t, x, return_dict=False)[0]
            seen.append(x)
        return torch.cat(seen)


def applied(target: Any, **options: Any) -> DenoiseApplied:
    run = elision.apply(target, "regione", **options)
    assert isinstance(run, DenoiseApplied)
    return run
