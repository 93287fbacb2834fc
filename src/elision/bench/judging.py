"""Applies to finished arms the metrics that a subject allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elision.bench import metrics
from elision.bench.subject import Subject

if TYPE_CHECKING:
    from elision.bench.summary import Arm


class Judging:
    """Distances from the uncached samples, and what the subject's judge says."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.lpips, self._note = metrics.lpips_metric()
        self._real = None if subject.judge is None else subject.judge.real()
        self._width = 0

    @torch.no_grad()
    def judge(self, arm: Arm, images: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
        """Fill in the quality of every sample of `arm`."""
        judge = self.subject.judge
        for sample, mine, truth in zip(arm.samples, images, reference, strict=True):
            sample.psnr = metrics.psnr(mine, truth)
            sample.ssim = metrics.ssim(mine, truth)
            if self.lpips is not None:
                sample.lpips = self.lpips(mine, truth)
            if judge is not None:
                given = judge.scores(mine, truth, self.subject)
                sample.scores = {name: list(values) for name, values in given.items()}
        if judge is None or sum(len(x) for x in images) < 3:
            return
        mine_features = [f for f in map(judge.features, images) if f is not None]
        if len(mine_features) != len(images):
            return
        self._width = int(mine_features[0].shape[1])
        arm.distance = arm.measure(mine_features, [f for f in map(judge.features, reference) if f is not None])
        if self._real is not None:
            arm.distance_real = arm.measure(mine_features, [self._real])

    def notes(self, drawn: int) -> list[str]:
        """What is missing and why, and how far the numbers reach."""
        found = [self._note] if self._note else []
        if self.subject.judge is None:
            return [*found, "Nothing judges this model's samples: feature distance and scores are not reported"]
        if drawn < 2 * self._width:
            found.append(
                f"Feature distances come from {drawn} samples and {self._width} features: they rank the rows of this "
                "table and cannot be compared with other sample sizes"
            )
        return [*found, *self.subject.judge.notes()]
