"""Ways of calling that are easy to get wrong: configurations, warm caches, padding between turns, early exits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, OPTConfig, OPTForCausalLM
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

import elision
from elision.errors import ElisionWarning, UnsupportedTarget
from tests.kv.models import TINY, prompts, tiny
from tests.kv.settings import ACTIVE, Options, cases, label

EVICTING: list[tuple[str, Options]] = [
    ("h2o", {"budget": 8}),
    ("h2o", {"budget": 0.4}),
    ("cake", {"budget": 8, "window": 2}),
    ("snapkv", {"budget": 8, "window": 3}),
    ("snapkv", {"budget": 0.4, "window": 3, "pooling": "max"}),
    ("pyramidkv", {"budget": 8, "window": 2}),
    ("tova", {"budget": 8, "recent": 4}),
    ("streaming_llm", {"budget": 8}),
    ("knorm", {"budget": 8, "recent": 4}),
    ("random", {"budget": 8, "recent": 4}),
    ("window", {"budget": 8}),
    ("layer_shared", {"ratio": 0.5, "kind": "local"}),
    ("mikv", {"ratio": 0.5, "lo_bits": "drop"}),
    ("mikv", {"ratio": 0.4, "hi_bits": 8, "params": "float32"}),
    ("zipcache", {"gap": 6, "norm": "full_count", "params": "float32"}),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ElisionWarning)
        yield


# -- how generate is configured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["positional", "keyword", "model"])
@pytest.mark.parametrize("kind", ["off", "static", "dynamic"])
def test_settings_count_wherever_they_are_given(where: str, kind: str) -> None:
    """As argument object, by position or by name, or as the model's own configuration."""
    model = copy.deepcopy(tiny("llama"))
    ids, _ = prompts([20])
    setting: Options = {"use_cache": False} if kind == "off" else {"cache_implementation": kind}
    given = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    (model.generation_config if where == "model" else given).update(**setting)
    arguments = (ids, given) if where != "keyword" else (ids,)
    more = {"generation_config": given} if where == "keyword" else {}
    want = None if kind == "static" else model.generate(*arguments, **more)
    with elision.apply(model, "window", budget=4) as run:
        if kind == "static":
            with pytest.raises(UnsupportedTarget, match="cache_implementation='static'"):
                model.generate(*arguments, **more)
            return
        out = model.generate(*arguments, **more)
        assert run.report().forwards == (0 if kind == "off" else 4)
    if kind == "off":
        assert torch.equal(out, want)


@pytest.mark.parametrize(("name", "options"), [("h2o", {"budget": 8, "rolling": True}), ("streaming_llm", {})])
@torch.no_grad()
def test_without_a_cache_rolling_methods_change_nothing(name: str, options: Options) -> None:
    model = tiny("llama")
    ids, _ = prompts([20])
    want = model(ids, use_cache=False).logits
    with elision.apply(model, name, **options):
        torch.testing.assert_close(model(ids, use_cache=False).logits, want, atol=1e-5, rtol=0)


def test_no_input_is_the_error_of_transformers() -> None:
    model = tiny("llama")
    with elision.apply(model, "window", budget=8), pytest.raises(ValueError, match="exactly one of input_ids"):
        model()


# -- assistants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["llama", "gemma3"])
def test_a_compressed_assistant(draft: str) -> None:
    """Drafts come from the compressed model; what is generated is the other model's."""
    model, assistant = tiny("qwen3"), tiny(draft)
    ids, mask = prompts([21])
    want = model.generate(ids, attention_mask=mask, max_new_tokens=12)
    with elision.apply(assistant, "h2o", budget=8) as run:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=12, assistant_model=assistant)
        assert run.report().forwards > 0
    assert torch.equal(out, want)


@pytest.mark.parametrize(("name", "options"), [("h2o", {"budget": 4096}), ("cake", {"budget": 8, "window": 2})])
def test_drafts_of_an_early_exit(name: str, options: Options) -> None:
    model = tiny("llama")
    ids, mask = prompts([21])
    settings: Options = {"attention_mask": mask, "max_new_tokens": 8, "assistant_early_exit": 1}
    want = model.generate(ids, **settings)
    with elision.apply(model, name, **options) as run:
        out = model.generate(ids, **settings)
        report = run.report()
    assert out.shape == want.shape
    assert report.caches == 2
    assert torch.equal(out, want) or name == "cake"


@pytest.mark.parametrize(("name", "options"), EVICTING, ids=label)
def test_chunks_of_generate_are_one_prompt(name: str, options: Options) -> None:
    model = tiny("qwen3")
    ids, mask = prompts([29])
    settings: Options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    with elision.apply(model, name, **options):
        outs = [
            model.generate(ids, attention_mask=mask, **settings, **more).logits
            for more in ({}, {"prefill_chunk_size": 7})
        ]
    torch.testing.assert_close(*(torch.stack(out) for out in outs), atol=2e-5, rtol=0)


# -- caches that arrive warm -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_warm_cache_of_a_padded_batch_has_shares_of_each_row() -> None:
    model = tiny("llama")
    ids, mask = prompts([21, 13, 1])
    mask = torch.cat([mask, mask.new_ones(3, 8)], 1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask[:, :21], position_ids=places[:, :21], past_key_values=cache)
    with elision.apply(model, "snapkv", budget=0.5, window=2) as run:
        model(ids[:, :8], attention_mask=mask, position_ids=places[:, 21:], past_key_values=cache)
        held = run.kept(cache)
    assert (held[0] >= 0).sum(-1).tolist() == [[14, 14], [10, 10], [4, 4]]  # half of 29, 21 and 9


@pytest.mark.parametrize(("name", "options"), [*cases(ACTIVE), ("layer_shared", {"ratio": 0.5})], ids=label)
@torch.no_grad()
def test_a_warm_cache_may_go_on_with_steps(name: str, options: Options) -> None:
    """The first thing that a method sees may be a step over tokens that came before it was applied."""
    if options.get("rolling", name == "streaming_llm"):
        pytest.skip("rolling methods refuse rotated keys")
    model = tiny("llama")
    ids, mask = prompts([20, 13])
    warm = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=warm)
    mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    want = model(ids[:, -1:], attention_mask=mask, past_key_values=copy.deepcopy(warm)).logits
    with elision.apply(model, name, **options):
        out = model(ids[:, -1:], attention_mask=mask, past_key_values=warm).logits
        torch.testing.assert_close(out, want, atol=1e-5, rtol=0)  # what leaves is read once more
        for _ in range(4):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            assert model(ids[:, -1:], attention_mask=mask, past_key_values=warm).logits.isfinite().all()
    assert warm.get_seq_length() == 25


@torch.no_grad()
def test_rotated_keys_cannot_roll() -> None:
    model = tiny("llama")
    ids, _ = prompts([20])
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with elision.apply(model, "streaming_llm", budget=64), pytest.raises(UnsupportedTarget, match="20 rotated ones"):
        model(ids[:, :1], past_key_values=cache)
    assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()


@torch.no_grad()
def test_a_cache_that_is_refused_stays_as_it_was() -> None:
    model = tiny("llama")
    ids, _ = prompts([20])
    cache = Cache(layers=[DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=8)])
    kinds = [type(layer) for layer in cache.layers]
    with elision.apply(model, "window", budget=8), pytest.raises(UnsupportedTarget, match="layer 1 of the cache"):
        model(ids, past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == kinds


def test_a_model_that_cannot_roll_is_refused_and_left_clean() -> None:
    config = OPTConfig(**{**TINY, "ffn_dim": 32, "word_embed_proj_dim": 32})
    model = OPTForCausalLM(config).eval()
    keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedTarget, match="position_embeddings"):
        elision.apply(model, "streaming_llm", budget=8)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == keys
    elision.apply(model, "window", budget=8).remove()  # nothing is claimed any more


@pytest.mark.parametrize("architecture", ["gemma3", "gemma2", "gpt_neox", "phi3", "qwen2_5_vl", "qwen3_next"])
@torch.no_grad()
def test_rolling_without_loss_is_the_full_cache(architecture: str) -> None:
    """Rotary attention knows differences only, whatever the model's rotary module asks for."""
    model = tiny(architecture)
    ids, _ = prompts([20])
    settings: Options = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(ids, **settings).logits
    with elision.apply(model, "streaming_llm", budget=4096):
        out = model.generate(ids, **settings).logits
    torch.testing.assert_close(torch.stack(out), torch.stack(want), atol=2e-4, rtol=0)


# -- padding -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sinks_of_a_row_that_begins_in_a_later_part() -> None:
    model = tiny("llama")
    ids, mask = prompts([30, 5])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with elision.apply(model, "streaming_llm", budget=4, sinks=2, rolling=False) as run:
        whole, parts = run.cache(), run.cache()
        model(ids, attention_mask=mask, position_ids=places, past_key_values=whole)
        run.prompt(30)
        for start in range(0, 30, 10):
            part = slice(start, start + 10)
            seen = mask[:, : start + 10]
            model(ids[:, part], attention_mask=seen, position_ids=places[:, part], past_key_values=parts)
        assert torch.equal(run.kept(whole)[0], run.kept(parts)[0])
        assert run.kept(parts)[0][1, 0].tolist() == [25, 26, 28, 29]


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize(("name", "options"), EVICTING, ids=label)
@torch.no_grad()
def test_turns_of_a_padded_batch_are_those_of_its_rows(name: str, options: Options, architecture: str) -> None:
    """Padding also lies between the turns, where it is neither a neighbour nor recent nor a sink."""
    model = tiny(architecture)
    turns = [prompts([21, 13, 3], seed=4), prompts([5, 9, 2], seed=6)]
    follow = torch.randint(10, 64, (3, 8), generator=torch.Generator().manual_seed(8))
    with elision.apply(model, name, **options) as run:
        batch = _talk(run, model, turns, follow)
        for row in range(3):
            alone = [
                (ids[row : row + 1, -n:], mask[row : row + 1, -n:]) for ids, mask in turns for n in [_real(mask, row)]
            ]
            single = _talk(run, model, alone, follow[row : row + 1])
            torch.testing.assert_close(batch[row : row + 1], single, atol=2e-5, rtol=0)


def _real(mask: Tensor, row: int) -> int:
    return int(mask[row].sum())


def _talk(run: Any, model: Any, turns: list[tuple[Tensor, Tensor]], follow: Tensor) -> Tensor:
    """Logits after each turn and after the four given tokens that follow it."""
    cache, seen, logits = run.cache(), follow.new_zeros(len(follow), 0), []
    for turn, (ids, mask) in enumerate(turns):
        after = [(follow[:, t : t + 1], mask.new_ones(len(follow), 1)) for t in range(4 * turn, 4 * turn + 4)]
        for new, valid in [(ids, mask), *after]:
            seen = torch.cat([seen, valid], 1)
            places = (seen.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            out = model(new, attention_mask=seen, position_ids=places, past_key_values=cache)
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize(
    ("name", "options"),
    [("streaming_llm", {"budget": 16, "sinks": 2, "room": True}), ("h2o", {"heavy": 6, "recent": 12, "room": True})],
)
@torch.no_grad()
def test_room_is_made_for_a_whole_turn(name: str, options: Options) -> None:
    model = tiny("llama")
    ids, _ = prompts([21])
    with elision.apply(model, name, **options) as run:
        ends = []
        for cuts in ([8], [4, 4]):
            cache, at = run.cache(), 0
            model(ids, past_key_values=cache)
            run.prompt(8)
            for count in cuts:
                out = model(ids[:, at : at + count], past_key_values=cache)
                at += count
            ends.append((out.logits[:, -1], run.kept(cache)[0]))
    torch.testing.assert_close(ends[0][0], ends[1][0], atol=2e-5, rtol=0)
    assert torch.equal(ends[0][1], ends[1][1])


# -- books -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_reports_count_forwards_and_speak_of_the_last_cache() -> None:
    model = tiny("llama")
    ids, _ = prompts([21])
    with elision.apply(model, "window", budget=8) as run:
        model.generate(ids, max_new_tokens=4)
        assert [run.report().forwards for _ in range(3)] == [4, 4, 4]
        caches = [run.cache() for _ in range(6)]
        for count, cache in enumerate(caches):
            model(ids[:, : 10 + count], past_key_values=cache)
        model(ids[:, :3], past_key_values=caches[2])
        report = run.report()
    assert (report.forwards, report.caches, report.tokens_seen) == (11, 7, 15)
    assert run.report().forwards == 11


@pytest.mark.parametrize(("name", "options"), EVICTING, ids=label)
def test_what_is_held_holds_no_graph(name: str, options: Options) -> None:
    """Plain loops without no_grad must not keep every step's activations alive."""
    model = tiny("llama")
    ids, _ = prompts([21])
    with torch.enable_grad(), elision.apply(model, name, **options) as run:
        cache = run.cache()
        run.prompt(21)
        for part in (ids[:, :16], ids[:, 16:], *ids[:, :3].split(1, 1)):
            out = model(part, past_key_values=cache)
            assert out.logits.requires_grad
            for layer in cache.layers:
                held = [*layer.store.dense.tensors(), *layer.store.state.values()]
                assert not any(isinstance(t, Tensor) and t.requires_grad for t in held)


@pytest.mark.parametrize(("name", "options"), [("h2o", {"budget": 10}), ("zipcache", {"gap": 3, "params": "float32"})])
@torch.no_grad()
def test_a_compiled_forward_answers_alike(name: str, options: dict[str, Any]) -> None:
    model = copy.deepcopy(tiny("llama"))
    ids, _ = prompts([30])
    with elision.apply(model, name, **options) as run:
        answers = []
        for forward in (model, torch.compile(model.forward, dynamic=True, backend="eager")):
            cache = run.cache()
            logits = [forward(ids, past_key_values=cache).logits[:, -1]]
            logits += [forward(torch.tensor([[t]]), past_key_values=cache).logits[:, -1] for t in (11, 12, 13, 14)]
            answers.append((torch.stack(logits), run.kept(cache)))
    torch.testing.assert_close(answers[0][0], answers[1][0], atol=1e-5, rtol=0)
    assert all(torch.equal(answers[0][1][i], answers[1][1][i]) for i in answers[0][1])
