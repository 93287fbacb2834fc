"""A store with one slot per position: full-length K, V and, where wanted, H of every layer, writable row by row.

Bidirectional models revise any position at any step, so the cache has no growth and no order: slot n belongs to
position n from the first call to the last. Rows lie together in memory ([B · N, ...]), so that one flat index serves
every batch row and every layer of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A set of positions per batch row, as indices.

    Rows of a batch may hold different numbers of positions; the shorter ones repeat their first position, which is
    harmless wherever results are written back by position.

    Attributes:
        pos: [B, m] positions in ascending order.
        flat: [B · m] the same as indices into [B · N] rows.
        count: real positions of every batch row.
        length: N.
    """

    pos: Tensor
    flat: Tensor
    count: tuple[int, ...]
    length: int

    @classmethod
    def where(cls, chosen: Tensor) -> Rows:
        """The positions at which `chosen` [B, N] is true (one transfer to the host).

        A batch row that has none while others have some is given position 0. The set of a whole empty batch has m = 0.
        """
        batch, length = chosen.shape
        if batch == 1:
            flat = chosen[0].nonzero()[:, 0]
            return cls(flat[None], flat, (len(flat),), length)
        counts: list[int] = chosen.sum(dim=1).tolist()
        most = max(counts)
        pos = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        if min(counts) < most:
            limit = torch.tensor(counts, device=pos.device)[:, None]
            first = torch.where(limit > 0, pos[:, :1], 0)
            pos = torch.where(torch.arange(most, device=pos.device) < limit, pos, first)
        return cls._of(pos, tuple(max(n, min(1, most)) for n in counts), length)

    @classmethod
    def _of(cls, pos: Tensor, count: tuple[int, ...], length: int) -> Rows:
        offset = torch.arange(pos.shape[0], device=pos.device)[:, None] * length
        return cls(pos, (pos + offset).reshape(-1), count, length)

    def repeat(self, times: int) -> Rows:
        """The same sets for a batch that is repeated `times` times."""
        if times == 1:
            return self
        return self._of(self.pos.repeat(times, 1), self.count * times, self.length)

    def mask(self) -> Tensor:
        """[B, N], true at the positions of the set."""
        out = torch.zeros(self.pos.shape[0], self.length, dtype=torch.bool, device=self.pos.device)
        return out.scatter_(1, self.pos, True)

    def real(self) -> Tensor:
        """[B, m], false at the positions that are repeated to fill up."""
        place = torch.arange(self.pos.shape[1], device=self.pos.device)
        return place < torch.tensor(self.count, device=self.pos.device)[:, None]

    def index_in(self, other: Rows) -> tuple[Tensor, Tensor]:
        """Where each position stands in `other`: index [B, m] into its rows, and whether it is there at all."""
        batch, width = other.pos.shape
        place = torch.full((batch, self.length), -1, dtype=torch.long, device=self.pos.device)
        # from the back, so that the first of repeated positions stays
        order = torch.arange(width - 1, -1, -1, device=self.pos.device).expand(batch, -1)
        place.scatter_(1, other.pos.flip(1), order)
        found = place.gather(1, self.pos)
        return found.clamp(min=0), found >= 0


class RowSlots:
    """Full-length K, V and H of every layer.

    Args:
        layers: number of layers L.
        batch: B.
        length: N, fixed for the life of the store.
        kv_heads: G.
        head_dim: D.
        hidden: width of H, the input of every layer; None keeps none.

    K and V of a layer are [B, N, G, D], H is [B, N, d]. Nothing is allocated before the first write.
    """

    def __init__(
        self, layers: int, batch: int, length: int, kv_heads: int, head_dim: int, *, hidden: int | None = None
    ) -> None:
        self.layers = layers
        self.shape = (batch, length, kv_heads, head_dim)
        self.hidden = hidden
        self._k: list[Tensor | None] = [None] * layers
        self._v: list[Tensor | None] = [None] * layers
        self._h: list[Tensor | None] = [None] * layers

    def k(self, layer: int) -> Tensor:
        """Keys of `layer`, [B, N, G, D]."""
        return self._held(self._k, layer)

    def v(self, layer: int) -> Tensor:
        """Values of `layer`, [B, N, G, D]."""
        return self._held(self._v, layer)

    def h(self, layer: int) -> Tensor:
        """Input of `layer`, [B, N, d]."""
        return self._held(self._h, layer)

    @staticmethod
    def _held(store: list[Tensor | None], layer: int) -> Tensor:
        found = store[layer]
        if found is None:
            raise LookupError(f"layer {layer} has no rows yet: fill it before reading or writing parts of it")
        return found

    def fill(self, layer: int, k: Tensor, v: Tensor, reach: int | None = None) -> None:
        """Write K and V [B, N', G, D] of all positions, or of the first `reach` = N'."""
        for store, new in ((self._k, k), (self._v, v)):
            self._fill(store, layer, new, reach)

    def fill_h(self, layer: int, h: Tensor, reach: int | None = None) -> None:
        """Write H [B, N', d] of all positions, or of the first `reach` = N'."""
        if self.hidden is not None:
            self._fill(self._h, layer, h, reach)

    def _fill(self, store: list[Tensor | None], layer: int, new: Tensor, reach: int | None) -> None:
        held = store[layer]
        if held is None:
            if new.shape[1] != self.shape[1]:
                raise LookupError(f"layer {layer} has no rows yet: its first write must cover all {self.shape[1]}")
            store[layer] = new.clone(memory_format=torch.contiguous_format)
        elif reach is None:
            held.copy_(new)
        else:
            held[:, :reach].copy_(new)

    def write(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        """Overwrite K and V at `rows`; k, v [B, m, G, D]."""
        for store, new in ((self._k, k), (self._v, v)):
            self._held(store, layer).flatten(0, 1).index_copy_(0, rows.flat, new.flatten(0, 1))

    def write_h(self, layer: int, rows: Rows, h: Tensor) -> None:
        """Overwrite H [B, m, d] at `rows`."""
        if self.hidden is not None:
            self._held(self._h, layer).flatten(0, 1).index_copy_(0, rows.flat, h.flatten(0, 1))

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is held."""
        for store in (self._k, self._v, self._h):
            yield from (tensor for tensor in store if tensor is not None)
