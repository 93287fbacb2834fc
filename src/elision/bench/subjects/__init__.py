"""What comparisons and claims know of the zoo's models: one file per model, found by itself.

A file of this package holds

    MODEL = "garments-edit"                                      # name in the zoo
    PIPELINE = "elision.zoo.garments_edit:GarmentsEditPipeline"  # class of what `elision.zoo.load` gives

    def subject(name, pipe, prompts=None) -> Subject:
        '''The pipeline with its usual prompts, or with these, and everything that belongs to them.'''

and is light to import: models, data and judges are loaded inside `subject`. `name` is how results call it; it is not
MODEL where the pipeline came from a folder. The `Subject` that is returned says

- **what a sample is**: `kind`. "image" and "edit" pipelines are called with `prompt` (one per image) and return images,
  "video" pipelines return frames [B, F, H, W, C] or [B, F, C, H, W]. `Subject.sample` flattens them to
  [B * F, C, H, W], prompt by prompt, and everything else follows: PSNR and SSIM are means over frames, the report shows
  the frames in order. Other outputs (RGB beside depth) are brought into this form by `read`.
- **what goes with a prompt**: `inputs`, keyword arguments of the call with one entry per prompt, as in
  `{"image": canvases}`; `references` [B, C, H, W], shown beside the prompt in the report: the image to edit; `masks`
  [B, H, W], the true region of an edit or the true foreground, outlined on the reference. All three are cut and
  repeated together with the prompts. With `prompts` given, build them for these prompts or raise `OptionError`.
- **how good it is**: `judge`, an object of a class under `elision.bench.subject.Judge` with any of its four methods.
  Scores are named and higher is better; they become columns of the table, and claims ask for them with
  `Lab.score(method, steps, name)`, `Lab.score_plain` and `Lab.score_gain`.
- **at what cost**: `steps` and `guidance` that the model is usually sampled with; `grids`, the numbers of steps that
  claims are tested at; `auto`, the methods that a comparison runs where none are named.

The *predicted* region of an edit comes from the method: what its run shows in `RunRecord.extra` under "mask", rows of
0 and 1 for the tokens of every image (`elision.bench.measure.regions_of`). The report lays it over the sample, with the
true region outlined and their overlap in numbers.

A policy returns a `Subject` with `kind="policy"`, whose `pipe` is what `elision.bench.policy` works with: that package
gives `compare(subject, specs, ...)` in the place of `compare_denoise`, and `lab(subject, seeds, told)` in the place of
`Lab`.

Experiments (`elision.bench.experiments`) say which model they are written for by `MODEL = "sprites-wan"` in their file;
without it they run on `garments-flux`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from elision.bench.subject import Subject

__all__ = ["Builder", "for_model", "for_pipeline", "models", "pipeline_class"]


class Builder(Protocol):
    """A file of this package."""

    MODEL: str
    PIPELINE: str

    def subject(self, name: str, pipe: Any, prompts: Sequence[Any] | None = None) -> Subject:
        """The pipeline with everything that belongs to it."""
        ...


@functools.cache
def _builders() -> Mapping[str, Builder]:
    found = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {module.MODEL: cast(Builder, module) for module in found}


def models() -> list[str]:
    """Names of the zoo's models that can be compared on."""
    return list(_builders())


def for_model(name: str) -> Builder | None:
    """The builder of a zoo model; None where there is none."""
    return _builders().get(name)


def for_pipeline(name: str) -> Builder | None:
    """The builder for a class of pipelines of the zoo, by the name of the class; None where there is none."""
    return next((b for b in _builders().values() if b.PIPELINE.partition(":")[2] == name), None)


def pipeline_class(builder: Builder) -> Any:
    """The class of a builder's pipelines."""
    module, _, name = builder.PIPELINE.partition(":")
    return getattr(importlib.import_module(module), name)
