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


def _optimizers(module: nn.Module, lr: float, weight_decay: float, muon: float | None) -> list[torch.optim.Optimizer]:
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in module.parameters() if muon is not None and p.ndim == 2 and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    others = [p for p in module.parameters() if id(p) not in chosen]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    ]
    if muon is not None:
        found.append(torch.optim.Muon(matrices, lr=muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return found


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
    muon: float | None = None,
    keep: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Minimise `loss(step)` with AdamW, gradient clipping and a cosine schedule; returns the averaged module.

    With `muon`, matrices other than embeddings take orthogonalised steps of that learning rate instead of AdamW's.
    `keep(steps done, averaged module)` is called with every line of progress, so that long recipes can store it.
    """
    optimizers = _optimizers(module, lr, weight_decay, muon)
    highest = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    ema = Ema(module, decay)
    started, running = time.perf_counter(), 0.0
    for step in range(steps):
        for group, top in highest:
            group["lr"] = top * cosine(step, steps, warmup)
        value = loss(step)
        module.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(module)
        running += value.item()
        if (step + 1) % every == 0:
            spent = time.perf_counter() - started
            print(f"step {step + 1}/{steps}  loss {running / every:.4f}  {spent:.0f} s", file=sys.stderr, flush=True)
            running = 0.0
            if keep is not None:
                keep(step + 1, ema.module)
    return ema.module
