"""A diffusion policy in miniature, of the class name and the layout that public policies have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elision.denoise.engine import DenoiseApplied
from tests.models import draw, randomise


class TransformerForDiffusion(nn.Module):
    """Action chunk [B, horizon, 2] to noise, through pre-norm decoder layers that look at time and observation.

    With `bare`, nothing but the decoder layers, for recorded hidden states.
    """

    def __init__(self, width: int = 8, heads: int = 2, hidden: int = 16, layers: int = 2, bare: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(width, heads, hidden, 0.1, "gelu", batch_first=True, norm_first=True)
        self.embed = nn.Identity() if bare else nn.Linear(2, width)
        self.time = nn.Identity() if bare else nn.Linear(1, width)
        self.observe = nn.Identity() if bare else nn.Linear(4, width)
        self.decoder = nn.TransformerDecoder(layer, layers)
        self.head = nn.Identity() if bare else nn.Linear(width, 2)
        self.bare = bare
        self.causal = False

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        memory = cond
        if not self.bare:
            now = self.time(timestep.reshape(-1, 1, 1).float().expand(len(sample), 1, 1) / 100)
            memory = torch.cat([now, self.observe(cond)], dim=1)
        n = sample.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n) if self.causal else None
        out: Tensor = self.head(self.decoder(self.embed(sample), memory, tgt_mask=mask))
        return out


def policy(layers: int = 2, seed: int = 0) -> TransformerForDiffusion:
    """A policy with random weights."""
    model = TransformerForDiffusion(layers=layers)
    randomise(model, seed)
    return model


@torch.no_grad()
def act(model: nn.Module, run: DenoiseApplied | None = None, steps: int = 12, seed: int = 0) -> Tensor:
    """One action chunk: a few steps of a plain Euler loop from noise, at one observation."""
    del run
    x, cond = draw(2, 6, 2, seed=seed), draw(2, 3, 4, seed=100 + seed)
    for n in range(steps):
        x = x - model(x, torch.tensor(99.0 - 99 * n / steps), cond) / steps
    return x


def counts(model: Any) -> list[list[int]]:
    """Attach counters to the branches; the list holds, per call of the model, which branches were computed."""
    rows: list[list[int]] = []
    tails = [layer.get_submodule(f"dropout{i}") for layer in model.decoder.layers for i in (1, 2, 3)]
    model.register_forward_pre_hook(lambda *_: rows.append([0] * len(tails)))
    for b, tail in enumerate(tails):
        tail.register_forward_hook(lambda *_, b=b: rows[-1].__setitem__(b, rows[-1][b] + 1))
    return rows
