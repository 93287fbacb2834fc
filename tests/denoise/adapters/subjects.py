"""Denoiser classes under test: a tiny random model of each, and a sampling loop that calls it as diffusers does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import Inputs, Kind, Loop, draw

Invoke = Callable[[nn.Module, Tensor, Tensor, Inputs], Any]


def invoke(model: nn.Module, x: Tensor, time: Tensor, inputs: Inputs) -> Any:
    """The usual call: latent first, everything else by name."""
    return model(x, timestep=time, return_dict=False, **inputs)[0]


def image(batch: int, size: int) -> tuple[int, ...]:
    """[B, C, H, W]."""
    return (batch, 4, size, size)


def video(batch: int, size: int) -> tuple[int, ...]:
    """[B, C, F, H, W]."""
    return (batch, 4, 2, size, size)


def text(batch: int, seed: int, tokens: int = 3, width: int = 8) -> Tensor:
    """One prompt [1, L, D] for all rows of a batch."""
    return draw(1, tokens, width, seed=seed + 1).repeat(batch, 1, 1)


@dataclass(frozen=True)
class Subject(Kind):
    """A class under test.

    Attributes:
        invoke: one call of the model; returns its prediction.
        uncounted: why its FLOPs cannot be counted without data, empty where they can.
        guidance: how diffusers' pipelines call it: guidance in two named calls, in two unnamed ones, in one call, or
            none.
    """

    invoke: Invoke = invoke
    uncounted: str = ""
    guidance: str = "one call"


class ClassLoop(Loop):
    """The miniature pipeline around a subject."""

    kind: Subject

    def __init__(self, subject: Subject, scheduler: Any = None, seed: int = 0) -> None:
        super().__init__("dit", scheduler, nn.Identity())
        self.kind = subject
        self.transformer = subject.make(seed)

    def call(self, x: Tensor, t: Tensor, inputs: Inputs, **more: Any) -> Tensor:
        """One call of the denoiser; the prediction without its variance."""
        self.called += 1
        time = (t / self.kind.scale).expand(len(x))
        if self.kind.extra:
            shape = (len(x), self.kind.extra, *x.shape[2:])
            x = torch.cat([x, draw(1, *shape[1:], seed=77).expand(shape)], dim=1)
        drawn = x.shape[1]
        if self.kind.edits:
            x = torch.cat([x, self.picture(drawn).repeat(len(x), 1, 1)], dim=1)
        out: Tensor = self.kind.invoke(self.model, x, time, {**inputs, **more})
        out = out[:, :drawn] if self.kind.edits else out
        return out.chunk(2, dim=1)[0] if self.kind.variance else out

    def name(self, branch: str) -> AbstractContextManager[Any]:
        """Diffusers' context of a guidance branch, where the class has them."""
        return super().name(branch) if hasattr(self.model, "cache_context") else contextlib.nullcontext()
