"""Pseudo rows: put behind a prompt to observe it, passed through the model with it, and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from elision.errors import UnsupportedTarget

if TYPE_CHECKING:
    from elision.hooks.transformers import Host
    from elision.kv.engine import Forward
    from elision.kv.parts import Pseudo


def check_pseudo(host: Host, pseudo: Pseudo | None) -> None:
    """Raise where the model cannot take pseudo rows out again."""
    if pseudo is None:
        return
    kinds = [type(layer).__name__ for layer in DynamicCache(config=host.config).layers]
    linear = [kind for kind in kinds if "Linear" in kind]
    if linear:
        raise UnsupportedTarget(
            f"{type(host.decoder).__name__} has linear-attention layers ({linear[0]}): pseudo rows would stay in their "
            "state; use a method that observes the prompt's own rows, such as snapkv"
        )


def position_limit(config: Any) -> int | None:
    """The first position at which the model has no embedding, or turns its prompt otherwise; None if there is none.

    Learned positions end with their table. Where the longest position decides about the rotation of all (longrope,
    dynamic), rows behind a prompt that stays below the limit would change the prompt itself.
    """
    rope = getattr(config, "rope_parameters", None)
    most = getattr(config, "max_position_embeddings", None)
    if not rope:
        return most
    found = []
    for kind in [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]:
        name = str(kind.get("rope_type"))
        if name == "longrope":
            found.append(kind.get("original_max_position_embeddings", most))
        elif "dynamic" in name:
            found.append(most)
    return min((limit for limit in found if limit is not None), default=None)


def observe(
    pseudo: Pseudo,
    embed: Callable[[Tensor], Tensor],
    forward: Forward,
    kwargs: dict[str, Any],
    limit: int | None = None,
) -> None:
    """Put `pseudo` rows behind the last part of a prompt, at the positions that follow it.

    Those that a prompt below position `limit` would have at or beyond it are given the last one before it.
    """
    state, drafts = forward.book.state, forward.drafts
    embeds = kwargs.get("inputs_embeds")
    embeds = embed(kwargs["input_ids"]) if embeds is None else embeds
    parts = [] if forward.starts else state.get("prompt", [])
    of_prompt = forward.m - drafts
    parts = [*parts, (embeds[:, :of_prompt], None if forward.valid is None else forward.valid[:, :of_prompt])]
    if forward.phase == "prompt_chunk":
        state["prompt"] = parts
        return
    state.pop("prompt", None)
    if not pseudo.wanted(forward.lengths - drafts):
        return
    rows = pseudo.rows(torch.cat([e for e, _ in parts], 1), _joined(parts), embed)
    kwargs["input_ids"], kwargs["inputs_embeds"] = None, torch.cat([embeds, rows.to(embeds)], 1)
    mask, places, b, n = kwargs.get("attention_mask"), kwargs.get("position_ids"), len(rows), rows.shape[1]
    end = forward.first + of_prompt + n + max(pseudo.offset, 0)
    if places is None and (pseudo.offset or drafts or (limit is not None and end > limit)):
        places = torch.arange(forward.first, forward.first + forward.m, device=rows.device)[None]
    if places is not None:
        after = torch.arange(1, n + 1, device=places.device) + pseudo.offset
        behind = places[..., of_prompt - 1 : of_prompt] + after
        if limit is not None and end > limit > int(places.max()):
            behind = behind.clamp(max=limit - 1)
        kwargs["position_ids"] = torch.cat([places, behind], -1)
    if mask is not None:
        kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(b, n)], 1)
    if forward.valid is not None:
        forward.valid = torch.cat([forward.valid, forward.valid.new_ones(b, n)], 1)
    forward.extra, forward.m, forward.lengths = n, forward.m + n, forward.lengths + n


def without_pseudo(out: Any, m: int) -> Any:
    """What the decoder returned for the first m rows alone."""
    if isinstance(out, tuple):
        return (out[0][:, :m], *out[1:])
    out.last_hidden_state = out.last_hidden_state[:, :m]
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(h[:, :m] for h in out.hidden_states)
    if getattr(out, "attentions", None) is not None:
        extra = out.attentions[0].shape[2] - m
        out.attentions = tuple(a[:, :, :m, : a.shape[3] - extra] for a in out.attentions)
    return out


def _joined(parts: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """Which tokens of a prompt that came in parts are real, [B, S]; None if all are."""
    if all(valid is None for _, valid in parts):
        return None
    return torch.cat([e.new_ones(e.shape[:2], dtype=torch.bool) if v is None else v for e, v in parts], 1)


@contextmanager
def keep_all(cache: Any, extra: int) -> Iterator[None]:
    """Let sliding layers keep what they would drop while pseudo rows pass, and take these rows out of them again."""
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)] if extra else []
    recorded = [getattr(layer, "record_past", False) for layer in layers]
    try:
        for layer in layers:
            layer.record_past = True
        yield
        for layer, before in zip(layers, recorded, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :-extra], layer.values[:, :, :-extra]
            if layer.is_sliding:
                layer.cumulative_length -= extra
                if not before:  # else whoever records will crop it
                    layer.crop(0)
    finally:
        for layer, before in zip(layers, recorded, strict=True):
            layer.record_past = before
