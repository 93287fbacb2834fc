"""Tiny random models of several architectures."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

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
