"""What every method has to do, driven on random tensors: rows of a batch like single runs, chunks like one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from elision.kv.method import KVMethod
from tests.kv.rig import Rig

LAYERS, HEADS, GROUPS, DIM = 3, 4, 2, 8


@dataclass
class Row:
    """A conversation of one row: prompts (more than one token, or `prompt` set) and steps, by their tokens."""

    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def random(total: int, seed: int) -> Row:
        torch.manual_seed(seed)
        shape = (LAYERS, 1, GROUPS, total, DIM)
        q = torch.randn(LAYERS, 1, HEADS, total, DIM)
        return Row(q * 2, torch.randn(shape) * torch.linspace(0.5, 2, LAYERS).view(-1, 1, 1, 1, 1), torch.randn(shape))


def rig_of(method: KVMethod) -> Rig:
    return Rig(method, LAYERS, HEADS, GROUPS)


def feed(rig: Rig, rows: Sequence[Row], starts: Sequence[int], sizes: Sequence[int], phase: str) -> Tensor:
    """The next `sizes` tokens of every row, padded on the left to the longest; outputs [layers, B, Hq, m, D]."""
    m = max(sizes)
    valid = torch.stack([torch.arange(m) >= m - size for size in sizes])
    outs = []
    for layer in range(LAYERS):
        parts = []
        for name in "qkv":
            padded = [
                torch.nn.functional.pad(getattr(row, name)[layer][:, :, start : start + size], (0, 0, m - size, 0))
                for row, start, size in zip(rows, starts, sizes, strict=True)
            ]
            parts.append(torch.cat(padded))
        given = None if bool(valid.all()) else valid
        outs.append(rig.feed(layer, *parts, phase=phase, starts=phase == "prompt_end", valid=given))
    return torch.stack(outs)


def kept(rig: Rig, layer: int, row: int, real: Tensor) -> list[list[int]]:
    """Indices of the real tokens held by a row, for every head; `real` [total] says which positions are real."""
    held = rig.kept(layer)[row].expand(GROUPS, -1)
    index = real.long().cumsum(0) - 1
    return [[int(index[p]) for p in head.tolist() if p >= 0] for head in held]


def check_rows(make: KVMethod, lengths: Sequence[int], steps: int, turns: Sequence[int] | None, after: int) -> None:
    """A left-padded batch against single runs: prompt, steps, a second turn (padded too), steps."""
    turns = [0] * len(lengths) if turns is None else turns
    totals = [n + steps + t + after for n, t in zip(lengths, turns, strict=True)]
    rows = [Row.random(total, seed) for seed, total in enumerate(totals)]
    script: list[tuple[list[int], str]] = [(list(lengths), "prompt_end"), *[([1] * len(rows), "step")] * steps]
    if any(turns):
        script.append((list(turns), "prompt_end"))
    script += [([1] * len(rows), "step")] * after
    batch, singles = rig_of(make), [rig_of(make) for _ in rows]
    starts, real = [0] * len(rows), [torch.zeros(0, dtype=torch.bool) for _ in rows]
    for number, (sizes, phase) in enumerate(script):
        out = feed(batch, rows, starts, sizes, phase)
        for i, (single, row) in enumerate(zip(singles, rows, strict=True)):
            alone = feed(single, [row], [starts[i]], [sizes[i]], phase)
            torch.testing.assert_close(out[:, i : i + 1, :, -sizes[i] :], alone, atol=1e-5, rtol=0)
            real[i] = torch.cat([real[i], torch.arange(max(sizes)) >= max(sizes) - sizes[i]])
            starts[i] += sizes[i]
            for layer in range(LAYERS):
                mine = kept(batch, layer, i, real[i])
                assert mine == single.kept(layer)[0].expand(GROUPS, -1).tolist(), (number, i, layer)


def check_chunks(make: KVMethod, length: int, cuts: Sequence[int], steps: int) -> None:
    """A prompt in parts keeps what it keeps as a whole."""
    row = Row.random(length + steps, 5)
    whole, parts = rig_of(make), rig_of(make)
    feed(whole, [row], [0], [length], "prompt_end")
    edges = [0, *cuts, length]
    for start, stop in pairwise(edges):
        phase = "prompt_end" if stop == length else "prompt_chunk"
        for layer in range(LAYERS):
            part = [x[layer][:, :, start:stop] for x in (row.q, row.k, row.v)]
            parts.feed(layer, *part, phase=phase, starts=start == 0)
    for step in range(steps + 1):
        for layer in range(LAYERS):
            assert torch.equal(whole.kept(layer), parts.kept(layer))
        if step < steps:
            outs = [feed(rig, [row], [length + step], [1], "step") for rig in (whole, parts)]
            torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
