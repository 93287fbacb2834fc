"""What all methods that pack tokens promise: padding, parts, turns, beams, drafts, crop, bytes, passthrough."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import elision
from elision.errors import ElisionWarning, OptionError
from elision.kv.store import LayerStore
from elision.tensors.packing import storage_bytes

# Parameters in float32: in 16 bits a minimum that differs in its last float32 bit can round to a neighbour a thousand
# times further away, so equal caches would be compared too strictly.
SMOOTH = {"params": "float32"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "zipcache": ("zipcache", SMOOTH | {"gap": 6}),
    "zipcache-block": ("zipcache", SMOOTH | {"gap": 6, "requant": "block", "norm": "full_count"}),
    "zipcache-exact": ("zipcache", SMOOTH | {"gap": 6, "bits_salient": 16}),
    "mikv": ("mikv", SMOOTH | {"ratio": 0.3}),
    "mikv-8": ("mikv", SMOOTH | {"ratio": 0.3, "hi_bits": 8, "lo_bits": 3}),
    "mikv-prompt": ("mikv", SMOOTH | {"ratio": 0.3, "size": "prompt", "lo_bits": 4}),
    "mikv-drop": ("mikv", {"ratio": 0.5, "lo_bits": "drop"}),
    "rtn": ("uniform_rtn", SMOOTH | {"residual": 5, "group": 4}),
    "rtn-token": ("uniform_rtn", SMOOTH | {"residual": 5, "keys": "token", "bits": 3}),
}
every_method = pytest.mark.parametrize("case", METHODS)


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


def _kept(run: Any, cache: Any, row: int, pads: int) -> list[list[list[int]]]:
    """Positions among the real tokens of a row that are held, by layer and KV head."""
    held = [positions[row].expand(2, -1).tolist() for positions in run.kept(cache).values()]
    return [[sorted(p - pads for p in head if p >= 0) for head in layer] for layer in held]


@every_method
def test_a_padded_row_equals_its_single_run(model: Any, case: str) -> None:
    name, options = METHODS[case]
    lengths, total, new = (31, 9, 22), 31, 14
    prompts, forced = [_ids(n, seed=n) for n in lengths], _ids(new, len(lengths), seed=5)
    padded = torch.cat([torch.cat([torch.zeros(1, total - p.shape[1], dtype=torch.int64), p], 1) for p in prompts])
    mask = torch.cat([(torch.arange(total) >= total - n).long()[None] for n in lengths])
    with elision.apply(model, name, **options) as run, torch.no_grad():
        together = run.cache()
        first = model(padded, attention_mask=mask, past_key_values=together, **_places(mask, total)).logits[:, -1]
        rest = _steps(model, forced, together, mask)
        for row, prompt in enumerate(prompts):
            alone = run.cache()
            logits = model(prompt, past_key_values=alone).logits[:, -1]
            torch.testing.assert_close(first[row], logits[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(rest[row], _steps(model, forced[row][None], alone)[0], atol=1e-5, rtol=0)
            assert _kept(run, together, row, total - lengths[row]) == _kept(run, alone, 0, 0)


@every_method
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_in_parts_is_one_prompt(model: Any, case: str, padded: bool) -> None:
    """Also where a row of the batch has nothing but padding in the first parts."""
    name, options = METHODS[case]
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
def test_first_token_is_that_of_the_full_cache(model: Any, case: str) -> None:
    name, options = METHODS[case]
    prompt = _ids(30)
    with torch.no_grad():
        expected = model(prompt).logits
        with elision.apply(model, name, **options) as run:
            assert torch.equal(model(prompt, past_key_values=run.cache()).logits, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zipcache", {"bits_salient": 16, "bits_other": 16}),
        ("zipcache", {"bits_salient": 16, "low_ratio": 0.0}),
        ("mikv", {"ratio": 1.0}),
        ("uniform_rtn", {"residual": 1000}),
    ],
)
def test_nothing_packed_is_the_full_cache(model: Any, name: str, options: dict[str, Any]) -> None:
    prompt, forced = _ids(30, 2), _ids(12, 2, seed=3)
    with torch.no_grad():
        plain = DynamicCache(config=model.config)
        expected = model(prompt, past_key_values=plain).logits, _steps(model, forced, plain)
        run = elision.apply(model, name, **options)
        cache = run.cache()
        assert torch.equal(model(prompt, past_key_values=cache).logits, expected[0])
        assert torch.equal(_steps(model, forced, cache), expected[1])
        with pytest.warns(ElisionWarning, match="left nothing out"):
            run.remove()


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
def test_decoding_modes(model: Any, case: str) -> None:
    """Greedy, beams, several samples and drafts run; greedy equals a loop of forwards."""
    name, options = METHODS[case]
    prompt = _ids(12).repeat(1, 3)
    with elision.apply(model, name, **options) as run:
        kwargs: dict[str, Any] = {"max_new_tokens": 14, "pad_token_id": 0, "eos_token_id": None}
        greedy = model.generate(prompt, do_sample=False, **kwargs)
        cache = run.cache()
        with torch.no_grad():
            token, seen = model(prompt, past_key_values=cache).logits[:, -1].argmax(-1), []
            for _ in range(14):
                seen.append(int(token))
                token = model(token[None], past_key_values=cache).logits[:, -1].argmax(-1)
        assert greedy[0, 36:].tolist() == seen
        model.generate(prompt, num_beams=3, num_return_sequences=2, do_sample=False, **kwargs)
        model.generate(prompt, do_sample=True, num_return_sequences=3, **kwargs)
        model.generate(prompt, prompt_lookup_num_tokens=3, do_sample=False, **kwargs)


@every_method
def test_beams_follow_their_rows(model: Any, case: str) -> None:
    """Reordered, repeated and selected rows continue as those rows would alone; copies are independent."""
    name, options = METHODS[case]
    prompt, forced, more = _ids(24, 2), _ids(9, 2, seed=3), _ids(9, 3, seed=4)
    with elision.apply(model, name, **options) as run, torch.no_grad():
        cache = run.cache()
        model(prompt, past_key_values=cache)
        _steps(model, forced, cache)
        twin = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 0, 1]))
        found = _steps(model, more, cache)
        twin.batch_repeat_interleave(2)
        twin.batch_select_indices(torch.tensor([2, 0, 3]))
        assert torch.equal(_steps(model, more, twin), found)
        single = run.cache()
        model(prompt[1:].repeat(2, 1), past_key_values=single)
        _steps(model, forced[1:].repeat(2, 1), single)
        rows = found[[0, 2]]
        torch.testing.assert_close(_steps(model, more[[0, 2]], single), rows, atol=1e-5, rtol=0)


@every_method
def test_from_one_row_to_many(model: Any, case: str) -> None:
    name, options = METHODS[case]
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
def test_turns_of_a_chat(model: Any, case: str) -> None:
    """A second prompt sees all of the first; every token is still held, at its true position."""
    name, options = METHODS[case]
    with elision.apply(model, name, **options) as run, torch.no_grad():
        cache = run.cache()
        model(_ids(20), past_key_values=cache)
        _steps(model, _ids(5, seed=1), cache)
        out = model(_ids(11, seed=2), past_key_values=cache).logits
        _steps(model, _ids(8, seed=3), cache)
        assert torch.isfinite(out).all()
        for store, held in zip(_stores(cache), run.kept(cache).values(), strict=True):
            assert store.seen == 44
            if case != "mikv-drop":
                assert torch.equal(held, torch.arange(44).expand_as(held))


@every_method
def test_crop_takes_the_newest_tokens_back(model: Any, case: str) -> None:
    """Cropped tokens are read no more, wherever they lie, and decoding goes on."""
    name, options = METHODS[case]
    with elision.apply(model, name, **options) as run, torch.no_grad():
        cache = run.cache()
        model(_ids(20), past_key_values=cache)
        _steps(model, _ids(13, seed=1), cache)
        cache.crop(-9)
        held = run.kept(cache)
        assert all(store.seen == 24 for store in _stores(cache))
        assert all(int(positions.max()) < 24 for positions in held.values())
        if case != "mikv-drop":
            for positions in held.values():
                assert torch.equal(positions[..., -24:], torch.arange(24).expand_as(positions[..., -24:]))
        assert torch.isfinite(_steps(model, _ids(15, seed=2), cache)).all()
        if case != "mikv-drop":
            for positions in run.kept(cache).values():
                real = [sorted(p for p in head.tolist() if p >= 0) for head in positions[0]]
                assert real == [list(range(39))] * len(real)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_storages(model: Any, case: str, dtype: torch.dtype) -> None:
    name, options = METHODS[case]
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


@every_method
def test_no_token_is_read_twice_or_lost(model: Any, case: str) -> None:
    """Positions held are a partition of those seen after every call."""
    if case == "mikv-drop":
        pytest.skip("tokens are dropped there")
    name, options = METHODS[case]
    with elision.apply(model, name, **options) as run, torch.no_grad():
        cache = run.cache()
        model(_ids(20, 2), past_key_values=cache)
        for t in range(14):
            for held in run.kept(cache).values():
                assert torch.equal(held, torch.arange(20 + t).expand_as(held))
            _steps(model, _ids(1, 2, seed=t), cache)


@pytest.mark.parametrize("case", ["zipcache", "mikv", "rtn"])
def test_prompts_of_one_token(model: Any, case: str) -> None:
    name, options = METHODS[case]
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
        ("uniform_rtn", {"bits": 5}, "bits=5"),
    ]:
        with pytest.raises(OptionError, match=words):
            elision.apply(model, name, **options)
