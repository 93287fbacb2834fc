"""Attention rows of single tokens: how they are remembered from step to step, and how much two of them differ.

Keeping the whole N × N attention of every layer only to compare a few rows would cost more than the comparison saves.
A layer that took every position therefore leaves its queries and keys behind, and a row is worked out from them if its
token turns out to be wanted. A layer that took a few positions leaves the rows that it had to compute anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elision.dllm.model import Block
from elision.tensors.slots import Rows


def over_heads(weights: Tensor, how: str) -> Tensor:
    """Attention weights [B, G, g, m, n] of all heads as one [B, m, n]."""
    flat = weights.flatten(1, 2)
    return flat.mean(dim=1) if how == "mean" else flat.amax(dim=1)


class Drift:
    """Cosines between the attention rows of the same tokens at two steps, with everything about the first prepared.

    Args:
        before: rows [B, τ, n] of the first step, by layer.
        valid: [L, B, τ] which of them count.
        how: rows, σ is the mean of the cosines of the rows; joined, one cosine over all of them joined.
    """

    def __init__(self, before: list[Tensor], valid: Tensor, how: str) -> None:
        self.joined = how == "joined"
        self.before = before
        count = valid.sum(dim=2, keepdim=True)
        self._none = (count[:, :, 0] == 0).float()  # a batch row without any has σ = 1
        self._weight = valid / count.clamp(min=1)
        self._keep = valid[:, :, :, None].float()
        if self.joined:
            self._unit = [x * keep for x, keep in zip(before, self._keep, strict=True)]
            self._unit = [x / _norm(x.flatten(1), keepdim=True)[:, :, None] for x in self._unit]
        else:
            self._unit = [x / _norm(x, keepdim=True) for x in before]

    def sigma(self, layer: int, now: Tensor) -> Tensor:
        """σ [B] of `layer` with rows now [B, τ, n]."""
        dots = (self._unit[layer] * now).sum(dim=2)  # [B, τ]
        if self.joined:
            cosine: Tensor = dots.sum(dim=1) / _norm((now * self._keep[layer]).flatten(1))
        else:
            cosine = (dots / _norm(now) * self._weight[layer]).sum(dim=1)
        return cosine + self._none[layer]


def _norm(x: Tensor, *, keepdim: bool = False) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=keepdim)
    return size.clamp(min=1e-30)


class RowMemory:
    """The last attention row of every token at every layer.

    Args:
        blocks: the layers.
        batch, length: B and N.
        mask: padding mask of the keys [B, 1, 1, N], or None.
        heads: how heads become one, see `over_heads`.
    """

    def __init__(self, blocks: list[Block], batch: int, length: int, mask: Tensor | None, heads: str) -> None:
        self.blocks, self.length, self.mask, self.heads = blocks, length, mask, heads
        self._whole: list[tuple[Tensor, Tensor] | None] = [None] * len(blocks)
        self._single: list[Tensor | None] = [None] * len(blocks)
        self._has = torch.zeros(len(blocks), batch, length, dtype=torch.bool)
        self.batch = batch

    def took_all(self, layer: int, q: Tensor, k: Tensor) -> None:
        """Layer `layer` took positions 0 .. N' of q [B, N', Hq, D] over keys k [B, N, G, D]."""
        self._whole[layer] = (q, k)
        self._has[layer] = False

    def took(self, layer: int, rows: Rows, attention: Tensor) -> None:
        """Layer `layer` took `rows` alone and has their attention [B, m, N]."""
        held = self._single[layer]
        if held is None:
            held = self._single[layer] = attention.new_zeros(self.batch * self.length, self.length)
        held.index_copy_(0, rows.flat, attention.flatten(0, 1))
        if self._has.device != rows.pos.device:
            self._has = self._has.to(rows.pos.device)
        self._has[layer].scatter_(1, rows.pos, True)

    def forget(self) -> None:
        """Only what the coming step computes shall count."""
        self._whole = [None] * len(self.blocks)
        self._has.zero_()

    def recall(self, rows: Rows) -> tuple[list[Tensor], Tensor]:
        """The last rows [B, τ, N] of `rows` at every layer, and [L, B, τ] which of them exist."""
        if self._has.device != rows.pos.device:
            self._has = self._has.to(rows.pos.device)
        has = self._has.gather(2, rows.pos.expand(len(self.blocks), -1, -1))
        complete = has.flatten(1).all(dim=1).tolist()
        out, valid = [], has.clone()
        for layer, block in enumerate(self.blocks):
            single, whole = self._single[layer], self._whole[layer]
            found = None
            if single is not None:
                found = single.index_select(0, rows.flat).view(*rows.pos.shape, self.length)
            if not complete[layer] and whole is not None:
                q, k = whole
                inside = rows.pos.clamp(max=q.shape[1] - 1)  # rows behind it have been taken alone since
                picked = q.gather(1, inside[:, :, None, None].expand(-1, -1, *q.shape[2:]))
                made = over_heads(block.weights(picked, k, self.mask), self.heads)
                found = made if found is None else torch.where(has[layer][:, :, None], found, made)
                valid[layer] |= rows.pos < q.shape[1]
            assert found is not None or whole is not None or not bool(has[layer].any())
            out.append(
                rows.pos.new_zeros(*rows.pos.shape, self.length, dtype=torch.float32) if found is None else found
            )
        return out, valid

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is held."""
        for pair in self._whole:
            yield from pair or ()
        yield from (tensor for tensor in self._single if tensor is not None)
