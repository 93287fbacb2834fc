"""`garments-flux`: one image per class of Fashion-MNIST, judged by the zoo's classifier."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elision.bench.metrics import Array
from elision.bench.subject import Judge, Subject
from elision.errors import MissingDependency

MODEL = "garments-flux"
PIPELINE = "elision.zoo.garments_flux:GarmentsPipeline"


def subject(name: str, pipe: Any, prompts: Sequence[Any] | None = None) -> Subject:
    """One image per class, or these."""
    from elision.zoo.garments import CLASSES

    classifier = importlib.import_module("elision.zoo").load("garments-classifier")
    return Subject(name, pipe, prompts or CLASSES, 28, 2.0, GarmentsJudge(classifier))


class GarmentsJudge(Judge):
    """Which class the zoo's classifier sees, and its features.

    Args:
        classifier: of images in [-1, 1]; `features` are what is before its last layer.
    """

    def __init__(self, classifier: nn.Module) -> None:
        self.classifier = classifier
        self._missing = False

    @torch.no_grad()
    def scores(self, images: Tensor, reference: Tensor, subject: Subject) -> Mapping[str, Sequence[float]]:
        """Whether the classifier sees the class that was asked for."""
        guess = self.classifier(images * 2 - 1).argmax(-1)
        return {"recognised": guess.eq(subject.pipe.labels(subject.prompts).to(guess.device)).float().tolist()}

    @torch.no_grad()
    def features(self, images: Tensor) -> Array:
        """Features of the classifier."""
        found: Array = self.classifier.features(images * 2 - 1).double().cpu().numpy()  # type: ignore[operator]
        return found

    def real(self) -> Array | None:
        """Features of 2,000 test images, where the data set is installed."""
        from elision.zoo.garments import load_garments

        try:
            images = load_garments("t10k")[0][:2000]
        except MissingDependency:
            self._missing = True
            return None
        return self.features(images * 0.5 + 0.5)

    def notes(self) -> Sequence[str]:
        """Whether the test images are missing."""
        if not self._missing:
            return ()
        return ["The test images are not installed: the feature distance to real images is not reported"]
