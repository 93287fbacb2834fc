"""Tiers of packed tokens: rows that can grow at any time, and fixed lists in which the heads lie side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from elision.errors import OptionError
from elision.kv.store import MapBatch, Slots
from elision.tensors.packing import Grid, Packed, dequantize, quantize

INT16 = torch.iinfo(torch.int16).max


def narrow(positions: Tensor, limit: int) -> Tensor:
    """Positions below `limit` in the smallest type that crop and report can use."""
    return positions.to(torch.int16 if limit <= INT16 else torch.int32)


class RowTier:
    """Packed tokens of every row and head, to which tokens can be added at any time.

    Codes and parameters are columns [B, G, n, ...] of `meta` beside the positions of their tokens, so whatever moves
    slots moves them too. The parameters of keys per channel belong to groups of tokens and lie in `groups`.

    Args:
        keys: Grid of the keys; per channel only with a group, and then tokens come in whole groups.
        values: Grid of the values, per token.
        balance: [B, G, 1, D] or None: keys are multiplied by it before the grid and divided by it when read (MiKV).
    """

    def __init__(self, keys: Grid, values: Grid, balance: Tensor | None = None) -> None:
        self.keys, self.values, self.balance = keys, values, balance
        self.meta, self.groups = Slots(), Slots()
        self.used: Tensor | None = None  # slots taken by each row and head, [B, G], once they differ

    def append(self, k: Tensor, v: Tensor, pos: Tensor, counts: Tensor | None = None, **facts: Tensor) -> None:
        """Pack m tokens k, v [B, G, m, D] at positions `pos` [B, G or 1, m] with further `facts` of the same shape.

        Where `counts` [B, G or 1] is given, only the first of them are to be added, and the column `valid` marks the
        slots that shorter rows leave free until they need them.
        """
        kp = quantize(k if self.balance is None else k.float() * self.balance, self.keys)
        vp = quantize(v, self.values)
        columns = {"kc": kp.codes, "vc": vp.codes, "vl": vp.low, "vs": vp.step, "pos": pos, **facts}
        params = {"kl": kp.low, "ks": kp.step}
        if self.keys.per == "token":
            columns, params = {**columns, **params}, {}
        if "pos" in self.meta and self.meta["pos"].dtype != pos.dtype:
            self.meta["pos"] = self.meta["pos"].int()
            columns["pos"] = pos.int()
        if counts is not None or self.used is not None:
            self._append_ragged(columns, params, counts)
            return
        if "valid" in self.meta:
            columns.setdefault("valid", torch.ones_like(pos, dtype=torch.bool))
        elif "valid" in columns and self.meta.n:
            self.meta["valid"] = torch.ones_like(self.meta["pos"], dtype=torch.bool)
        self.meta.append(**columns)
        if params:
            self.groups.append(**params)

    def _append_ragged(self, columns: dict[str, Tensor], params: dict[str, Tensor], counts: Tensor | None) -> None:
        b, g, m = columns["kc"].shape[:3]
        counts = columns["pos"].new_full((b, g), m, dtype=torch.int64) if counts is None else counts.expand(b, g)
        used = torch.full_like(counts, self.meta.n) if self.used is None else self.used
        if self.meta.n and "valid" not in self.meta:
            self.meta["valid"] = torch.ones_like(self.meta["pos"], dtype=torch.bool)
        columns.setdefault("valid", torch.ones_like(columns["pos"], dtype=torch.bool))
        self.meta.put(used, counts, **columns)
        if params:
            size = self.keys.group or 1
            self.groups.put(used // size, counts // size, **params)
        self.used = used + counts

    def read(self, k: Tensor, v: Tensor) -> None:
        """Write the decoded keys and values into `k` and `v` [B, G, n, D]."""
        params = self.meta if self.keys.per == "token" else self.groups
        self._keys(self.meta["kc"], params["kl"], params["ks"], k)
        dequantize(self.meta["vc"], self.meta["vl"], self.meta["vs"], self.values, v.shape[-1], None, v)

    def take(self, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Like `read` for the slots `index` [B, G or 1, j] alone; grids per token only."""
        held = self.meta.take(index)
        self._keys(held["kc"], held["kl"], held["ks"], k)
        dequantize(held["vc"], held["vl"], held["vs"], self.values, v.shape[-1], None, v)

    def keep(self, index: Tensor, counts: Tensor | None = None) -> None:
        """Keep the slots `index` [B, G, j] alone, or the first counts[b, g] of them; grids per token only."""
        self.meta.gather(index)
        if counts is not None or self.used is not None:
            full = index.new_full(index.shape[:2], index.shape[2])
            self.used = full if counts is None else counts.expand_as(full)
            self.meta["valid"] = torch.arange(self.meta.n, device=index.device) < self.used[..., None]

    def _keys(self, codes: Tensor, low: Tensor, step: Tensor, out: Tensor) -> None:
        plain = self.balance is None or out.dtype == torch.float32
        x = dequantize(codes, low, step, self.keys, out.shape[-1], None, out if plain else None)
        if self.balance is not None:
            x.div_(self.balance)
        if x is not out:
            out.copy_(x)

    def tensors(self) -> Iterator[Tensor]:
        """What is held beside `meta`."""
        yield from self.groups.tensors()
        if self.balance is not None:
            yield self.balance

    def map_batch(self, f: MapBatch) -> None:
        """Apply `f` to the rows of the batch of what is held beside `meta`."""
        self.groups.map_batch(f)
        self.balance = None if self.balance is None else f(self.balance)
        self.used = None if self.used is None else f(self.used)


def side_by_side(x: Tensor) -> Tensor:
    """[B, G, n, D] as [B, n, G · D]: row r holds the r-th listed token of every head; channel = head · D + dim."""
    return x.transpose(1, 2).flatten(2)


def real_elements(valid: Tensor | None, x: Tensor) -> Tensor | None:
    """`valid` [B, G or 1, n] for every element of `x` [B, G, n, D] side by side."""
    return None if valid is None else side_by_side(valid[..., None].expand_as(x))


def check_group(method: str, option: str, group: int | None, config: Any) -> None:
    """Raise unless the head dimension of a model, where its configuration tells it, divides into groups."""
    d = getattr(config, "head_dim", None)
    if d is None and getattr(config, "num_attention_heads", None):
        d = config.hidden_size // config.num_attention_heads
    if group and d and d % group:
        raise OptionError(f"{method}: {option}={group} does not divide the head dimension {d}: use a divisor of it")


class ListTier:
    """One fixed list of tokens per head, packed with the heads side by side (ZipCache).

    A range per token therefore spans the tokens that stand at one place of every head's list: their order counts.

    Args:
        k, v: [B, G, n, D], each head in the order of its list.
        pos: [B, G, n], the tokens' positions; `valid` of the same shape, or None if all are real.
        keys, values: grids over [B, n, G · D].
        scale: [B or 1, 1, G · D], channel scale of the values.
        shared: Take the ranges of the keys over all rows of the batch (as released) instead of each row's own.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        pos: Tensor,
        valid: Tensor | None,
        *,
        keys: Grid,
        values: Grid,
        scale: Tensor | None,
        shared: bool = False,
    ) -> None:
        self.meta = Slots()
        self.meta.append(**({"pos": pos} if valid is None else {"pos": pos, "valid": valid}))
        self.values = quantize(side_by_side(v), values, valid=real_elements(valid, v), scale=scale)
        rows, real = side_by_side(k), real_elements(valid, k)
        if not shared:
            self.keys = quantize(rows, keys, valid=real)
            return
        joint = quantize(rows.flatten(0, 1)[None], keys, valid=None if real is None else real.flatten(0, 1)[None])
        self.keys = dataclasses.replace(joint, codes=joint.codes.view(*rows.shape[:2], -1))

    def read(self, k: Tensor, v: Tensor) -> None:
        """Write the decoded keys and values into `k` and `v` [B, G, n, D]."""
        for held, out in ((self.keys, k), (self.values, v)):
            b, g, n, d = out.shape
            out.copy_(held.dequantize().view(b, n, g, d).transpose(1, 2))

    def tensors(self) -> Iterator[Tensor]:
        """Codes and parameters."""
        yield from self.keys.tensors()
        yield from self.values.tensors()

    def map_batch(self, f: MapBatch) -> None:
        """Apply `f` to the rows of the batch; parameters that all rows share stay as they are."""
        self.keys, self.values = _map_rows(self.keys, f), _map_rows(self.values, f)


def _map_rows(held: Packed, f: MapBatch) -> Packed:
    rows = len(held.codes)

    def own(t: Tensor) -> Tensor:
        return f(t) if len(t) == rows > 1 else t

    scale = None if held.scale is None else own(held.scale)
    return dataclasses.replace(held, codes=f(held.codes), low=own(held.low), step=own(held.step), scale=scale)
