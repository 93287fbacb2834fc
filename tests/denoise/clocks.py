"""A network that tells what it was called with, and a pipeline of nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

import elision
from elision.denoise.engine import DenoiseApplied
from elision.denoise.fit._record import _Recorder
from elision.denoise.policy import Host
from elision.denoise.sites import Call, Site
from elision.denoise.steps import Step


class Net(nn.Module):
    """A denoiser that costs nothing, with diffusers' contexts."""

    def forward(self, hidden_states: Tensor, timestep: Tensor | None = None) -> Tensor:
        return 0.1 * hidden_states

    @contextlib.contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        yield


@contextlib.contextmanager
def watched(target: Any, **settings: Any) -> Iterator[tuple[DenoiseApplied, list[Step]]]:
    """A session that computes everything and lists the step of every call."""
    steps: list[Step] = []

    def seen(host: Host, step: Step, site: Site, call: Call, out: Tensor) -> None:
        steps.append(step)

    with elision.apply(target, _Recorder("model", seen), **settings) as run:
        assert isinstance(run, DenoiseApplied)
        yield run, steps


def ns(steps: Sequence[Step]) -> list[tuple[int, int]]:
    return [(s.run, s.n) for s in steps]
