"""What every zoo recipe shares: a cosine schedule, an exponential moving average, one training loop."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


def cosine(step: int, total: int, warmup: int, floor: float = 0.01) -> float:
    """Learning-rate factor at `step`: linear warm-up, then a half cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Ema:
    """Exponential moving average of a module's parameters; young averages forget faster."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for ours, theirs in zip(self.module.parameters(), module.parameters(), strict=True):
            ours.lerp_(theirs, 1 - decay)


def fit(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    decay: float = 0.999,
    weight_decay: float = 0.01,
    warmup: int = 100,
    every: int = 100,
) -> nn.Module:
    """Minimise `loss(step)` with AdamW, gradient clipping and a cosine schedule; returns the averaged module."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    ema = Ema(module, decay)
    started, running = time.perf_counter(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps, warmup)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        ema.update(module)
        running += value.item()
        if (step + 1) % every == 0:
            spent = time.perf_counter() - started
            print(f"step {step + 1}/{steps}  loss {running / every:.4f}  {spent:.0f} s", file=sys.stderr, flush=True)
            running = 0.0
    return ema.module
