"""The garment models: packing, conditioning, the shipped weights and their recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elision import zoo
from elision.errors import ElisionError, OptionError, UnknownName
from elision.zoo import garments, garments_flux
from elision.zoo.garments_flux import CLASSES, GarmentsPipeline, condition, pack, unpack

needs_data = pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").exists(), reason="needs Debian's dataset-fashion-mnist"
)


@pytest.fixture(scope="module")
def pipe() -> GarmentsPipeline:
    return zoo.load("garments-flux")  # type: ignore[no-any-return]


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 64, 16, generator=torch.Generator().manual_seed(seed))


def test_packing_is_undone() -> None:
    images = torch.randn(3, 1, 32, 32)
    tokens = pack(images)
    assert torch.equal(unpack(tokens), images)
    assert torch.equal(tokens[0, 9].reshape(4, 4), images[0, 0, 4:8, 4:8])


def test_conditions_differ_by_class_only() -> None:
    a, b = condition(torch.tensor([1])), condition(torch.tensor([2]))
    assert not torch.equal(a["encoder_hidden_states"], b["encoder_hidden_states"])
    assert not torch.equal(a["pooled_projections"], b["pooled_projections"])
    assert torch.equal(a["img_ids"], b["img_ids"])


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_batched_guidance_equals_two_calls(pipe: GarmentsPipeline, rows: int) -> None:
    """Four rows are as many as text tokens: positions must not be doubled with the batch."""
    prompt = list(CLASSES[:rows])
    two = pipe(prompt, 4, latents=noise(rows), output_type="pt").images
    one = pipe(prompt, 4, latents=noise(rows), output_type="pt", batched_cfg=True).images
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_it_draws_what_it_is_asked_for(pipe: GarmentsPipeline) -> None:
    """A small version of the card's measurement: most of 40 samples are recognised."""
    labels = torch.arange(40) % 10
    images = pipe(labels.tolist(), 20, latents=noise(40, 7), output_type="pt").images
    assert garments.accuracy(zoo.load("garments-classifier"), images * 2 - 1, labels) >= 0.85


def test_outputs(pipe: GarmentsPipeline) -> None:
    assert pipe("bag", 2).images[0].size == (32, 32)
    assert pipe(["bag", 3], 2, output_type="np").images.shape == (2, 32, 32, 1)
    with pytest.raises(OptionError, match=r"'hat' is no class"):
        pipe("hat", 2)
    with pytest.raises(OptionError, match=r"12 is no class"):
        pipe(12, 2)


def test_cards_and_sizes() -> None:
    for name in zoo.names():
        card = zoo.card(name)
        assert card["name"] == name
        size = sum(f.stat().st_size for f in (zoo.WEIGHTS / name).rglob("*") if f.is_file())
        assert size <= 8 * 2**20
    assert zoo.card("garments-flux")["quality"]["recognised"] >= 0.85
    assert zoo.card("garments-classifier")["quality"]["test_accuracy"] >= 0.90


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'garments-flux'"):
        zoo.load("garments-flus")
    with pytest.raises(ElisionError, match="no weights of garments-flux"):
        zoo.load("garments-flux", tmp_path / "nowhere")


@needs_data
def test_the_classifier_is_as_good_as_its_card() -> None:
    images, labels = garments.load_garments("t10k")
    measured = garments.accuracy(zoo.load("garments-classifier"), images[:2000], labels[:2000])
    assert abs(measured - zoo.card("garments-classifier")["quality"]["test_accuracy"]) < 0.02


@needs_data
def test_recipes_run_and_their_weights_load(tmp_path: Path) -> None:
    zoo.train("garments-classifier", tmp_path / "c", steps=2, batch=8)
    zoo.train("garments-flux", tmp_path / "f", steps=2, batch=4)
    logits = zoo.load("garments-classifier", tmp_path / "c")(torch.zeros(1, 1, 32, 32))
    assert logits.shape == (1, 10)
    small = zoo.load("garments-flux", tmp_path / "f")
    assert small(["bag"], 2, output_type="pt").images.isfinite().all()


def test_missing_data_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ELISION_FASHION_MNIST", str(tmp_path))
    with pytest.raises(ElisionError, match="dataset-fashion-mnist"):
        garments.load_garments("train")


def test_the_module_knows_its_classes() -> None:
    assert garments_flux.NULL == len(CLASSES) == 10
