"""Probe rows: a few queries of a prompt, recent and random ones, whose attention stands for that of all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from elision.kv.parts import Call
from elision.kv.store import LayerStore

Norm = Literal["probe_nnz", "full_count"]


def draw(length: int, recent: float, random: float, uniform: Tensor) -> Tensor:
    """Probe rows of a prompt of `length` tokens: the recent ones, then random earlier ones.

    Args:
        length: l.
        recent, random: Shares of l: the last l - int(l - recent · l) rows, and int(random · l) of those before them.
        uniform: Numbers in [0, 1), one per random row; row = floor(u · rows before the recent ones).
    """
    n = length - int(length - recent * length)
    rows = torch.arange(length - n, length)
    count = int(random * length) if length > n else 0
    return torch.cat([rows, (uniform[:count] * (length - n)).long()])


def normalise(sums: Tensor, at: Tensor, ok: Tensor | None, columns: Tensor, after: Tensor, norm: Norm) -> Tensor:
    """Sums over probes [B, G, n] divided by how many rows can see each column.

    Args:
        sums: What each column received from the probes at the positions `at` [B, P] that are `ok` [B, P] (None: all).
        columns: Positions of the columns, [B, G or 1, n].
        after: How many rows of the text see each column, [B, G or 1, n]: its own and all later ones ("full_count").
        norm: "probe_nnz" divides by the number of probes that see the column, or leaves it where none does.
    """
    if norm == "full_count":
        return sums / after.clamp(min=1)
    at = (at if ok is None else at.masked_fill(~ok, -1)).sort(-1).values
    sees = at.shape[1] - torch.searchsorted(at, columns.to(at.dtype).flatten(1).contiguous()).view(columns.shape)
    return sums / sees.clamp(min=1)


@dataclass(frozen=True)
class Probes:
    """Saliency of new tokens: at the end of a prompt by its probe rows, while decoding by the newest query alone.

    Attributes:
        recent, random: Shares of the prompt's rows, see `draw`.
        norm: See `normalise`; while decoding there is one row, and no normalisation.
        seed: Of the random rows, which are drawn afresh for every layer and every prompt.
    """

    recent: float
    random: float
    norm: Norm
    seed: int = 0

    def rows(self, lengths: list[int], layer: int, turn: int) -> tuple[Tensor, Tensor | None]:
        """Probe rows of each row of a batch among its real tokens, [B, P], and which of them count."""
        # one stream per layer and turn, of which shorter rows use the start: a padded row draws as if it were alone
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + turn) * 10_007 + layer)
        uniform = torch.rand(int(self.random * max(lengths)), generator=generator, dtype=torch.float64)
        drawn = {length: draw(length, self.recent, self.random, uniform) for length in set(lengths)}
        most = max(len(rows) for rows in drawn.values())
        at = torch.zeros(len(lengths), most, dtype=torch.int64)
        ok = torch.zeros(len(lengths), most, dtype=torch.bool)
        for b, length in enumerate(lengths):
            at[b, : len(drawn[length])], ok[b, : len(drawn[length])] = drawn[length], True
        return at, None if bool(ok.all()) else ok

    def observe(self, call: Call) -> None:
        """Keep the queries of the probe rows as they pass, also of a prompt that comes in parts."""
        state = call.store.state
        if call.phase == "step":
            return
        if call.starts:
            state["turn"] = state.get("turn", 0) + 1
            state["unseen"] = []
            state.pop("probes", None)
        if "probes" in state:
            self._fill(state, call.first, call.q)
            return
        # until every row of the batch has begun, it is unknown how much of the prompt is padding
        state["unseen"].append((call.first, call.q, call.valid))
        parts = state["unseen"]
        real = [torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if ok is None else ok for _, q, ok in parts]
        seen = torch.cat(real, 1)
        if call.phase == "prompt_chunk" and not bool(seen.any(1).all()):
            return
        end = call.book.prompt_until if call.phase == "prompt_chunk" else None
        end = call.first + call.m if end is None else end
        first, pads = parts[0][0], (~seen).sum(1)
        at, ok = self.rows([end - first - p for p in pads.tolist()], call.layer, state["turn"])
        state["probes"] = at.to(call.q.device) + (first + pads)[:, None]
        state["probes_ok"] = None if ok is None else ok.to(call.q.device)
        state["probes_q"] = call.q.new_zeros(*call.q.shape[:2], at.shape[1], call.q.shape[3])
        for start, q, _ in state.pop("unseen"):
            self._fill(state, start, q)

    @staticmethod
    def _fill(state: dict[str, Any], first: int, q: Tensor) -> None:
        place = state["probes"] - first
        inside = ((place >= 0) & (place < q.shape[2]))[:, None, :, None]
        index = place.clamp(0, q.shape[2] - 1)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        state["probes_q"] = torch.where(inside, q.gather(2, index), state["probes_q"])

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """Saliency of the dense slots, [B, G, n], float32."""
        n = store.dense.n
        if call.phase == "step":
            return call.probs(1)[:, :, :, 0].sum(2)[..., store.n - n :]
        at, ok, q = (store.state.pop(name) for name in ("probes", "probes_ok", "probes_q"))
        sums = call.grouped(call.sums_at(q, at, ok)).sum(2)[..., store.n - n :]
        columns, valid = store.positions()[..., store.n - n :], store.dense.get("valid")
        after = store.seen - columns
        if valid is not None and "gaps" in store.state:  # padding also lies between the turns of a chat
            after = valid.long().flip(-1).cumsum(-1).flip(-1)
        return normalise(sums, at, ok, columns, after, self.norm)
