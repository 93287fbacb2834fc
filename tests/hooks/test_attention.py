"""Scaled dot product attention as it happens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from elision.hooks.attention import AttentionCalls


def test_calls_are_seen_by_name_and_changed() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    seen: list[Mapping[str, Any]] = []

    def change(call: Mapping[str, Any]) -> Mapping[str, Any] | None:
        seen.append(call)
        return {**call, "value": call["value"] * 2} if len(seen) > 1 else None

    want = scaled_dot_product_attention(q, k, v, scale=0.3)
    with AttentionCalls(change):
        same = scaled_dot_product_attention(q, k, v, None, 0.0, scale=0.3)
        twice = scaled_dot_product_attention(query=q, key=k, value=v, scale=0.3)
        torch.relu(q)
    assert torch.equal(same, want)
    assert torch.allclose(twice, 2 * want)
    assert [sorted(call) for call in seen] == [
        ["attn_mask", "dropout_p", "key", "query", "scale", "value"],
        ["key", "query", "scale", "value"],
    ]
    assert torch.equal(scaled_dot_product_attention(q, k, v, scale=0.3), want)
    assert len(seen) == 2
