from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import elision
from elision.kv.methods.dapq import DapQ, FromBehind, PseudoTokens
from elision.kv.parts import Call
from elision.kv.pseudo import position_limit
from elision.kv.store import LayerStore
from tests.kv.tiny import SIZES, forced, left_padded, masked, tiny, tokens


@torch.no_grad()
def _eager_scores(model: Any, prompt: Tensor, rows: Tensor, normalise: str = "all") -> list[Tensor]:
    """Per layer [B, G, L]: column sums of the eager attention of the rows behind the prompt, mean over a group."""
    embed = model.get_input_embeddings()
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(inputs_embeds=torch.cat([embed(prompt), rows], 1), output_attentions=True)
    model.set_attn_implementation(before)
    scores = []
    for weights in out.attentions:
        part = weights[:, :, prompt.shape[1] :, : prompt.shape[1]]
        if normalise == "prompt":
            part = part / part.sum(-1, keepdim=True)
        groups = model.config.num_key_value_heads
        scores.append(part.sum(2).unflatten(1, (groups, -1)).mean(2))
    return scores


def _sets(scores: Tensor, keep: int) -> Tensor:
    return scores.topk(keep, -1).indices.sort(-1).values


@pytest.mark.parametrize("normalise", ["all", "prompt"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_selection_is_the_top_of_eager_column_sums(kind: str, normalise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly `budget` prompt tokens per KV head, by the attention of the rows behind; nothing else stays."""
    model, prompt, score_of, scored = tiny(kind), tokens(2, 60), FromBehind.score, []

    def look(self: FromBehind, call: Call, store: LayerStore) -> Tensor:
        scored.append(score_of(self, call, store))
        return scored[-1]

    monkeypatch.setattr(FromBehind, "score", look)
    ends = torch.cat([prompt[:, :4], prompt[:, -28:]], 1)
    expected = _eager_scores(model, prompt, model.get_input_embeddings()(ends), normalise)
    full = model(prompt).logits
    with elision.apply(model, "dapq", budget=20, normalise=normalise) as run, torch.no_grad():
        cache = run.cache()
        out = model(prompt, past_key_values=cache)
        kept = run.kept(cache)
        assert cache.get_seq_length() == 60
        assert set(run.report().slots.values()) == {20}
    torch.testing.assert_close(out.logits, full, atol=1e-5, rtol=0)
    assert out.logits.shape[1] == 60
    for layer, (score, ours) in enumerate(zip(expected, scored, strict=True)):
        torch.testing.assert_close(ours, score, atol=1e-5, rtol=1e-5)
        mass = ours.sum(-1)  # of 32 rows; what they paid to each other is not in it
        assert bool((mass < 32).all() if normalise == "all" else (mass - 32).abs().max() < 1e-4)
        assert torch.equal(kept[layer], _sets(score, 20))


def test_true_continuation_is_the_oracle() -> None:
    """With the greedy continuation as content the kept set is the one that decoding itself attends to most."""
    model, prompt = tiny(), tokens(1, 50)
    rest = model.generate(prompt, max_new_tokens=12, do_sample=False)[:, 50:]
    model.set_attn_implementation("eager")
    out = model(torch.cat([prompt, rest], 1), output_attentions=True)
    model.set_attn_implementation("sdpa")
    options = {"content": "fixed", "ids": tuple(rest[0].tolist()), "window": 12}
    with elision.apply(model, "dapq", budget=16, **options) as run:
        cache = run.cache()
        model(prompt, past_key_values=cache)
        kept = run.kept(cache)
    for layer, weights in enumerate(out.attentions):
        score = weights[:, :, 50:, :50].sum(2).unflatten(1, (2, 2)).mean(2)
        assert torch.equal(kept[layer], _sets(score, 16))


@pytest.mark.parametrize("budget", [50, 64, 1.0])
def test_prompts_that_fit_are_not_observed(budget: Any) -> None:
    model, prompt = tiny(), tokens(1, 50)
    full = model.generate(prompt, max_new_tokens=10, do_sample=False)
    seen = []
    run = elision.apply(model, "dapq", budget=budget)
    handle = model.model.norm.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    assert torch.equal(model.generate(prompt, max_new_tokens=10, do_sample=False), full)
    handle.remove()
    assert run.report().tokens_seen == 59
    assert seen == [50] + [1] * 9
    with pytest.warns(elision.ElisionWarning, match="left nothing out"):
        run.remove()


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3"])
def test_decoding_reads_what_was_kept_at_true_positions(kind: str) -> None:
    """Logits equal those of the full cache with everything else masked, layer by layer and head by head."""
    model, prompt, rest = tiny(kind), tokens(1, 60), tokens(1, 8, 2)
    with elision.apply(model, "dapq", budget=24, window=16) as run:
        cache = run.cache()
        logits = forced(model, prompt, rest, cache)
        kept = {i: k[0] for i, k in run.kept(cache).items()}
    assert torch.equal(logits[:, 0], model(prompt).logits[:, -1]) or torch.allclose(
        logits[:, 0], model(prompt).logits[:, -1], atol=1e-5
    )
    expected = masked(model, prompt, rest, kept)
    torch.testing.assert_close(logits[:, 1:], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
@pytest.mark.parametrize("content", ["ends", "random", "span"])
def test_rows_of_a_batch_are_single_runs(kind: str, content: str) -> None:
    model, rest = tiny(kind), tokens(3, 6, 2)
    prompts = [tokens(1, n, 3 + n)[0] for n in (50, 37, 12)]
    ids, mask = left_padded(prompts)
    options = {"budget": 16, "window": 14, "content": content}
    with elision.apply(model, "dapq", **options) as run:
        cache = run.cache()
        logits = forced(model, ids, rest, cache, mask)
        kept = run.kept(cache)
        for row, prompt in enumerate(prompts):
            alone = run.cache()
            single = forced(model, prompt[None], rest[row : row + 1], alone)
            torch.testing.assert_close(logits[row], single[0], atol=1e-4, rtol=1e-4)
            for layer, mine in run.kept(alone).items():
                theirs = kept[layer][row]
                shift = ids.shape[1] - len(prompt)
                assert [r[r >= 0].sub(shift).tolist() for r in theirs] == mine[0].expand(2, -1).tolist()


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_chunks_are_one_prompt(kind: str) -> None:
    model, prompt, rest = tiny(kind), tokens(2, 60), tokens(2, 6, 2)
    with elision.apply(model, "dapq", budget=16) as run, torch.no_grad():
        whole, parts = run.cache(), run.cache()
        expected = forced(model, prompt, rest, whole)
        run.prompt(60)
        for start, stop in [(0, 16), (16, 45), (45, 59)]:
            model(prompt[:, start:stop], past_key_values=parts)
        logits = forced(model, prompt[:, 59:], rest, parts)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        for layer, kept in run.kept(whole).items():
            assert torch.equal(run.kept(parts)[layer], kept)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_guesses_of_prompt_lookup_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first forward already carries guesses: the kept set and the continuation's positions are the usual ones."""
    model, guesses, observe = tiny(kind), set(), FromBehind.observe

    def look(self: FromBehind, call: Call) -> None:
        guesses.add(call.drafts)
        observe(self, call)

    monkeypatch.setattr(FromBehind, "observe", look)
    prompt = tokens(1, 12).repeat(1, 5)
    with elision.apply(model, "dapq", budget=24, window=16) as run:
        plain, assisted = run.cache(), run.cache()
        model.generate(prompt, past_key_values=plain, max_new_tokens=12, do_sample=False)
        model.generate(prompt, past_key_values=assisted, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4)
        assert assisted.get_seq_length() >= 71
        assert guesses == {0, 4}
        if kind == "Llama":  # in sliding layers the rows do see guesses
            for layer, kept in run.kept(plain).items():
                theirs = run.kept(assisted)[layer]
                assert torch.equal(kept[..., :24], theirs[..., :24])
                assert theirs[..., 24:].tolist() == [[list(range(60, assisted.get_seq_length()))] * 2]


def test_a_second_turn() -> None:
    """The new turn reads what is left, is observed by its own pseudo tokens and brings the layer to its budget."""
    model, first, second = tiny(), tokens(1, 40), tokens(1, 30, 5)
    with elision.apply(model, "dapq", budget=16) as run, torch.no_grad():
        cache = run.cache()
        model(first, past_key_values=cache)
        before = run.kept(cache)
        logits = model(second, past_key_values=cache).logits
        assert cache.get_seq_length() == 70
        assert set(run.report().slots.values()) == {16}
        for layer, kept in run.kept(cache).items():
            for group in range(2):
                old = kept[0, group][kept[0, group] < 40]
                assert set(old.tolist()) <= set(before[layer][0, group].tolist())
    torch.testing.assert_close(
        logits, masked(model, first, second, {i: k[0] for i, k in before.items()}), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("length", "window"), [(5, 32), (40, 1), (3, 2)])
def test_short_prompts_and_single_rows(length: int, window: int) -> None:
    model, prompt = tiny(), tokens(1, length)
    with elision.apply(model, "dapq", budget=2, window=window, head=min(4, window)) as run:
        out = model.generate(prompt, max_new_tokens=4, do_sample=False)
        assert out.shape[1] == length + 4
        assert set(run.report().slots.values()) == {5}


def test_content() -> None:
    embed = torch.nn.Embedding(50, 4)
    prompt = torch.arange(20.0)[None, :, None].expand(2, 20, 4).contiguous()
    valid = torch.arange(20)[None] >= torch.tensor([[0], [15]])

    def rows(**options: Any) -> Tensor:
        return PseudoTokens(DapQ(**options), 0).rows(prompt, valid, embed)[..., 0]

    assert rows(window=6, head=2).tolist() == [[0, 1, 16, 17, 18, 19], [15, 16, 16, 17, 18, 19]]
    assert rows(window=8, head=2).tolist()[1] == [15, 16, 15, 15, 16, 17, 18, 19]
    span = rows(window=4, content="span")
    assert (span.diff(dim=1) == 1).all()
    random = rows(window=4, content="random")
    assert torch.equal(random, rows(window=4, content="random"))
    assert not torch.equal(random, rows(window=4, content="random", seed=1))
    assert (random[1] >= 15).all()
    fixed = PseudoTokens(DapQ(window=5, content="fixed", ids=(7, 9)), 0).rows(prompt, valid, embed)
    assert torch.equal(fixed[1], embed(torch.tensor([7, 9, 7, 9, 7])))
    for wrong in (50, -1):
        with pytest.raises(elision.errors.OptionError, match=f"ids has {wrong}, but .* token ids from 0 to 49"):
            rows(window=2, content="fixed", ids=(3, wrong, 1))


def test_an_offset_turns_the_rows_only() -> None:
    """Pseudo rows at L + offset: the same scores as those of eager rows at these positions, and the prompt unmoved."""
    model, prompt = tiny(), tokens(1, 40)
    rows = torch.cat([prompt[:, :4], prompt[:, -4:]], 1)
    places = torch.cat([torch.arange(40), 40 + 32 + torch.arange(8)])[None]
    model.set_attn_implementation("eager")
    out = model(torch.cat([prompt, rows], 1), position_ids=places, output_attentions=True)
    model.set_attn_implementation("sdpa")
    full = model(prompt).logits
    with elision.apply(model, "dapq", budget=12, window=8, offset=32) as run:
        cache = run.cache()
        torch.testing.assert_close(model(prompt, past_key_values=cache).logits, full, atol=1e-5, rtol=0)
        for layer, kept in run.kept(cache).items():
            score = out.attentions[layer][:, :, 40:, :40].sum(2).unflatten(1, (2, 2)).mean(2)
            assert torch.equal(kept, _sets(score, 12))


LIMITED: dict[str, dict[str, Any]] = {
    "longrope": {
        "kind": "Phi3",
        "max_position_embeddings": 96,
        "original_max_position_embeddings": 48,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 48,
        },
    },
    "dynamic": {
        "max_position_embeddings": 48,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    },
    "learned": {
        "kind": "OPT",
        "max_position_embeddings": 48,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "num_key_value_heads": None,
    },
}


@pytest.mark.parametrize("how", LIMITED)
@pytest.mark.parametrize("offset", [0, 100])
def test_rows_do_not_pass_the_positions_that_leave_the_prompt_alone(how: str, offset: int) -> None:
    """Beyond them the prompt itself would be turned otherwise, or there is no embedding."""
    model, prompt = tiny(**LIMITED[how]), tokens(2, 40)
    assert position_limit(model.config) == 48
    full = model(prompt).logits
    with elision.apply(model, "dapq", budget=16, offset=offset) as run, torch.no_grad():
        torch.testing.assert_close(model(prompt, use_cache=True).logits, full, atol=1e-5, rtol=0)
        assert set(run.report().slots.values()) == {16}
        if how != "learned":
            longer = tokens(1, 60)
            assert model(longer, use_cache=True).logits.shape[1] == 60


def test_plain_rotation_has_no_limit() -> None:
    assert position_limit(tiny().config) is None
    assert position_limit(tiny("Gemma3").config) is None


def test_protected_tokens_are_the_least_of_a_share() -> None:
    """A share may come to fewer tokens than `recent`: then these are what stays, all of them."""
    model, prompt = tiny(), tokens(1, 50)
    with elision.apply(model, "dapq", budget=0.1, recent=8) as run, torch.no_grad():
        cache = run.cache()
        model(prompt, past_key_values=cache)
        for kept in run.kept(cache).values():
            assert kept.tolist() == [[list(range(42, 50))] * kept.shape[1]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 3}, "head=4 is more than window=3"),
        ({"content": "fixed"}, "fixed content needs token ids"),
        ({"ids": (1,)}, "only fixed content does"),
        ({"budget": 4, "recent": 8}, "budget=4 is smaller than recent=8"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(elision.errors.OptionError, match=words):
        DapQ(**options)


def test_linear_attention_is_refused() -> None:
    with pytest.raises(elision.errors.UnsupportedTarget, match="linear-attention layers"):
        elision.apply(tiny("Qwen3Next"), "dapq")


def test_what_the_decoder_returns_ends_with_the_prompt() -> None:
    """Tuples, hidden states, attention weights and shadow runs know nothing of the rows behind."""
    model, prompt = tiny(), tokens(1, 50)
    model.set_attn_implementation("eager")
    with elision.apply(model, "dapq", budget=16, shadow=True) as run, torch.no_grad():
        out = model(prompt, output_attentions=True, output_hidden_states=True)
        assert {a.shape for a in out.attentions} == {(1, 4, 50, 50)}
        assert {h.shape[1] for h in out.hidden_states} == {50}
        assert model(prompt, use_cache=True, return_dict=False)[0].shape[1] == 50
        assert max(run.report().error.values()) < 1e-6, "the prompt itself is dense"


def test_an_error_on_the_way_leaves_sliding_layers_as_they_were() -> None:
    model, prompt = tiny("Gemma3"), tokens(1, 50)

    def fail(*_: Any) -> None:
        raise KeyError("on the way")

    with elision.apply(model, "dapq", budget=16) as run, torch.no_grad():
        cache = run.cache()
        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="on the way"):
            model(prompt, past_key_values=cache)
        handle.remove()
        assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
        with pytest.raises(elision.ElisionError, match="broke off"):
            model(prompt, past_key_values=cache)
        model(prompt)


def test_rows_follow_the_three_axes_of_an_image_prompt() -> None:
    """Qwen2.5-VL: positions have three axes; the prompt's logits are unmoved and decoding goes on behind it."""
    text = {**SIZES, "num_hidden_layers": 2, "vocab_size": 99}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text.pop("head_dim")
    sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    ids = {"image_token_id": 95, "video_token_id": 96, "vision_start_token_id": 93, "vision_end_token_id": 94}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**sight, "fullatt_block_indexes": [0]}, **ids)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    words = tokens(1, 40) % 90
    prompt = torch.cat([words[:, :20], torch.tensor([[93, 95, 95, 95, 95, 94]]), words[:, 20:]], 1)
    inputs = {
        "input_ids": prompt,
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (prompt == 95).long(),
    }
    with torch.no_grad():
        full = model(**inputs).logits
        with elision.apply(model, "dapq", budget=16) as run:
            torch.testing.assert_close(model(**inputs, use_cache=True).logits, full, atol=1e-5, rtol=0)
            assert model.generate(**inputs, max_new_tokens=6).shape[1] == 52
            assert set(run.report().slots.values()) == {16 + 5}
