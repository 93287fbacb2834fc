"""What a call of the model consists of: layers that take all rows, layers that take some, and the books about both.

A `Net` belongs to one generation. It holds the slots, the rotation of every position and the padding mask, and it is
the only place where rows enter linear layers, so its counters are what really ran. Under guidance the batch is doubled:
the second half has its prompt masked and slots of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elision.dllm.decode import Step
from elision.dllm.model import MaskedLM, Rotation, place
from elision.tensors.slots import Rows, RowSlots

Watch = Callable[[int, Tensor, Tensor], None]  # layer, rotated q [B, N', Hq, D], rotated k [B, N', G, D]


@dataclass
class Book:
    """What the calls of a run did.

    Attributes:
        calls: calls of the model.
        full_calls: calls in which every row went through every layer.
        token_layers: rows that went through a layer, summed over layers and calls.
        padding: rows among them that only fill up a batch whose rows have sets of different sizes.
        head_rows: rows that went through the head.
        query: per call [B, N], the positions that went through every layer.
        depth: per call, how many layers took the query alone; the layers above took everything in reach.
        reach: per call, how many positions the layers above `depth` took.
    """

    calls: int = 0
    full_calls: int = 0
    token_layers: int = 0
    padding: int = 0
    head_rows: int = 0
    query: list[Tensor] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    reach: list[int] = field(default_factory=list)


class Net:
    """The model during one generation.

    Args:
        lm: the model.
        batch: rows of the sampler, B.
        length: N, prompt and generation together.
        attention_mask: [B, P], 0 at left padding, or None.
        guided: whether the batch is doubled.
        slots: whether K and V are kept, and "h" to keep the inputs of the layers, too.
    """

    def __init__(
        self,
        lm: MaskedLM,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cfg_scale: float = 0.0,
        slots: bool | str = True,
    ) -> None:
        self.lm = lm
        self.branches = 2 if cfg_scale > 0 else 1
        self.cfg_scale = cfg_scale
        self.batch, self.length = ids.shape[0] * self.branches, ids.shape[1]
        if attention_mask is not None:
            tail = attention_mask.new_ones(ids.shape[0], ids.shape[1] - attention_mask.shape[1])
            attention_mask = torch.cat((attention_mask, tail), dim=1)
        positions, mask = place(ids, attention_mask)
        if mask is not None and self.branches == 2:
            positions, mask = positions.repeat(2, 1), mask.repeat(2, 1, 1, 1)
        self.mask = mask
        self.rotation: Rotation = lm.rotation(positions)
        self.slots: RowSlots | None = None
        if slots:
            hidden = lm.width if slots == "h" else None
            self.slots = RowSlots(lm.layers, self.batch, self.length, lm.kv_heads, lm.head_dim, hidden=hidden)
        self.book = Book()

    @property
    def held(self) -> RowSlots:
        """The slots, for methods that asked for them."""
        assert self.slots is not None
        return self.slots

    def expand(self, chosen: Tensor) -> Tensor:
        """A set [B, N] of the sampler for all branches."""
        return chosen if self.branches == 1 else chosen.repeat(self.branches, 1)

    def embed(self, step: Step, rows: Rows | None = None) -> Tensor:
        """Inputs of the first layer: [B, N, d], or [B, m, d] at `rows`."""
        ids = step.ids
        if self.branches == 2:
            blank = ids.clone()
            blank[:, : step.prompt] = self.lm.mask_id
            ids = torch.cat((ids, blank))
        out: Tensor = self.lm.embed(ids if rows is None else ids.gather(1, rows.pos))
        return out

    def whole_layer(self, layer: int, h: Tensor, reach: int | None = None, watch: Watch | None = None) -> Tensor:
        """Layer `layer` on all rows h [B, N, d], or on the first `reach`; fills the slots."""
        block = self.lm.blocks[layer]
        rotation = self.rotation if reach is None else self.rotation.first(reach)
        q, k, v = block.project(h, rotation)
        if self.slots is not None:
            self.slots.fill(layer, k, v, reach)
            self.slots.fill_h(layer, h, reach)
            if reach is not None:
                k, v = self.slots.k(layer), self.slots.v(layer)
        if watch is not None:
            watch(layer, q, k)
        self.book.token_layers += h.shape[0] * h.shape[1]
        return block.finish(h, block.attend(q, k, v, self.mask))

    def part_layer(self, layer: int, h: Tensor, rows: Rows, rotation: Rotation) -> Tensor:
        """Layer `layer` on `rows` alone, h [B, m, d]; their K and V go into the slots, which supply all others."""
        block = self.lm.blocks[layer]
        q, k, v = block.project(h, rotation)
        self.held.write(layer, rows, k, v)
        self.count(rows)
        return block.finish(h, block.attend(q, self.held.k(layer), self.held.v(layer), self.mask))

    def count(self, rows: Rows) -> None:
        """Enter one layer's pass over `rows` into the book."""
        real = sum(rows.count)
        self.book.token_layers += real
        self.book.padding += rows.pos.numel() - real

    def note(self, rows: Rows | None, depth: int, reach: int | None = None) -> None:
        """Enter a finished call into the book: the query, layers that took it alone, reach of the others."""
        book = self.book
        book.calls += 1
        whole = rows is None or (depth == 0 and reach is None)
        book.full_calls += whole
        device = self.lm.device
        book.query.append(
            torch.ones(self.batch, self.length, dtype=torch.bool, device=device) if rows is None else rows.mask()
        )
        book.depth.append(0 if rows is None else depth)
        book.reach.append(self.length if reach is None else reach)

    def full(self, step: Step) -> Tensor:
        """Every row through every layer: outputs [B, N, d]."""
        h = self.embed(step)
        for layer in range(self.lm.layers):
            h = self.whole_layer(layer, h)
        self.note(None, 0)
        return h

    def part(self, step: Step, rows: Rows) -> Tensor:
        """`rows` alone through every layer: outputs [B, m, d]."""
        h, rotation = self.embed(step, rows), self.rotation.at(rows.pos)
        for layer in range(self.lm.layers):
            h = self.part_layer(layer, h, rows, rotation)
        self.note(rows, self.lm.layers)
        return h

    def logits(self, h: Tensor, rows: Rows | None, step: Step) -> tuple[Tensor, Tensor | None]:
        """Logits [B, m, V] at `step.need` out of outputs h of `rows` (None: all), and which exist (None: all)."""
        need = step.need.repeat(self.branches)
        exists: Tensor | None = None
        index = need.pos
        if rows is not None:
            index, there = need.index_in(rows)
            exists = there[: len(step.ids)]
        picked = h.gather(1, index[:, :, None].expand(-1, -1, h.shape[-1]))
        self.book.head_rows += picked.shape[0] * picked.shape[1]
        out = self.lm.head(picked)
        if self.branches == 2:
            given, free = out.chunk(2)
            out = free + (self.cfg_scale + 1) * (given - free)
        return out, exists

    def truth(self, step: Step) -> list[tuple[Tensor, Tensor]]:
        """True K and V of every layer for the current tokens; neither counted nor kept (shadow mode)."""
        h, out = self.embed(step), []
        for block in self.lm.blocks:
            q, k, v = block.project(h, self.rotation)
            out.append((k, v))
            h = block.finish(h, block.attend(q, k, v, self.mask))
        return out
