"""`garments-edit` in comparisons: what goes with its instructions, and its judge on samples whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from elision.bench.subject import load_subject
from elision.bench.subjects.garments_edit import EditJudge
from elision.errors import OptionError
from elision.zoo.garments_edit import examples, parse


def test_everything_belongs_to_its_instruction() -> None:
    found = load_subject("garments-edit", batch=4)
    assert (found.kind, found.grids) == ("edit", (28,))
    assert [parse(p) for p in found.prompts] == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert found.references is not None
    assert found.masks is not None
    assert found.references.shape == (4, 1, 32, 64)
    assert torch.equal(found.inputs["image"], found.references)
    assert found.masks[0, :, :32].all()
    assert found.masks[1, :, 32:].all()
    assert found.masks.float().mean() == 0.5


def test_own_instructions_get_canvases() -> None:
    found = load_subject("garments-edit", prompts=["replace the right item by bag", "replace the left item by dress"])
    assert found.masks is not None
    assert found.masks[:, 0, 0].tolist() == [False, True]
    with pytest.raises(OptionError, match="no instruction of this model"):
        load_subject("garments-edit", prompts=["make it blue"])


def test_the_judge_on_canvases_with_a_known_truth() -> None:
    """A canvas with a true item of the class in the edited half follows; one that was not touched does not."""
    found = load_subject("garments-edit")
    edits = examples()
    assert isinstance(found.judge, EditJudge)
    items = {int(c): half for canvas, pair in zip(edits.canvases, edits.items, strict=True)
             for c, half in zip(pair, canvas.chunk(2, -1), strict=True)}  # fmt: skip
    assert found.references is not None
    done = found.references.clone()
    for row, (side, label) in enumerate(map(parse, found.prompts)):
        done[row, ..., 32 * side : 32 * side + 32] = items.get(label, items[0])
    scores = found.judge.scores(done, done, found)
    assert sum(scores["edit followed"]) >= 8
    assert scores["PSNR unedited"] == [100.0] * 10
    untouched = found.judge.scores(found.references, done, found)
    assert sum(untouched["edit followed"]) <= 1
    assert found.judge.features(done).shape == (20, 128)
    damaged = replace(found, references=1 - found.references)
    assert max(found.judge.scores(done, done, damaged)["PSNR unedited"]) < 10
