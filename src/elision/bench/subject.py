"""What is compared on: a pipeline, its prompts and what goes with them, and the judge of what it draws."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from elision.errors import MissingDependency, OptionError, UnknownName, UnsupportedTarget

if TYPE_CHECKING:
    from elision.bench.metrics import Array

PROMPTS = (
    "a red fox in the snow",
    "a lighthouse at dusk",
    "a bowl of ripe peaches",
    "an old tram in the rain",
)
Kind = Literal["image", "video", "edit", "policy"]


class Judge:
    """Says how good samples are, beyond their distance from the uncached ones. Every part is optional.

    Samples are [N, C, H, W] in [0, 1], as `Subject.sample` gives them; of a video, N counts frames, prompt by prompt.
    """

    def scores(self, images: Tensor, reference: Tensor, subject: Subject) -> Mapping[str, Sequence[float]]:
        """Named scores, higher is better: of each a number for every prompt, in the order of the prompts.

        A name becomes a column of the table, so it is short: "recognised", "edit followed", "PSNR unedited".

        Args:
            images: of one run.
            reference: what the uncached run drew from the same noise.
            subject: whose `prompts`, `references` and `masks` say what was asked for.
        """
        del images, reference, subject
        return {}

    def features(self, images: Tensor) -> Array | None:
        """Features [M, D] for the Fréchet distance, M rows for N images; None where there are none."""
        del images
        return None

    def real(self) -> Array | None:
        """Features of real samples, of the same kind; None where there are none at hand."""
        return None

    def notes(self) -> Sequence[str]:
        """What is missing and why."""
        return ()


@dataclass
class Subject:
    """A pipeline with everything a comparison needs to know about it.

    Attributes:
        name: how results call it.
        pipe: a diffusers pipeline.
        prompts: one per image (or video) of a batch.
        steps: what the model is usually sampled with.
        guidance: its usual guidance scale, None to leave the pipeline's default.
        judge: of the samples; None where there is none.
        arguments: more keyword arguments of the pipeline's call.
        kind: what a sample is. A "policy" is compared by `elision.bench.policy`; see `elision.bench.subjects`.
        inputs: keyword arguments of the call with one entry for every prompt, such as the images to edit.
        references: [B, C, H, W] in [0, 1], what the report shows beside each prompt: the image to edit.
        masks: [B, H, W] bool, where an edit should change the image, or where the foreground is.
        grids: numbers of steps at which claims are tested.
        read: makes images [N, C, H, W] of the pipeline's output; by default `images_of`.
        auto: methods that a comparison runs where none are named; by default those of `compare_denoise`.
    """

    name: str
    pipe: Any
    prompts: Sequence[Any]
    steps: int = 28
    guidance: float | None = None
    judge: Judge | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    kind: Kind = "image"
    inputs: dict[str, Any] = field(default_factory=dict)
    references: Tensor | None = None
    masks: Tensor | None = None
    grids: tuple[int, ...] = (28, 50)
    read: Callable[[Any], Tensor] | None = None
    auto: Sequence[str] = ()

    def sample(self, steps: int, seed: int) -> tuple[Tensor, float]:
        """Images [N, C, H, W] in [0, 1] drawn from the noise of `seed`, and the seconds it took.

        Videos are sequences of frames: N is the number of prompts times that of frames.
        """
        known = inspect.signature(self.pipe.__call__).parameters
        given: dict[str, Any] = {
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "pt" if _is_image_pipeline(self.pipe) else "np",
            **self.inputs,
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
        return (self.read or images_of)(out), perf_counter() - started

    def take(self, chosen: Sequence[int]) -> Subject:
        """The same with these of its prompts, and with what belongs to them."""

        def some(values: Any) -> Any:
            return values[list(chosen)] if isinstance(values, Tensor) else [values[i] for i in chosen]

        return replace(
            self,
            prompts=some(self.prompts),
            inputs={key: some(values) for key, values in self.inputs.items()},
            references=None if self.references is None else some(self.references),
            masks=None if self.masks is None else some(self.masks),
        )

    def asked(self, prompts: Sequence[Any]) -> Subject:
        """The same with other prompts; where something belongs to each prompt, they must be among its own."""
        if not (self.inputs or self.references is not None or self.masks is not None):
            return replace(self, prompts=list(prompts))
        known = list(self.prompts)
        strange = [prompt for prompt in prompts if prompt not in known]
        if strange:
            raise OptionError(
                f"{self.name} has no inputs for the prompt {strange[0]!r}; prompts: {', '.join(map(str, known))}"
            )
        return self.take([known.index(prompt) for prompt in prompts])


def _is_image_pipeline(pipe: Any) -> bool:
    return not hasattr(pipe, "video_processor")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def images_of(output: Any) -> Tensor:
    """The images of a pipeline's output as [N, C, H, W] in [0, 1]; the frames of a video become images of the batch."""
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
    if isinstance(model, Subject):
        subject = model.asked(prompts) if prompts else model
    else:
        subject = _load(model, prompts or None)
    if batch is not None:
        if batch < 1:
            raise OptionError(f"batch={batch} is out of range; it must be at least 1")
        subject = subject.take([i % len(subject.prompts) for i in range(batch)])
    return replace(
        subject,
        prompts=list(subject.prompts),
        guidance=subject.guidance if guidance is None else guidance,
        arguments={**subject.arguments, **(arguments or {})},
    )


def _load(model: Any, prompts: Sequence[Any] | None) -> Subject:
    if not isinstance(model, str):
        subject = _wrap(type(model).__name__, model, prompts)
    elif not Path(model).exists() and "/" not in model:
        subject = _from_zoo(model, prompts)
    else:
        # only the last part of a path: results must not tell where files lie
        name = Path(model).resolve().name if Path(model).exists() else model
        subject = _wrap(name, _from_pretrained(model), prompts)
    if hasattr(subject.pipe, "set_progress_bar_config"):
        subject.pipe.set_progress_bar_config(disable=True)
    return subject


def _wrap(name: str, pipe: Any, prompts: Sequence[Any] | None) -> Subject:
    from elision.bench import subjects

    builder = subjects.for_pipeline(type(pipe).__name__)
    if builder is not None:
        return builder.subject(name, pipe, prompts)
    if not callable(pipe) or isinstance(pipe, nn.Module):
        raise UnsupportedTarget(f"{type(pipe).__name__} is no pipeline: compare needs one that draws images")
    known = inspect.signature(pipe.__call__).parameters
    classes = "class_labels" in known and "prompt" not in known
    kind: Kind = "image" if _is_image_pipeline(pipe) else "video"
    return Subject(name, pipe, prompts or ([207, 360, 387, 974] if classes else PROMPTS), kind=kind)


def _from_pretrained(where: str) -> Any:
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise MissingDependency("diffusers is not installed: pip install 'elision[diffusers]'") from error
    mine = _of_the_zoo(where)
    if mine is not None:
        return mine
    try:
        pipe = DiffusionPipeline.from_pretrained(where)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UnknownName(f"{where!r} is neither a zoo model nor a pipeline that can be loaded: {reason}") from error
    return pipe.to("cuda") if torch.cuda.is_available() else pipe


def _of_the_zoo(where: str) -> Any:
    """A pipeline of one of the zoo's own classes, which diffusers alone could not find; None for others."""
    from elision.bench import subjects

    index = Path(where) / "model_index.json"
    builder = subjects.for_pipeline(json.loads(index.read_text()).get("_class_name", "")) if index.is_file() else None
    if builder is None:
        return None
    if any(Path(where).glob("*/*.fp16.safetensors")):  # as `elision zoo train` writes it
        return importlib.import_module("elision.zoo").load(builder.MODEL, folder=where)
    return subjects.pipeline_class(builder).from_pretrained(where)


def _from_zoo(name: str, prompts: Sequence[Any] | None) -> Subject:
    from elision.bench import subjects

    builder = subjects.for_model(name)
    pipe = importlib.import_module("elision.zoo").load(name)
    if builder is None:
        raise UnsupportedTarget(f"{name} draws no images: compare on one of {', '.join(subjects.models())}")
    return builder.subject(name, pipe, prompts)
