"""Tiny random models of several architectures."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import elision

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MORE: dict[str, dict[str, Any]] = {
    "Gemma3": {
        "sliding_window": 16,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 8,
    },
    "Qwen3Next": {
        "num_hidden_layers": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


def tiny(kind: str = "Llama", seed: int = 0, **more: Any) -> Any:
    """A random causal language model whose weights are large enough for attention to be uneven."""
    torch.manual_seed(seed)
    config = {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config")
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, config)(**{**SIZES, **MORE.get(kind, {}), **more})
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(0, 0.25)
            elif "embed" in name:
                weight.normal_(0, 1.0)
    return model.eval()


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts [n_i] as one batch [B, S], padded on the left, and its mask."""
    longest = max(len(p) for p in prompts)
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in prompts])
    return ids, mask


@torch.no_grad()
def forced(model: Any, prompt: Tensor, rest: Tensor, cache: Any = None, mask: Tensor | None = None) -> Tensor:
    """Logits after the prompt and after every token of `rest`, [B, T + 1, V]; positions follow the mask."""
    logits, ids = [], prompt
    for t in range(rest.shape[1] + 1):
        places = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(ids, past_key_values=cache, attention_mask=mask, position_ids=places, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[:, -1])
        ids = rest[:, t : t + 1]
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(logits, 1)


@torch.no_grad()
def masked(model: Any, prompt: Tensor, rest: Tensor, kept: dict[int, Tensor]) -> Tensor:
    """A slow reference: prompt rows see everything, later rows only what a layer's KV head kept (and later tokens)."""
    length, heads = prompt.shape[1], model.config.num_attention_heads
    base = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> Any:
        n = k.shape[2]
        seen = torch.ones(1, heads, n, n, dtype=torch.bool).tril()
        if mask is not None:
            seen &= mask
        if module.layer_idx in kept:
            out = torch.ones(len(kept[module.layer_idx]), n, dtype=torch.bool)
            out[:, :length] = False
            out.scatter_(1, kept[module.layer_idx], True)
            seen[:, :, length:] &= out.repeat_interleave(heads // len(out), 0)[None, :, None]
        return base(module, q, k, v, seen, **more)

    AttentionInterface.register("masked", attention)
    AttentionMaskInterface.register("masked", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("masked")
    try:
        return model(torch.cat([prompt, rest], 1)).logits[:, length:]
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop("masked")
        AttentionMaskInterface._global_mapping.pop("masked")


def held(run: Any, cache: Any, row: int = 0, shift: int = 0) -> list[list[list[int]]]:
    """Positions held by row, layer and head, ascending, `shift` taken off (what the row is padded by)."""
    return [[[p - shift for p in head.tolist() if p >= 0] for head in kept[row]] for kept in run.kept(cache).values()]


def rows_are_single_runs(model: Any, method: Any, lengths: tuple[int, ...], steps: int = 12, **settings: Any) -> None:
    """Each row of a left-padded batch holds and computes what its single run does, after the prompt and at the end."""
    prompts, rest = [tokens(1, n, 3 + n)[0] for n in lengths], tokens(len(lengths), steps, 2)
    ids, mask = left_padded(prompts)
    with elision.apply(model, method, **settings) as run:
        cache = run.cache()
        logits = forced(model, ids, rest, cache, mask)
        for row, prompt in enumerate(prompts):
            alone = run.cache()
            single = forced(model, prompt[None], rest[row : row + 1], alone)
            theirs, mine = held(run, cache, row, ids.shape[1] - len(prompt)), held(run, alone)
            assert [layer[0] for layer in theirs] == [layer[0] for layer in mine], (row, len(prompt))
            torch.testing.assert_close(logits[row], single[0], atol=1e-4, rtol=1e-4)


def chunks_are_one_prompt(model: Any, method: Any, **settings: Any) -> None:
    """A prompt in four parts ends like the whole."""
    prompt, rest = tokens(2, 60), tokens(2, 8, 2)
    with elision.apply(model, method, **settings) as run, torch.no_grad():
        whole, parts = run.cache(), run.cache()
        expected = forced(model, prompt, rest, whole)
        run.prompt(60)
        for start, stop in [(0, 16), (16, 45), (45, 59)]:
            model(prompt[:, start:stop], past_key_values=parts)
        logits = forced(model, prompt[:, 59:], rest, parts)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert held(run, parts) == held(run, whole)
        assert held(run, parts, 1) == held(run, whole, 1)


@torch.no_grad()
def first_layer_is_true(model: Any, run: Any, cache: Any, ids: Tensor) -> None:
    """Values of the first layer depend on the token alone: those held are those of a full run at the same positions."""
    full = model.model.layers[0].self_attn.v_proj(model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)))
    store = cache.layers[0].store
    positions = store.positions()[0].long()
    true = full[0].unflatten(-1, (-1, store.dense["v"].shape[-1])).transpose(0, 1)  # [G, S, D]
    true = true.gather(1, positions[:, :, None].expand(len(true), -1, true.shape[-1]))
    torch.testing.assert_close(store.dense["v"][0], true, atol=1e-5, rtol=1e-5)
