"""What is compared on: a pipeline, its prompts, and the classifier that judges its images, if there is one."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from elision.errors import MissingDependency, OptionError, UnknownName, UnsupportedTarget

PROMPTS = (
    "a red fox in the snow",
    "a lighthouse at dusk",
    "a bowl of ripe peaches",
    "an old tram in the rain",
)


@dataclass
class Subject:
    """A pipeline with everything a comparison needs to know about it.

    Attributes:
        name: how results call it.
        pipe: a diffusers pipeline.
        prompts: one per image of a batch.
        steps: what the model is usually sampled with.
        guidance: its usual guidance scale, None to leave the pipeline's default.
        classifier: judges the images; must have `features`. None where there is none.
        labels: the class that each prompt asks for, where there is a classifier.
        arguments: more keyword arguments of the pipeline's call.
    """

    name: str
    pipe: Any
    prompts: Sequence[Any]
    steps: int = 28
    guidance: float | None = None
    classifier: nn.Module | None = None
    labels: Sequence[int] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def sample(self, steps: int, seed: int) -> tuple[Tensor, float]:
        """Images [B, C, H, W] in [0, 1] drawn from the noise of `seed`, and the seconds it took."""
        known = inspect.signature(self.pipe.__call__).parameters
        given: dict[str, Any] = {
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "pt" if _is_image_pipeline(self.pipe) else "np",
            **self.arguments,
        }
        given["class_labels" if "class_labels" in known and "prompt" not in known else "prompt"] = list(self.prompts)
        if self.guidance is not None:
            given["guidance_scale"] = self.guidance
        unknown = [key for key in given if key not in known]
        if unknown:
            raise UnsupportedTarget(
                f"{type(self.pipe).__name__} has no argument {', '.join(unknown)}: "
                "compare needs a pipeline that is called with a prompt, a number of steps and a generator"
            )
        _wait()
        started = perf_counter()
        out = self.pipe(**given)
        _wait()
        return images_of(out), perf_counter() - started


def _is_image_pipeline(pipe: Any) -> bool:
    return not hasattr(pipe, "video_processor")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def images_of(output: Any) -> Tensor:
    """The images of a pipeline's output as [B, C, H, W] in [0, 1]; the frames of a video become images of the batch."""
    value = getattr(output, "images", None)
    if value is None:
        value = getattr(output, "frames", None)
    if value is None:
        raise UnsupportedTarget(
            f"{type(output).__name__} has neither images nor frames, so there is nothing to compare"
        )
    if isinstance(value, list):
        value = torch.stack([torch.as_tensor(v) for v in value])
    tensor = torch.as_tensor(value).detach().float().cpu()
    if tensor.ndim == 5:  # [B, F, H, W, C] or [B, F, C, H, W]
        tensor = tensor.flatten(0, 1)
    if tensor.shape[-1] in (1, 3) and tensor.shape[1] not in (1, 3):
        tensor = tensor.permute(0, 3, 1, 2)
    return tensor.clamp(0, 1)


def load_subject(
    model: Any,
    *,
    prompts: Sequence[Any] | None = None,
    batch: int | None = None,
    guidance: float | None = None,
    arguments: dict[str, Any] | None = None,
) -> Subject:
    """A subject from a zoo name, a hub id, a local path, a loaded pipeline, or a `Subject` (changed as asked).

    Args:
        model: what to compare on.
        prompts: one per image; by default the model's classes, or a few sentences.
        batch: images per run; prompts are repeated or cut to this number.
        guidance: guidance scale.
        arguments: more keyword arguments of the pipeline's call.
    """
    subject = model if isinstance(model, Subject) else _load(model)
    chosen = list(prompts) if prompts else list(subject.prompts)
    if batch is not None:
        if batch < 1:
            raise OptionError(f"batch={batch} is out of range; it must be at least 1")
        chosen = [chosen[i % len(chosen)] for i in range(batch)]
    labels = subject.labels
    if subject.classifier is not None and hasattr(subject.pipe, "labels"):
        labels = subject.pipe.labels(chosen).tolist()
    elif chosen != list(subject.prompts):
        labels = None
    return Subject(
        subject.name,
        subject.pipe,
        chosen,
        subject.steps,
        subject.guidance if guidance is None else guidance,
        subject.classifier,
        labels,
        {**subject.arguments, **(arguments or {})},
    )


def _load(model: Any) -> Subject:
    if not isinstance(model, str):
        subject = _wrap(type(model).__name__, model)
    elif not Path(model).exists() and "/" not in model:
        subject = _from_zoo(model)
    else:
        # only the last part of a path: results must not tell where files lie
        name = Path(model).resolve().name if Path(model).exists() else model
        subject = _wrap(name, _from_pretrained(model))
    if hasattr(subject.pipe, "set_progress_bar_config"):
        subject.pipe.set_progress_bar_config(disable=True)
    return subject


def _wrap(name: str, pipe: Any) -> Subject:
    if type(pipe).__name__ == "GarmentsPipeline":
        return _garments(name, pipe)
    if not callable(pipe) or isinstance(pipe, nn.Module):
        raise UnsupportedTarget(f"{type(pipe).__name__} is no pipeline: compare needs one that draws images")
    known = inspect.signature(pipe.__call__).parameters
    classes = "class_labels" in known and "prompt" not in known
    return Subject(name, pipe, [207, 360, 387, 974] if classes else PROMPTS)


def _from_pretrained(where: str) -> Any:
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise MissingDependency("diffusers is not installed: pip install 'elision[diffusers]'") from error
    if _holds_garments(where):
        return _load_garments(where)
    try:
        pipe = DiffusionPipeline.from_pretrained(where)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UnknownName(f"{where!r} is neither a zoo model nor a pipeline that can be loaded: {reason}") from error
    return pipe.to("cuda") if torch.cuda.is_available() else pipe


def _holds_garments(where: str) -> bool:
    """Whether a folder holds a pipeline of the zoo's own class, which diffusers alone could not find."""
    index = Path(where) / "model_index.json"
    return index.is_file() and json.loads(index.read_text()).get("_class_name") == "GarmentsPipeline"


def _load_garments(where: str) -> Any:
    from elision.zoo.garments_flux import GarmentsPipeline

    if any(Path(where, "transformer").glob("*.fp16.safetensors")):  # as `elision zoo train` writes it
        return importlib.import_module("elision.zoo").load("garments-flux", folder=where)
    return GarmentsPipeline.from_pretrained(where)


def _garments(name: str, pipe: Any) -> Subject:
    from elision.zoo.garments import CLASSES

    classifier = importlib.import_module("elision.zoo").load("garments-classifier")
    return Subject(name, pipe, CLASSES, 28, 2.0, classifier, list(range(len(CLASSES))))


def _from_zoo(name: str) -> Subject:
    pipe = importlib.import_module("elision.zoo").load(name)
    if type(pipe).__name__ != "GarmentsPipeline":
        raise UnsupportedTarget(f"{name} draws no images: compare on a pipeline of the zoo, such as 'garments-flux'")
    return _garments(name, pipe)
