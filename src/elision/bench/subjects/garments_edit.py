"""`garments-edit`: instructions on two-garment canvases; the edited half is known, and so is what must stay."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elision.bench.metrics import Array, psnr
from elision.bench.subject import Subject
from elision.bench.subjects.garments import GarmentsJudge

MODEL = "garments-edit"
PIPELINE = "elision.zoo.garments_edit:GarmentsEditPipeline"
COUNT = 10  # by default one edit per class, left and right in turn


def subject(name: str, pipe: Any, prompts: Sequence[Any] | None = None) -> Subject:
    """Ten of the edits that ship with the package, or these instructions on its canvases."""
    from elision.zoo import garments_edit as edit

    examples = edit.examples()
    edits = examples.pick([i + COUNT * (i % 2) for i in range(COUNT)]) if prompts is None else examples.asked(prompts)
    right = (torch.arange(edit.WIDTH) >= edit.WIDTH // 2).expand(edit.HEIGHT, -1)
    classifier = importlib.import_module("elision.zoo").load("garments-classifier")
    return Subject(
        name,
        pipe,
        edits.prompts(),
        steps=28,
        guidance=edit.GUIDANCE,
        judge=EditJudge(classifier),
        kind="edit",
        inputs={"image": edits.canvases},
        references=edits.canvases,
        masks=torch.stack([right if side else ~right for side in edits.sides.tolist()]),
        grids=(28,),
    )


class EditJudge(GarmentsJudge):
    """Whether the new item is what was asked for, and how well the other half is kept."""

    @torch.no_grad()
    def scores(self, images: Tensor, reference: Tensor, subject: Subject) -> Mapping[str, Sequence[float]]:
        """The classifier on the edited half, and the PSNR of the other half against the canvas that is edited."""
        from elision.zoo.garments_edit import halves, parse

        assert subject.references is not None
        sides, labels = torch.tensor([parse(prompt) for prompt in subject.prompts]).unbind(1)
        new, kept = halves(images, sides)
        guess = self.classifier(new * 2 - 1).argmax(-1)
        return {
            "edit followed": guess.eq(labels).float().tolist(),
            "PSNR unedited": psnr(kept, halves(subject.references, sides)[1]),
        }

    def features(self, images: Tensor) -> Array:
        """Features of both halves of every canvas."""
        return super().features(torch.cat(images.chunk(2, dim=-1)))
