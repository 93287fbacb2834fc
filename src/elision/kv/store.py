"""What a cache layer holds: tables of tokens whose every fact is a column. Imports no transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from elision.session import storage_bytes

MapBatch = Callable[[Tensor], Tensor]


class Slots:
    """A growing table of tokens; each column is [B, G or 1, n, ...].

    Buffers grow by a sixteenth, so that appending costs a small constant and little more than the tokens is held.
    Columns with head dimension 1 are shared by all heads until heads come to differ.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._bytes: int | None = 0
        self.n = 0

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name][:, :, : self.n]

    def get(self, name: str) -> Tensor | None:
        """A column, or None if there is none of that name."""
        return self[name] if name in self._buffers else None

    def __setitem__(self, name: str, column: Tensor) -> None:
        """Put a whole column [B, G or 1, n, ...] in place (or several, one after another, with a new n)."""
        self._buffers[name], self._bytes = _own(column), None

    def drop(self, name: str) -> None:
        """Forget a column."""
        self._buffers.pop(name, None)
        self._bytes = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns there are."""
        return tuple(self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, slack included."""
        if self._bytes is None:
            self._bytes = sum(b.untyped_storage().nbytes() for b in self._buffers.values())
        return self._bytes

    def tensors(self) -> Iterator[Tensor]:
        """Every buffer."""
        yield from self._buffers.values()

    def append(self, **columns: Tensor | float) -> None:
        """Add m tokens at the end; every column must be given, [B, G or 1, m, ...], or a number to fill it with.

        The first tokens of a table need tensors.
        """
        m = next(column.shape[2] for column in columns.values() if isinstance(column, Tensor))
        if self.n == 0:
            self._buffers = {name: _own(column) for name, column in columns.items() if isinstance(column, Tensor)}
            self._bytes = None
        else:
            assert columns.keys() == self._buffers.keys(), (sorted(columns), sorted(self._buffers))
            for name, column in columns.items():
                heads = column.shape[1] if isinstance(column, Tensor) else 1
                self._room(name, m, heads)[:, :, self.n : self.n + m] = column
        self.n += m

    def put(self, start: Tensor, counts: Tensor, **columns: Tensor) -> None:
        """Write the first counts[b, g] of m new tokens from slot start[b, g] on; columns are [B, G or 1, m, ...].

        `start` and `counts` are [B, G]. The table grows to its longest row; slots that nobody wrote hold zeros.
        """
        heads, m = counts.shape[1], next(iter(columns.values())).shape[2]
        need = max(int((start + counts).max()), self.n)
        if self.n == 0:
            self._buffers = {name: _own(column[:, :, :0]) for name, column in columns.items()}
        row, head, j = (torch.arange(m, device=counts.device) < counts[..., None]).nonzero(as_tuple=True)
        for name, column in columns.items():
            buffer = self._room(name, need - self.n, heads)
            buffer[:, :, self.n : need] = 0
            buffer[row, head, start[row, head] + j] = column.expand(-1, heads, *column.shape[2:])[row, head, j]
        self._bytes, self.n = None, need

    def _room(self, name: str, m: int, heads: int) -> Tensor:
        old = self._buffers[name]
        if old.shape[2] >= self.n + m and old.shape[1] >= heads:
            return old
        need = self.n + m
        new = old.new_empty(old.shape[0], max(old.shape[1], heads), need + max(need // 16, 1), *old.shape[3:])
        new[:, :, : self.n] = old[:, :, : self.n]
        self._buffers[name], self._bytes = new, None
        return new

    def gather(self, index: Tensor) -> None:
        """Keep the slots `index` [B, G or 1, k] in that order; buffers shrink to fit."""
        self._buffers = {name: rows(buffer, index) for name, buffer in self._buffers.items()}
        self._bytes, self.n = None, index.shape[2]

    def pick(self, name: str, index: Tensor) -> Tensor:
        """One column at the slots `index` [B, G or 1, k], as a copy."""
        return rows(self._buffers[name], index)

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The columns at the slots `index` [B, G or 1, k], as copies."""
        return {name: rows(buffer, index) for name, buffer in self._buffers.items()}

    def overwrite(self, slot: Tensor) -> None:
        """The newest token takes the place `slot` [B, G or 1], so one token fewer is held; nothing else moves."""
        places: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for name in self._buffers:
            buffer = self._room(name, 0, slot.shape[1])
            b, h, cap = buffer.shape[:3]
            if (h, cap) not in places:
                first = torch.arange(0, b * h * cap, cap, device=buffer.device)
                places[h, cap] = first + slot.expand(b, h).reshape(-1), first + (self.n - 1)
            to, since = places[h, cap]
            flat = buffer.view(b * h * cap, -1)
            flat.index_copy_(0, to, flat.index_select(0, since))
        self.n -= 1

    def truncate(self, n: int) -> None:
        """Keep the first n slots."""
        self.n = min(self.n, n)

    def map_batch(self, f: MapBatch) -> None:
        """Apply `f` (select, repeat, reorder rows) to every column along the batch."""
        self._buffers = {name: f(buffer[:, :, : self.n]).contiguous() for name, buffer in self._buffers.items()}
        self._bytes = None


def _own(column: Tensor) -> Tensor:
    """The tensor itself if it is alone in its storage and plainly laid out, else a copy; never part of a graph."""
    column = column.detach()
    alone = column.is_contiguous() and column.untyped_storage().nbytes() == column.numel() * column.element_size()
    return column if alone else column.clone(memory_format=torch.contiguous_format)


def rows(column: Tensor, index: Tensor) -> Tensor:
    """`column` [B, h, n, ...] at `index` [B, H, k] along the tokens, as [B, max(h, H), k, ...]."""
    b, h, n = column.shape[:3]
    heads = max(h, index.shape[1])
    first = (torch.arange(b * h, device=column.device) * n).view(b, h, 1)
    flat = (first.expand(b, heads, 1) + index.expand(b, heads, -1)).reshape(-1)
    picked = column.reshape(b * h * n, *column.shape[3:]).index_select(0, flat)
    return picked.view(b, heads, index.shape[2], *column.shape[3:])


class Tier(Protocol):
    """Tokens held in packed form; read before the dense ones.

    `meta` carries what is known of each token (`pos`, and `valid` where rows are padded) and travels with the codes.
    """

    meta: Slots

    def read(self, k: Tensor, v: Tensor) -> None:
        """Write the decoded keys and values into `k` and `v` [B, G, n, D]."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that holds codes or parameters."""

    def map_batch(self, f: MapBatch) -> None:
        """Apply `f` to the rows of the batch."""


class LayerStore:
    """The tokens of one layer of one cache.

    Attributes:
        dense: columns k and v (as given), and once tokens left or rows are padded: pos, valid, and what scorers keep.
        tiers: packed tokens, older than the dense ones in reading order.
        seen: tokens that passed this layer; their sequence index is their position here, padding included.
        state: what a method remembers of this layer (tensors have the batch in front); `pads` [B, 1, 1] is how many
            padding tokens each row starts with, absent if none does; `gaps` is there if a row has some further on.
        fills: value of every scorer column for new tokens.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.dense = Slots()
        self.tiers: list[Tier] = []
        self.seen = 0
        self.state: dict[str, Any] = {}
        self.fills: dict[str, float] = {}
        self.pending: Any = None
        self.evicted = self.merged = self.demoted = 0

    @property
    def n(self) -> int:
        """Slots held, per row and head."""
        return self.dense.n + sum(t.meta.n for t in self.tiers)

    @property
    def heads(self) -> int:
        """KV heads, 1 before the first token."""
        return self.dense["k"].shape[1] if "k" in self.dense else 1

    @property
    def intact(self) -> bool:
        """Whether every token is still here, dense and in order."""
        return not self.tiers and "pos" not in self.dense

    @property
    def nbytes(self) -> int:
        """Bytes held for tokens: keys, values, codes, parameters and every per-token fact."""
        packed = storage_bytes(t for tier in self.tiers for t in tier.tensors())
        return self.dense.nbytes + packed + sum(tier.meta.nbytes for tier in self.tiers)

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """Add m new tokens k, v [B, G, m, D]; `valid` [B, m] is False on padding."""
        b, m = k.shape[0], k.shape[2]
        if valid is not None:
            self._count_pads(valid)
        if valid is not None and "valid" not in self.dense and self.dense.n:
            self.dense["valid"] = torch.ones(b, 1, self.dense.n, dtype=torch.bool, device=k.device)
        columns: dict[str, Tensor | float] = {"k": k.detach(), "v": v.detach()}
        if "pos" in self.dense:
            places = torch.arange(self.seen, self.seen + m, dtype=torch.int32, device=k.device) if m > 1 else None
            columns["pos"] = self.seen if places is None else places.expand(b, 1, m)
        if "valid" in self.dense or valid is not None:
            columns["valid"] = True if valid is None else valid[:, None]
        columns.update(self.fills)
        if self.dense.n == 0:
            columns = {name: _filled(x, k) for name, x in columns.items()}
        self.dense.append(**columns)
        self.seen += m

    def _count_pads(self, valid: Tensor) -> None:
        """Padding before the first real token of each row, of which the parts of a prompt may bring more."""
        more = (valid.cumsum(1) == 0).sum(1)[:, None, None]
        pads = self.state.get("pads", torch.zeros_like(more)) if self.seen else torch.zeros_like(more)
        leading = pads == self.seen
        self.state["pads"] = torch.where(leading, pads + more, pads)
        if bool(((~valid).sum(1)[:, None, None] != more * leading).any()):
            self.state["gaps"] = True

    def positions(self) -> Tensor:
        """Sequence index of every slot, [B, G or 1, n] in reading order."""
        held = [t.meta["pos"] for t in self.tiers if t.meta.n]
        if "pos" in self.dense:
            held.append(self.dense["pos"])
        elif self.dense.n:
            k = self.dense["k"]
            first = self.seen - self.dense.n
            held.append(torch.arange(first, self.seen, dtype=torch.int32, device=k.device).expand(len(k), 1, -1))
        if not held:
            return torch.zeros(1, 1, 0, dtype=torch.int32)
        if len(held) == 1:
            return held[0]
        heads = max(p.shape[1] for p in held)
        return torch.cat([p.expand(-1, heads, -1) for p in held], 2)

    def valid(self) -> Tensor | None:
        """Which slots hold a real token, [B, G or 1, n] in reading order; None if all do."""
        parts = [*((t.meta, t.meta.n) for t in self.tiers if t.meta.n), (self.dense, self.dense.n)]
        if all("valid" not in slots for slots, _ in parts):
            return None
        b, device = len(self.dense["k"]), self.dense["k"].device
        ones = [torch.ones(b, 1, n, dtype=torch.bool, device=device) for _, n in parts]
        known = [slots.get("valid") for slots, _ in parts]
        held = [one if column is None else column for column, one in zip(known, ones, strict=True)]
        heads = max(h.shape[1] for h in held)
        return torch.cat([h.expand(-1, heads, -1) for h in held], 2)

    def read(self, scratch: Callable[[str, Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of every slot, [B, G, n, D]; packed ones are decoded into `scratch(name, like, n)`."""
        k, v = self.dense["k"], self.dense["v"]
        if not self.tiers:
            return k, v
        n = self.n
        keys, values = scratch("k", k, n), scratch("v", v, n)
        at = 0
        for tier in self.tiers:
            if tier.meta.n:
                tier.read(keys[:, :, at : at + tier.meta.n], values[:, :, at : at + tier.meta.n])
            at += tier.meta.n
        keys[:, :, at:] = k
        values[:, :, at:] = v
        return keys, values

    def untidy(self) -> None:
        """Write down positions before slots leave or move for the first time."""
        if "pos" not in self.dense:
            n, k = self.dense.n, self.dense["k"]
            places = torch.arange(self.seen - n, self.seen, dtype=torch.int32, device=k.device)
            self.dense["pos"] = places.expand(len(k), 1, n)

    def evict(self, keep: Tensor, valid: Tensor | None = None) -> None:
        """Keep only the dense slots `keep` [B, G or 1, k]; `valid` of the same shape marks rows that keep fewer."""
        self.evicted += (self.dense.n - keep.shape[2]) * self.dense["k"].shape[1] * len(keep)
        self._retain(keep, valid)

    def demote(self, keep: Tensor, valid: Tensor | None = None) -> None:
        """Like `evict`, of slots that went on to a tier."""
        self.demoted += (self.dense.n - keep.shape[2]) * self.dense["k"].shape[1] * len(keep)
        self._retain(keep, valid)

    def demote_one(self, victim: Tensor) -> None:
        """Like `evict_one`, of a slot that went on to a tier."""
        self.demoted += self.dense["k"].shape[1] * len(victim)
        self.untidy()
        self.dense.overwrite(victim)

    def _retain(self, keep: Tensor, valid: Tensor | None) -> None:
        self.untidy()
        self.dense.gather(keep)
        if valid is not None:
            self.dense["valid"] = valid & self.dense["valid"] if "valid" in self.dense else valid

    def evict_one(self, victim: Tensor) -> None:
        """Let the newest dense token take the place of `victim` [B, G or 1]."""
        self.untidy()
        self.evicted += self.dense["k"].shape[1] * len(victim)
        self.dense.overwrite(victim)

    def blank(self, slot: Tensor, rows: Tensor) -> None:
        """Drop the token in `slot` [B, G or 1] where `rows` [B, 1] says so, without moving anything."""
        self.untidy()
        n, heads = self.dense.n, slot.shape[1]
        valid = self.dense.get("valid")
        if valid is None:
            valid = torch.ones(len(slot), heads, n, dtype=torch.bool, device=slot.device)
        valid = valid.expand(-1, max(valid.shape[1], heads), -1)
        spare = valid.scatter(-1, slot.expand(-1, valid.shape[1])[:, :, None], False)
        self.evicted += int(rows.sum()) * self.dense["k"].shape[1]
        self.dense["valid"] = torch.where(rows[:, :, None], spare, valid)

    def crop(self, count: int) -> None:
        """Forget the newest `count` tokens seen, wherever their slots are."""
        if count <= 0:
            return
        for name in ("shadow_k", "shadow_v"):
            if name in self.state:
                self.state[name] = self.state[name][:, :, :-count]
        limit = max(self.seen - count, 0)
        if self.intact:
            self.dense.truncate(self.dense.n - (self.seen - limit))
        else:
            self._drop_from(limit)
        self.seen = limit

    def _drop_from(self, limit: int) -> None:
        for tier in self.tiers:
            gone = tier.meta["pos"] >= limit
            if bool(gone.any()):
                known = tier.meta["valid"] if "valid" in tier.meta else torch.ones_like(gone)
                tier.meta["valid"] = known & ~gone
        gone = self.dense["pos"] >= limit
        kept = int((~gone).sum(-1).max())
        # slots that a head has no use for lie first, as after `Evict`, so that nothing is between neighbours
        order = (~gone).int().argsort(dim=-1, stable=True)[:, :, gone.shape[2] - kept :]
        self.dense.gather(order)
        stay = ~gone.gather(2, order)
        if not bool(stay.all()):
            self.dense["valid"] = self.dense["valid"] & stay if "valid" in self.dense else stay

    def map_batch(self, f: MapBatch) -> None:
        """Reorder, repeat or select the rows of the batch everywhere."""
        self.dense.map_batch(f)
        for tier in self.tiers:
            tier.map_batch(f)
            tier.meta.map_batch(f)
        for name, value in self.state.items():
            if isinstance(value, Tensor) and value.ndim:
                self.state[name] = f(value)
        if self.pending is not None:
            self.pending = self.pending.map_batch(f)


def _filled(column: Tensor | float, k: Tensor) -> Tensor:
    """A column of one number where it is not a tensor yet: [B, 1, m], of what a scorer keeps per head [B, G, m]."""
    if isinstance(column, Tensor):
        return column
    kind = torch.bool if isinstance(column, bool) else torch.int32 if isinstance(column, int) else torch.float32
    heads = k.shape[1] if kind == torch.float32 else 1
    return torch.full((len(k), heads, k.shape[2]), column, dtype=kind, device=k.device)
