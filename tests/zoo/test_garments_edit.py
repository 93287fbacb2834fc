"""The editor: packing, instructions, its layout against diffusers' Kontext, the shipped weights and their recipe."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel

from elision import zoo
from elision.errors import OptionError
from elision.zoo import garments_edit as edit
from elision.zoo.garments import CLASSES, accuracy
from elision.zoo.garments_edit import Edits, GarmentsEditPipeline

needs_data = pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").exists(), reason="needs Debian's dataset-fashion-mnist"
)


@pytest.fixture(scope="module")
def pipe() -> GarmentsEditPipeline:
    return zoo.load("garments-edit")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def edits() -> Edits:
    return edit.examples()


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 128, 16, generator=torch.Generator().manual_seed(seed))


def test_packing_is_undone() -> None:
    images = torch.randn(3, 1, 32, 64)
    tokens = edit.pack(images)
    assert torch.equal(edit.unpack(tokens), images)
    assert torch.equal(tokens[0, 17].reshape(4, 4), images[0, 0, 4:8, 4:8])


def test_the_edit_mask_is_the_half_in_tokens() -> None:
    canvas = torch.zeros(2, 1, 32, 64)
    canvas[0, ..., :32] = canvas[1, ..., 32:] = 1
    assert torch.equal(edit.pack(canvas).bool().all(-1), edit.edited(torch.tensor([0, 1])))


def test_instructions_are_read_as_they_are_written() -> None:
    for side in (0, 1):
        for label in range(len(CLASSES) + 1):
            assert edit.parse(edit.instruction(side, label)) == (side, label)
    assert edit.parse("Replace the right item with an ankle boot.") == (1, 9)
    for wrong in ("make it red", "replace the upper item by coat", "replace the left item by hat", ""):
        with pytest.raises(OptionError, match="replace the left item by coat"):
            edit.parse(wrong)


def test_positions_are_those_of_kontext() -> None:
    """Noise tokens first, then the reference at the same places with 1 as first coordinate."""
    ids = edit.condition(torch.tensor([0]), torch.tensor([1]))["img_ids"]
    prepare = FluxKontextPipeline._prepare_latent_image_ids
    noise_ids = prepare(1, edit.ROWS, edit.COLUMNS, "cpu", torch.float32)
    reference_ids = prepare(1, edit.ROWS, edit.COLUMNS, "cpu", torch.float32)
    reference_ids[..., 0] = 1
    assert torch.equal(ids, torch.cat([noise_ids, reference_ids]))


def test_it_samples_as_a_plain_loop_does(pipe: GarmentsEditPipeline, edits: Edits) -> None:
    """Euler steps of the guided velocity, written out."""
    x, scale, steps = noise(2), 1.5, 3
    reference = edit.pack(edits.canvases[:2] * 2 - 1)
    sides, labels = edits.sides[:2], edits.labels[:2]
    conditions = [edit.condition(sides, torch.full_like(labels, 10)), edit.condition(sides, labels)]
    levels = [1.0, 2 / 3, 1 / 3, 0.0]
    with torch.no_grad():
        for now, after in itertools.pairwise(levels):
            both = torch.cat([x, reference], 1)
            time = torch.full((2,), now)
            outs = [pipe.transformer(both, timestep=time, return_dict=False, **c)[0][:, :128] for c in conditions]
            x = x + (after - now) * torch.lerp(*outs, scale)
    images = pipe(
        edits.canvases[:2], edits.prompts()[:2], steps, guidance_scale=scale, latents=noise(2), output_type="pt"
    ).images
    torch.testing.assert_close(images, edit.unpack(x).clamp(-1, 1) * 0.5 + 0.5, rtol=0, atol=1e-5)


def test_inputs_and_outputs(pipe: GarmentsEditPipeline, edits: Edits) -> None:
    pictures = pipe.numpy_to_pil(edits.canvases[:2].permute(0, 2, 3, 1).numpy())
    prompts = edits.prompts()[:2]
    given = (edits.canvases[:2], edits.canvases[:2].permute(0, 2, 3, 1).numpy(), pictures)
    drawn = [pipe(image, prompts, 1, latents=noise(2), output_type="np").images for image in given]
    assert drawn[0].shape == (2, 32, 64, 1)
    assert np.array_equal(drawn[0], drawn[1])
    assert np.allclose(drawn[0], drawn[2], atol=1e-4)
    assert pipe(pictures[0], prompts[0], 1).images[0].size == (64, 32)
    with pytest.raises(OptionError, match="edits \\[B, 1, 32, 64\\]"):
        pipe(torch.zeros(1, 1, 32, 32), prompts[0], 1)
    with pytest.raises(OptionError, match="1 instructions for 2 images"):
        pipe(edits.canvases[:2], prompts[:1], 1)


def test_examples_ask_for_a_change(edits: Edits) -> None:
    assert edits.canvases.shape == (20, 1, 32, 64)
    assert sorted(zip(edits.sides.tolist(), edits.labels.tolist(), strict=True)) == [
        (side, label) for side in (0, 1) for label in range(10)
    ]
    old = edit.halves(edits.canvases, edits.sides)[0]
    assert accuracy(zoo.load("garments-classifier"), old * 2 - 1, edits.labels) <= 0.1


def test_it_does_what_it_is_told_and_leaves_the_rest(pipe: GarmentsEditPipeline, edits: Edits) -> None:
    """A small version of the card's measurement; the wrong half neither follows nor is preserved."""
    edits = edits.pick(range(5, 15))  # five on the left, five on the right
    images = pipe(edits.canvases, edits.prompts(), 12, latents=noise(10, 7), output_type="pt").images
    new, other = edit.halves(images, edits.sides)
    classifier = zoo.load("garments-classifier")
    assert accuracy(classifier, new * 2 - 1, edits.labels) >= 0.7
    assert accuracy(classifier, other * 2 - 1, edits.labels) <= 0.3
    assert float(edit.preserved(images, edits).mean()) >= 22
    swapped = replace(edits, sides=1 - edits.sides)
    assert float(edit.preserved(images, swapped).mean()) <= 15


def test_card_agrees_with_the_specification() -> None:
    quality = zoo.card("garments-edit")["quality"]
    assert quality["edits"] >= 300
    assert quality["followed"] >= 0.8
    assert quality["followed_by_unedited_canvases"] <= 0.1
    assert quality["psnr_of_the_other_half"] >= 30


def test_any_instruction_finds_a_canvas_without_that_class(edits: Edits) -> None:
    prompts = ["replace the left item by bag"] * 3 + ["replace the right item with a coat"] * 30
    asked = edits.asked(prompts)
    assert asked.labels.tolist() == [8] * 3 + [4] * 30
    assert asked.sides.tolist() == [0] * 3 + [1] * 30
    assert (asked.items[torch.arange(33), asked.sides] != asked.labels).all()
    assert not torch.equal(asked.canvases[0], asked.canvases[1])


@needs_data
def test_drawn_edits_never_ask_for_the_same_class() -> None:
    edits = edit.draw_edits(200, seed=3)
    old = edit.halves(edits.canvases, edits.sides)[0] * 2 - 1
    assert accuracy(zoo.load("garments-classifier"), old, edits.labels) <= 0.06  # the classifier's own error
    assert torch.equal(edits.canvases, edit.draw_edits(200, seed=3).canvases)


@needs_data
def test_the_recipe_runs_and_its_weights_load(tmp_path: Path) -> None:
    zoo.train("garments-edit", tmp_path, rounds=(2, 1), batch=2)
    small = zoo.load("garments-edit", tmp_path)
    assert isinstance(small.transformer, FluxTransformer2DModel)
    drawn = edit.draw_edits(2)
    assert small(drawn.canvases, drawn.prompts(), 2, output_type="pt").images.isfinite().all()
