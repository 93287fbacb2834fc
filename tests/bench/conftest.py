"""A garment pipeline with random weights: everything about it is real but the pictures."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from elision.bench.subject import Subject
from elision.bench.subjects.garments import GarmentsJudge
from elision.zoo.garments import GarmentsClassifier
from elision.zoo.garments_flux import CONFIG, GarmentsPipeline


def small_pipeline() -> GarmentsPipeline:
    torch.manual_seed(0)
    config = {**CONFIG, "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2}
    model = FluxTransformer2DModel(**config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    pipe = GarmentsPipeline(model, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_classifier() -> GarmentsClassifier:
    torch.manual_seed(1)
    return GarmentsClassifier(width=4).eval()


@pytest.fixture(scope="session")
def subject() -> Subject:
    prompts = ["bag", "coat", "sneaker"]
    return Subject("random-flux", small_pipeline(), prompts, 10, 2.0, GarmentsJudge(small_classifier()))


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo's loader, giving small random models."""
    import elision.zoo
    from elision.errors import MissingDependency, UnknownName

    def load(name: str, folder: object = None) -> object:
        if name == "garments-flux":
            return small_pipeline()
        if name == "garments-classifier":
            return small_classifier()
        if name == "smollm2":
            raise MissingDependency("smollm2 comes in a package that is not installed")
        raise UnknownName.of("zoo model", name, ["garments-flux", "garments-classifier"])

    monkeypatch.setattr(elision.zoo, "load", load)
    monkeypatch.setattr(elision.zoo, "names", lambda: dict.fromkeys(("garments-flux", "garments-classifier"), "small"))
    monkeypatch.setattr(elision.zoo, "card", lambda name: {"name": name, "quality": {"samples": 7, "by": {}}})
    monkeypatch.setattr(elision.zoo, "check", lambda name: {"accuracy": 0.91234, "images": 1000})
