"""Bad input: a clear error that names the value, the limit and the fix, and a model that is left clean."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, QuantizedCache, StaticCache, T5Config, T5ForConditionalGeneration

import elision
from elision.errors import (
    Closed,
    Conflict,
    ElisionError,
    ElisionWarning,
    OptionError,
    ProfileError,
    UnsupportedTarget,
)
from tests.kv.models import prompts, tiny


def state(model: Any) -> dict[str, set[str]]:
    """What hangs on every module."""
    return {name: set(module.__dict__) for name, module in model.named_modules()}


def configs(model: Any) -> list[Any]:
    return [m.config for m in model.modules() if hasattr(m, "config")]


def test_removal_is_exact() -> None:
    model = tiny("qwen3")
    ids, _ = prompts([20])
    before, owned, keys = model(ids).logits, configs(model), state(model)
    run = elision.apply(model, "h2o", budget=8)
    assert model.config._attn_implementation == "sdpa"
    model.generate(ids, max_new_tokens=3)
    run.remove()
    run.remove()
    assert state(model) == keys
    assert all(a is b for a, b in zip(owned, configs(model), strict=True))
    assert torch.equal(model(ids).logits, before)


def test_an_exception_leaves_the_model_clean_and_the_cache_marked() -> None:
    model = tiny("llama")
    ids, _ = prompts([20])
    keys = state(model)
    with pytest.raises(RuntimeError, match="broken off"):
        _break_off(model, ids)
    assert state(model) == keys


def _break_off(model: Any, ids: torch.Tensor) -> None:
    with elision.apply(model, "h2o", budget=8) as run:
        cache = run.cache()
        model(ids, past_key_values=cache)
        handle = model.model.layers[1].mlp.register_forward_hook(_fail)
        try:
            with pytest.raises(RuntimeError, match="on purpose"):
                model(ids[:, :1], past_key_values=cache)
        finally:
            handle.remove()
        with pytest.raises(ElisionError, match=r"broke off.*start a new one"):
            model(ids[:, :1], past_key_values=cache)
        assert model(ids, past_key_values=run.cache()).logits.isfinite().all()
        raise RuntimeError("broken off")


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


def test_a_compressed_cache_ends_with_its_session() -> None:
    model = tiny("llama")
    ids, _ = prompts([20])
    with elision.apply(model, "h2o", budget=8) as run:
        cache = run.cache()
        model(ids, past_key_values=cache)
    with pytest.raises(Closed, match=r"h2o was used after remove.*start with a new cache"):
        model(ids[:, :1], past_key_values=cache)
    with elision.apply(model, "h2o", budget=8) as run:
        with pytest.raises(Conflict, match="belongs to h2o on LlamaForCausalLM"):
            model(ids[:, :1], past_key_values=cache)
        model(ids)
    with pytest.raises(Closed):
        run.cache()


def test_a_cache_of_another_model() -> None:
    model, other = tiny("llama"), tiny("llama-mha")
    ids, _ = prompts([20])
    with elision.apply(model, "h2o", budget=8) as run, elision.apply(other, "snapkv", budget=12, window=4) as second:
        cache = run.cache()
        model(ids, past_key_values=cache)
        with pytest.raises(Conflict, match="belongs to h2o"):
            other(ids[:, :1], past_key_values=cache)
        other(ids)
        assert second.report().slots == {0: 12, 1: 12}
    plain = tiny("qwen2")
    with elision.apply(model, "h2o", budget=8) as run:
        cache = run.cache()
        model(ids, past_key_values=cache)
        with pytest.raises(Conflict, match="used with another model"):
            plain(ids[:, :1], past_key_values=cache)


def test_two_methods_on_one_model() -> None:
    model = tiny("llama")
    run = elision.apply(model, "h2o")
    try:
        with pytest.raises(Conflict, match="already has h2o applied"):
            elision.apply(model, "snapkv")
        with pytest.raises(Conflict, match="already has h2o applied"):
            elision.apply(model.model, "snapkv")
    finally:
        run.report()
        with pytest.warns(ElisionWarning, match="no forward of the model wrote a cache"):
            run.remove()
    with pytest.raises(Conflict, match="one cache has one method"):
        elision.apply(model, ["h2o", "snapkv"])


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (lambda model: StaticCache(config=model.config, max_cache_len=64), "StaticCache"),
        (lambda model: QuantizedCache.__new__(QuantizedCache), "QuantizedCache"),
    ],
)
def test_caches_that_keep_their_own_books(kind: Any, match: str) -> None:
    model = tiny("llama")
    ids, _ = prompts([20])
    with pytest.raises(UnsupportedTarget, match=match), elision.apply(model, "h2o", budget=8):
        model(ids, past_key_values=kind(model))
    with pytest.raises(UnsupportedTarget, match="cache_implementation='static'"), elision.apply(model, "h2o"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_masks_that_do_not_say_which_tokens_are_padding() -> None:
    model = tiny("llama")
    ids, mask = prompts([20])
    with elision.apply(model, "h2o", budget=8) as run:
        with pytest.raises(UnsupportedTarget, match="4-dimensional"):
            model(ids, attention_mask=torch.zeros(1, 1, 20, 20))
        cache = run.cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(UnsupportedTarget, match=r"1 columns for 20 tokens in the cache and 1 new"):
            model(ids[:, :1], attention_mask=mask[:, :1], past_key_values=cache)


def test_targets_that_have_no_such_cache() -> None:
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(UnsupportedTarget, match="encoder–decoder"):
        elision.apply(T5ForConditionalGeneration(config), "h2o")
    with pytest.raises(UnsupportedTarget, match="no transformers model"):
        elision.apply(nn.Linear(2, 2), "h2o")
    model = copy.deepcopy(tiny("llama"))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedTarget, match=r"'flex_attention'.*attn_implementation=.sdpa"):
        elision.apply(model, "h2o")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": 0}, r"budget=0 tokens.*at least 1"),
        ({"budget": 1.5}, r"budget=1.5 as a share.*at most 1.0"),
        ({"budget": "12 parsecs"}, r"'12 parsecs' is no number of bytes.*64MiB"),
        ({"budget": True}, r"budget=True is no budget"),
        ({"heavy": 3}, r"heavy=3 and recent=None go together"),
        ({"heavy": 0, "recent": 0}, r"nothing would be held"),
        ({"hevy": 3}, r"did you mean 'heavy'"),
        ({"reduce": "median"}, r"'median' is not one of"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ElisionError, match=match):
        elision.apply(tiny("llama"), "h2o", **options)


def test_settings_of_other_families() -> None:
    with pytest.raises(OptionError, match="steps belong to diffusion models"):
        elision.apply(tiny("llama"), "h2o", steps=28)
    with pytest.raises(OptionError, match="budget=8 tokens is smaller than window=32"):
        elision.apply(tiny("llama"), "snapkv", budget=8)
    with pytest.raises(OptionError, match="no offline part"):
        elision.fit(tiny("llama"), "h2o", calls=[prompts([5])[0]])
    with pytest.raises(ProfileError, match="no profile at nowhere"):
        elision.apply(tiny("llama"), "h2o", profile="nowhere.safetensors")


def test_a_run_that_left_nothing_out_says_why() -> None:
    model = tiny("llama")
    ids, _ = prompts([20])
    reached = r"the longest of 1 cache\(s\) reached 20 tokens, and its budget is 64"
    with pytest.warns(ElisionWarning, match=reached), elision.apply(model, "h2o", budget=64):
        model(ids)
    with pytest.warns(ElisionWarning, match="use_cache"), elision.apply(model, "h2o", budget=4):
        model(ids, use_cache=False)


def test_a_warm_cache_is_taken_over() -> None:
    """Tokens that a plain cache holds already are the start of what is compressed."""
    model = tiny("llama")
    ids, mask = prompts([20, 13])
    warm = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=warm)
        full = copy.deepcopy(warm)
        seen = torch.cat([mask, mask.new_ones(2, 1)], 1)
        expected = model(ids[:, -1:], attention_mask=seen, past_key_values=full).logits
        with elision.apply(model, "h2o", budget=12) as run:
            out = model(ids[:, -1:], attention_mask=seen, past_key_values=warm).logits
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
            assert run.report().slots == {0: 12, 1: 12}
            assert int((run.kept(warm)[0] >= 0).sum(-1).min()) == 12


@torch.no_grad()
def test_a_cache_lies_on_one_device() -> None:
    """A layer that computes elsewhere, and a cache that was filled elsewhere."""
    model = copy.deepcopy(tiny("llama"))
    ids, _ = prompts([20])
    keys, before = state(model), model(ids).logits
    handle = model.model.layers[1].self_attn.register_forward_pre_hook(_elsewhere, with_kwargs=True)
    model.model.layers[1].self_attn.to("meta")
    with pytest.raises(UnsupportedTarget, match="layer 1 computes on meta, but the cache holds tokens on cpu"):
        _in_session(model, ids, None)
    handle.remove()
    assert state(model) == keys
    model, warm = tiny("llama"), DynamicCache(config=model.config)
    model(ids, past_key_values=warm)
    for layer in warm.layers:
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    with pytest.raises(UnsupportedTarget, match="layer 0 computes on cpu, but the cache holds tokens on meta"):
        _in_session(model, ids[:, :1], warm)
    assert torch.equal(model(ids).logits, before)


def _in_session(model: Any, ids: torch.Tensor, cache: Any) -> None:
    with elision.apply(model, "cake", budget=8, window=4):
        model(ids, past_key_values=cache)


def _elsewhere(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def moved(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(moved(y) for y in x)
        return x.to("meta") if isinstance(x, torch.Tensor) else x

    return tuple(moved(x) for x in args), {name: moved(x) for name, x in kwargs.items()}
