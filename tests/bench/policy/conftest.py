"""A policy with random weights, and a world without a simulator: everything is real but the robot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from elision.bench.policy.subject import PolicySubject
from elision.zoo.metaworld import TASKS
from elision.zoo.metaworld_policy import PolicyPipeline, TransformerForDiffusion, scheduler


class Plane:
    """A hand that moves as it is told; solved once it is far enough from where it began."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.state = np.zeros(14, np.float32)
        self.reach = 0.0

    def reset(self, seed: int) -> Any:
        rng = np.random.default_rng([seed, TASKS.index(self.task)])
        self.state = rng.uniform(-0.3, 0.3, 14).astype(np.float32)
        self.start = self.state[:3].copy()
        self.reach = float(rng.uniform(0.02, 0.2))
        return self.state.copy()

    def step(self, action: Any) -> tuple[Any, bool]:
        assert action.shape == (4,)
        self.state[:3] += 0.02 * action[:3]
        return self.state.copy(), bool(np.linalg.norm(self.state[:3] - self.start) > self.reach)


def small_pipeline() -> PolicyPipeline:
    torch.manual_seed(0)
    model = TransformerForDiffusion(width=16, layers=2, heads=2, hidden=32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3 if "decoder" in name else 0.15)
    pipe = PolicyPipeline(model, scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def subject() -> PolicySubject:
    return PolicySubject("random-policy", small_pipeline(), TASKS[:2], Plane, steps=10, limit=24, together=3)
