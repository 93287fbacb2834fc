"""What methods that pack tokens promise beyond the contracts of the family: every token is held once, bytes add up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import elision
from elision.errors import OptionError
from elision.kv.store import LayerStore
from elision.session import storage_bytes
from tests.kv.models import ARCHITECTURES, prompts, tiny
from tests.kv.settings import ACTIVE, PACKS, Options, cases, label

every_setting = [(name, options) for name, options in cases(ACTIVE) if name in PACKS]
holding = [(name, options) for name, options in every_setting if options.get("lo_bits") != "drop"]
every_method = pytest.mark.parametrize(("name", "options"), every_setting, ids=label)


@pytest.fixture
def model(packing_model: LlamaForCausalLM) -> LlamaForCausalLM:
    return packing_model


def _ids(n: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _steps(model: Any, forced: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
    """Logits after every forced token, [B, T, V]."""
    logits = []
    for t in range(forced.shape[1]):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(forced[:, t : t + 1], attention_mask=mask, past_key_values=cache, **_places(mask, 1))
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def _places(mask: Tensor | None, m: int) -> dict[str, Tensor]:
    if mask is None:
        return {}
    return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -m:]}


def _stores(cache: Any) -> list[LayerStore]:
    return [layer.store for layer in cache.layers]


@every_method
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_in_parts_is_one_prompt(model: Any, name: str, options: Options, padded: bool) -> None:
    """Also where a row of the batch has nothing but padding in the first parts."""
    prompt, forced = _ids(33, 2), _ids(9, 2, seed=1)
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :17] = 0
    with elision.apply(model, name, **options) as run, torch.no_grad():
        whole, parts = run.cache(), run.cache()
        expected = model(prompt, attention_mask=mask, past_key_values=whole, **_places(mask, 33)).logits[:, -1]
        run.prompt(33)
        for start in range(0, 33, 8):
            stop = min(start + 8, 33)
            part, seen = prompt[:, start:stop], mask[:, :stop]
            logits = model(part, attention_mask=seen, past_key_values=parts, **_places(seen, stop - start)).logits
        torch.testing.assert_close(logits[:, -1], expected, atol=1e-5, rtol=0)
        expected = _steps(model, forced, whole, mask)
        torch.testing.assert_close(_steps(model, forced, parts, mask), expected, atol=1e-5, rtol=0)
        assert run.kept(whole).keys() == run.kept(parts).keys()


@every_method
def test_first_token_is_that_of_the_full_cache(model: Any, name: str, options: Options) -> None:
    prompt = _ids(30)
    with torch.no_grad():
        expected = model(prompt).logits
        with elision.apply(model, name, **options) as run:
            assert torch.equal(model(prompt, past_key_values=run.cache()).logits, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zipcache", {"bits_salient": 8, "bits_other": 8, "gap": 6}),
        ("mikv", {"ratio": 0.3, "hi_bits": 8, "lo_bits": 8}),
        ("uniform_rtn", {"residual": 4, "group": 4, "bits": 8}),
    ],
)
def test_eight_bits_are_close_to_the_full_cache(model: Any, name: str, options: dict[str, Any]) -> None:
    prompt, forced = _ids(30, 2), _ids(12, 2, seed=3)
    with torch.no_grad():
        plain = DynamicCache(config=model.config)
        model(prompt, past_key_values=plain)
        expected = _steps(model, forced, plain).log_softmax(-1)
        with elision.apply(model, name, **options) as run:
            cache = run.cache()
            model(prompt, past_key_values=cache)
            found = _steps(model, forced, cache).log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).max() < 2e-3


@every_method
def test_from_one_row_to_many(model: Any, name: str, options: Options) -> None:
    prompt, forced = _ids(24), _ids(9, 1, seed=3)
    with elision.apply(model, name, **options) as run, torch.no_grad():
        cache = run.cache()
        model(prompt, past_key_values=cache)
        alone = copy.deepcopy(cache)
        cache.batch_repeat_interleave(3)
        found = _steps(model, forced.repeat(3, 1), cache)
        cache.reorder_cache(torch.tensor([2, 1, 0]))
        expected = _steps(model, forced, alone)
        torch.testing.assert_close(found, expected.expand_as(found), atol=1e-5, rtol=0)
        again = _steps(model, forced.repeat(3, 1), cache)
        torch.testing.assert_close(again, _steps(model, forced, alone).expand_as(again), atol=1e-5, rtol=0)


@every_method
def test_turns_of_a_chat(model: Any, name: str, options: Options) -> None:
    """A second prompt sees all of the first; every token is still held, at its true position."""
    with elision.apply(model, name, **options) as run, torch.no_grad():
        cache = run.cache()
        model(_ids(20), past_key_values=cache)
        _steps(model, _ids(5, seed=1), cache)
        out = model(_ids(11, seed=2), past_key_values=cache).logits
        _steps(model, _ids(8, seed=3), cache)
        assert torch.isfinite(out).all()
        for store, held in zip(_stores(cache), run.kept(cache).values(), strict=True):
            assert store.seen == 44
            if options.get("lo_bits") != "drop":
                assert torch.equal(held, torch.arange(44).expand_as(held))


@every_method
def test_crop_takes_the_newest_tokens_back(model: Any, name: str, options: Options) -> None:
    """Cropped tokens are read no more, wherever they lie, and decoding goes on."""
    with elision.apply(model, name, **options) as run, torch.no_grad():
        cache = run.cache()
        model(_ids(20), past_key_values=cache)
        _steps(model, _ids(13, seed=1), cache)
        cache.crop(-9)
        held = run.kept(cache)
        assert all(store.seen == 24 for store in _stores(cache))
        assert all(int(positions.max()) < 24 for positions in held.values())
        if options.get("lo_bits") != "drop":
            for positions in held.values():
                assert torch.equal(positions[..., -24:], torch.arange(24).expand_as(positions[..., -24:]))
        assert torch.isfinite(_steps(model, _ids(15, seed=2), cache)).all()
        if options.get("lo_bits") != "drop":
            for positions in run.kept(cache).values():
                real = [sorted(p for p in head.tolist() if p >= 0) for head in positions[0]]
                assert real == [list(range(39))] * len(real)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_storages(model: Any, name: str, options: Options, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).to(dtype)
    with elision.apply(model, name, **options) as run, torch.no_grad():
        cache = run.cache()
        model(_ids(40, 2), past_key_values=cache)
        _steps(model, _ids(7, 2, seed=1), cache)
        total = 0
        for store in _stores(cache):
            tables = [store.dense, *(tier.meta for tier in store.tiers)]
            tensors = [t for table in tables for t in table.tensors()]
            tensors += [t for tier in store.tiers for t in tier.tensors()]
            assert store.nbytes == storage_bytes(tensors)
            total += store.nbytes
            for tier in store.tiers:
                for tensor in tier.tensors():
                    assert tensor.untyped_storage().nbytes() <= 1.25 * tensor.numel() * tensor.element_size() + 64
        assert run.report().bytes_held == total


@pytest.mark.parametrize(("name", "options"), holding, ids=label)
def test_no_token_is_read_twice_or_lost(model: Any, name: str, options: Options) -> None:
    """Positions held are a partition of those seen after every call."""
    with elision.apply(model, name, **options) as run, torch.no_grad():
        cache = run.cache()
        model(_ids(20, 2), past_key_values=cache)
        for t in range(14):
            for held in run.kept(cache).values():
                assert torch.equal(held, torch.arange(20 + t).expand_as(held))
            _steps(model, _ids(1, 2, seed=t), cache)


@every_method
def test_prompts_of_one_token(model: Any, name: str, options: Options) -> None:
    with elision.apply(model, name, **options) as run, torch.no_grad():
        cache = run.cache()
        model(_ids(1), past_key_values=cache)
        logits = _steps(model, _ids(12, seed=1), cache)
        assert torch.isfinite(logits).all()


def test_bad_options(model: Any) -> None:
    for name, options, words in [
        ("zipcache", {"bits_salient": 2, "bits_other": 4}, "bits_other=4 is more than bits_salient=2"),
        ("zipcache", {"recent_probes": 0.0, "random_probes": 0.0}, "some row has to be a probe"),
        ("zipcache", {"gap": 0}, "gap=0"),
        ("mikv", {"lo_bits": "drop", "hi_bits": 8}, "lo_bits='drop' needs hi_bits=16"),
        ("mikv", {"lo_bits": 8, "hi_bits": 4}, "lo_bits=8 is more than hi_bits=4"),
        ("mikv", {"ratio": 1.5}, "ratio=1.5"),
        ("mikv", {"group": 6}, "group=6 does not divide the head dimension 16"),
        ("uniform_rtn", {"bits": 5}, "bits=5"),
        ("uniform_rtn", {"value_group": 5}, "value_group=5 does not divide the head dimension 16"),
    ]:
        with pytest.raises(OptionError, match=words):
            elision.apply(model, name, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "options"),
    [("zipcache", {"gap": 3}), ("mikv", {"ratio": 0.3}), ("uniform_rtn", {"residual": 5, "group": 4})],
)
def test_every_architecture(architecture: str, name: str, options: Options) -> None:
    """Full-attention layers are packed; the first token is the full cache's; nothing is evicted; removal is exact."""
    model = tiny(architecture)
    ids, mask = prompts([30, 21])
    kwargs: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(ids, attention_mask=mask, **kwargs)
    with elision.apply(model, name, **options) as run:
        packed = model.generate(ids, attention_mask=mask, **kwargs)
        report = run.report()
    torch.testing.assert_close(packed.logits[0], plain.logits[0], atol=1e-5, rtol=0)
    assert all(x.isfinite().all() for x in packed.logits)
    assert min(report.demoted.values()) > 0
    assert sum(report.evicted.values()) == 0
    again = model.generate(ids, attention_mask=mask, **kwargs)
    assert torch.equal(again.sequences, plain.sequences)
