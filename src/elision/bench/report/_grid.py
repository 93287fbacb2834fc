"""The samples of a comparison as rows of pictures: images, videos, and edits with the region that a method saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elision.bench.report._images import (
    difference,
    difference_uri,
    moving_uri,
    ramp_uri,
    region_uri,
    sample_uri,
    sheet,
)
from elision.bench.summary import Arm, Comparison


@dataclass
class Picture:
    """One picture of a cell; `form` is a class of the page's style."""

    uri: str
    alt: str
    form: str = "still"


@dataclass
class Line:
    """A row of the samples: its heading, and the pictures of each cell.

    Attributes:
        role: "sample", "difference", "region" or "reference".
        kind: of the arm.
        label: heading, which may break after colons and commas.
        note: below it.
        cells: one for every prompt.
    """

    role: str
    kind: str
    label: str
    note: str = ""
    cells: list[list[Picture]] = field(default_factory=list)


def grid(comparison: Comparison, arms: Sequence[Arm]) -> dict[str, Any]:
    """Headings and lines of the first seed's samples; empty where a comparison was read from a file."""
    truth = arms[0].images
    if truth is None:
        return {}
    whole = _apart(truth, comparison.frames)
    prompts = comparison.prompts[: len(whole)]
    lines = _references(comparison, prompts)
    for arm in arms:
        if arm.images is not None:
            lines += _lines(comparison, arm, prompts, _apart(arm.images, comparison.frames), whole)
    return {"captions": prompts, "lines": lines, "video": comparison.frames > 1, "edit": comparison.kind == "edit"}


def _apart(images: Tensor, frames: int) -> Tensor:
    """[B, F, C, H, W]: the frames of each sample; an image is one frame."""
    return images.reshape(-1, frames, *images.shape[1:])


def _references(comparison: Comparison, prompts: Sequence[str]) -> list[Line]:
    """What is edited, with the true region outlined; nothing where there is none."""
    given, masks = comparison.references, comparison.masks
    if given is None:
        return []
    cells = [
        [Picture(region_uri(given[i], None, None if masks is None else masks[i]), f"{prompt}: the image to edit")]
        for i, prompt in enumerate(prompts)
    ]
    note = "" if masks is None else "outlined: where it should change"
    return [Line("reference", "baseline", "to edit", note, cells)]


def _lines(comparison: Comparison, arm: Arm, prompts: Sequence[str], mine: Tensor, truth: Tensor) -> list[Line]:
    sample = arm.samples[0]
    note = f"{sample.steps_computed:.3g} of {arm.steps} steps computed"
    lines = [Line("sample", arm.kind, arm.label, note)]
    lines[0].cells = [_drawn(x, f"{prompt}, drawn by {arm.label}") for x, prompt in zip(mine, prompts, strict=True)]
    if arm.regions is not None:
        lines.append(_regions(comparison, arm, prompts, mine))
    if arm.kind != "baseline":
        told = f"difference of {arm.label} from the uncached {'video' if comparison.frames > 1 else 'image'}"
        cells = [_difference(x, y, f"{p}: {told}") for x, y, p in zip(mine, truth, prompts, strict=True)]
        lines.append(Line("difference", arm.kind, "", "", cells))
    return lines


def _drawn(frames: Tensor, alt: str) -> list[Picture]:
    if len(frames) == 1:
        return [Picture(sample_uri(frames[0]), alt)]
    moving = Picture(moving_uri(frames), alt, "moving")
    return [moving, Picture(sample_uri(sheet(frames)), f"{alt}: frames in order", "sheet")]


def _difference(frames: Tensor, truth: Tensor, alt: str) -> list[Picture]:
    if len(frames) == 1:
        return [Picture(difference_uri(frames[0], truth[0]), alt)]
    each = torch.stack([difference(x, y) for x, y in zip(frames, truth, strict=True)])
    return [Picture(ramp_uri(sheet(each)), alt, "sheet")]


def _regions(comparison: Comparison, arm: Arm, prompts: Sequence[str], mine: Tensor) -> Line:
    """What the method took for edited, over its own sample."""
    assert arm.regions is not None
    line = Line("region", arm.kind, "", "")
    overlaps: list[float] = []
    for i, prompt in enumerate(prompts):
        region = arm.regions[i]
        truth = None if comparison.masks is None else comparison.masks[i]
        alt = f"{prompt}: {arm.label} takes {int(region.sum())} of {region.numel()} tokens for edited"
        if truth is not None:
            overlaps.append(overlap(region, truth))
            alt += f", overlap with the true region {overlaps[-1]:.2f}"
        line.cells.append([Picture(region_uri(mine[i, 0], region, truth), alt)])
    line.note = f"overlap with the true region {sum(overlaps) / len(overlaps):.2f}" if overlaps else ""
    return line


def overlap(region: Tensor, truth: Tensor) -> float:
    """Intersection over union of a region [h, w] of tokens and a true one [H, W] of pixels; 1 if both are empty."""
    size = list(truth.shape)
    mine = torch.nn.functional.interpolate(region[None, None].float(), size=size, mode="nearest")[0, 0] > 0.5
    union = int((mine | truth).sum())
    return int((mine & truth).sum()) / union if union else 1.0
