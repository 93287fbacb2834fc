"""Attention over a layer's store: what queries see, under which mask, and the log-sum-exp where it comes for free."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elision.hooks.transformers import Attention, Out, implementation

if TYPE_CHECKING:
    from elision.kv.engine import Forward, KVApplied
    from elision.kv.store import LayerStore

Seen = tuple[Tensor, Tensor, Out, Tensor | None]


def attend(session: KVApplied, att: Attention, forward: Forward, store: LayerStore) -> Seen:
    """Attention of the new queries over every slot of `store`, whose newest slots are theirs.

    Returns:
        queries [B, Hq, m, D] and keys [B, G, n, D] as they entered the dot product, the output, and the log-sum-exp of
        the logits [B, Hq, m] if the kernel gave it.
    """
    keys, values = store.read(forward.book.scratch)
    q = att.q
    if att.rotary is not None:
        q, keys = _roll(session, att, forward, store, keys)
    mask = mask_for(att, forward, store)
    if forward.extra and forward.drafts:
        mask = _without_drafts(att, forward, mask, store.n)
    if session.method.wants_lse and mask is None and att.q.shape[2] > 1 and _has_kernel(att, q, values):
        # the same kernel that SDPA picks, which computes the log-sum-exp anyway
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys, values, 0.0, True, attn_mask=None, scale=att.scale
        )
        return q, keys, (out.transpose(1, 2).contiguous(), None), lse
    return q, keys, att.run(q, keys, values, mask), None


def _has_kernel(att: Attention, q: Tensor, v: Tensor) -> bool:
    plain = implementation(att.module) == "sdpa" and not att.extra.get("dropout") and att.softcap is None
    return plain and q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and not q.requires_grad


def mask_for(att: Attention, forward: Forward, store: LayerStore) -> Tensor | None:
    """The model's own mask while nothing left; then validity of the stored slots beside causality of the new ones.

    None means what it means to the model: causal for several queries over their own keys, everything for a single one.
    """
    if store.intact and forward.book.intact:
        return att.mask
    m = att.q.shape[2]
    stored = store.n - m
    new = None if att.mask is None else att.mask[..., -m:]
    valid = store.valid()
    if stored == 0 or (m == 1 and valid is None):
        return new if stored == 0 else None
    if valid is None and new is None:
        made = forward.masks.get(stored)
        if made is None:
            causal = torch.ones(m, m, dtype=torch.bool, device=att.q.device).tril()
            made = torch.cat([causal.new_ones(m, stored), causal], 1)[None, None]
            forward.masks[stored] = made
        return made
    return _with_validity(att, new, valid, stored)


def _without_drafts(att: Attention, forward: Forward, mask: Tensor | None, n: int) -> Tensor:
    """Pseudo rows stand right behind the prompt, so they do not see the guesses that lie between."""
    m = att.q.shape[2]
    seen = torch.ones(m, n, dtype=torch.bool, device=att.q.device).tril(n - m)
    seen[m - forward.extra :, n - forward.extra - forward.drafts : n - forward.extra] = False
    if mask is None:
        return seen[None, None]
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _with_validity(att: Attention, new: Tensor | None, valid: Tensor | None, stored: int) -> Tensor:
    b, heads, m = att.q.shape[:3]
    if new is None:
        new = torch.ones(m, m, dtype=torch.bool, device=att.q.device).tril()[None, None]
    elif new.dtype != torch.bool:
        new = new >= 0
    if valid is None:
        left = new.new_ones(1, 1, 1, stored)
    else:
        left = valid[:, :, None, :stored]
        if left.shape[1] > 1:
            left = left.repeat_interleave(heads // left.shape[1], 1)
    shape = (max(b, 1), max(left.shape[1], new.shape[1]), m)
    return torch.cat([left.expand(*shape, stored), new.expand(*shape, m)], -1)


def _roll(
    session: KVApplied, att: Attention, forward: Forward, store: LayerStore, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and unrotated keys turned to the index of their slot among the real ones of their row."""
    n, m = keys.shape[2], att.q.shape[2]
    if n not in forward.rotary:
        forward.rotary[n] = _angles(session, att, torch.arange(n, device=keys.device)[None])
    cos, sin = forward.rotary[n]
    place = _places(store)
    if place is not None:
        cos, sin = _at(forward, place, cos, sin)
    keys = att.turn(keys, cos, sin)
    q = att.turn(att.q, cos[:, n - m :], sin[:, n - m :])
    return q, keys


def _at(forward: Forward, place: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin at `place` [B, n], kept for the next layer, which mostly agrees (asking a GPU would be a wait)."""
    last = forward.placed
    if last is not None and place.device.type == "cpu" and torch.equal(last[0], place):
        return last[1], last[2]
    picked = [table[0].index_select(0, place.reshape(-1)).view(*place.shape, -1) for table in (cos, sin)]
    forward.placed = (place, picked[0], picked[1])
    return picked[0], picked[1]


def _places(store: LayerStore) -> Tensor | None:
    """Index of every slot among the real ones of its row, [B, n]; None if that is the index of the slot.

    Where heads hold different tokens, slots lie in the order of time; otherwise positions say what the order is.
    """
    valid, places = store.valid(), store.dense.get("pos")
    if valid is None and (places is None or places.shape[1] > 1):
        return None
    if places is None or places.shape[1] > 1:
        assert valid is not None
        return valid[:, 0].long().cumsum(-1).sub(1).clamp(min=0)  # padding lies first, in all heads alike
    places = places[:, 0]
    order = (places if valid is None else places.masked_fill(~valid[:, 0], -1)).argsort(-1)
    n = torch.arange(order.shape[1], device=order.device)
    rank = torch.empty_like(order).scatter_(-1, order, n.expand_as(order))
    return rank if valid is None else (rank - (~valid[:, 0]).sum(-1, keepdim=True)).clamp(min=0)


def _angles(session: KVApplied, att: Attention, places: Tensor) -> tuple[Tensor, Tensor]:
    embed: Any = session.host.decoder.rotary_emb
    kinds = inspect.signature(embed.forward).parameters
    more = {"layer_type": session.host.config.layer_types[att.layer]} if "layer_type" in kinds else {}
    cos, sin = embed(att.v, places, **more)
    return cos, sin
