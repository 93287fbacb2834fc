"""Slow references: a full-length pass in which the K and V of some positions are overwritten, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from elision.dllm import MaskedLM


def full_keys(lm: MaskedLM, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """True rotated K and V [B, N, G, D] of every layer, and logits [B, N, V]."""
    return overwritten(lm, ids, torch.zeros_like(ids, dtype=torch.bool), None)


@torch.no_grad()
def overwritten(
    lm: MaskedLM, ids: Tensor, stale: Tensor, held: tuple[list[Tensor], list[Tensor]] | None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """A pass over all rows in which K and V at `stale` [B, N] are those `held`; written without the library's loop."""
    model = lm.model.model
    position = torch.arange(ids.shape[1])[None]
    cos, sin = model.rotary_emb(model.embed_tokens(ids), position)
    h, keys, values = model.embed_tokens(ids), [], []
    for i, layer in enumerate(model.layers):
        a, x = layer.self_attn, layer.input_layernorm(h)

        def heads(y: Tensor, size: int = a.head_dim) -> Tensor:
            return y.view(*y.shape[:2], -1, size)

        q, k, v = heads(a.q_proj(x)), heads(a.k_proj(x)), heads(a.v_proj(x))
        if hasattr(a, "q_norm"):
            q, k = a.q_norm(q), a.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if held is not None:
            where = stale[:, :, None, None]
            k, v = torch.where(where, held[0][i], k), torch.where(where, held[1][i], v)
        keys.append(k)
        values.append(v)
        groups = q.shape[2] // k.shape[2]
        wide_k, wide_v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) * a.head_dim**-0.5
        o = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), wide_v).flatten(2)
        h = h + a.o_proj(o)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return keys, values, lm.model.lm_head(model.norm(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation of x [B, n, heads, D] in its textbook form."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos[:, :, None] + turned * sin[:, :, None]
