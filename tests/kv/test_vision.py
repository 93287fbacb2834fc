"""Vision-language models: images are tokens of the prompt like any other, at the positions the model gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import elision
from tests.kv.models import IMAGE, tiny
from tests.kv.test_contracts import generate, quiet, same


def inputs(name: str) -> dict[str, Any]:
    """A prompt of 6 words, one image, 10 words."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(10, 64, (1, 16), generator=generator)
    if name == "qwen2_5_vl":
        grid = torch.tensor([[1, 4, 4]])
        pixels, count = torch.randn(16, 3 * 2 * 4 * 4, generator=generator), 4
        more = {"pixel_values": pixels, "image_grid_thw": grid}
    else:
        pixels, count = torch.randn(1, 3, 8, 8, generator=generator), 4
        more = {"pixel_values": pixels if name == "llava" else pixels[:, None]}
    ids = torch.cat([words[:, :6], torch.full((1, count), IMAGE), words[:, 6:]], 1)
    if name == "qwen2_5_vl":
        more["mm_token_type_ids"] = (ids == IMAGE).int()
    return {"ids": ids, "mask": torch.ones_like(ids), **more}


@pytest.mark.parametrize("name", ["llava", "idefics3", "smolvlm", "qwen2_5_vl"])
def test_a_prompt_with_an_image(name: str) -> None:
    model, prompt = tiny(name), inputs(name)
    plain = generate(model, **prompt)
    changed = {**prompt, "pixel_values": prompt["pixel_values"] + 1}
    assert not same(plain, generate(model, **changed)), "the image does not matter"
    with quiet(), elision.apply(model, "h2o", budget=4096):
        assert same(plain, generate(model, **prompt))
    with elision.apply(model, "prefixkv", budget=0.5) as run:
        out = generate(model, **prompt)
        report = run.report()
    assert torch.allclose(out[1][0], plain[1][0], atol=1e-5)
    assert report.bytes_held < report.bytes_full
    assert same(plain, generate(model, **prompt))
    assert f"image tokens: {sum(h for h, _ in report.images.values()) / 2:.0f} of 4 held" in str(report)


@pytest.mark.parametrize("name", ["llava", "idefics3", "smolvlm", "qwen2_5_vl"])
def test_scorers_know_the_image_tokens(name: str) -> None:
    """By their positions, through eviction, in every row and head."""
    model, prompt = tiny(name), inputs(name)
    with elision.apply(model, "h2o", budget=14) as run:
        cache = run.cache()
        generate(model, **prompt, past_key_values=cache)
        book = cache.layers[run.layers[0]].book
        generate(model, torch.cat([prompt["ids"], torch.randint(10, 64, (1, 13))], 1), past_key_values=cache)
        assert book.images.nonzero()[:, 1].tolist() == [6, 7, 8, 9]
        for layer, store in book.stores.items():
            places = run.kept(cache)[layer]
            expected = ((places >= 6) & (places < 10)).sum(-1)
            assert torch.equal(book.image_slots(store).sum(-1).expand_as(expected), expected)
            assert run.report().images[layer] == (float(expected.float().mean()), 4)
