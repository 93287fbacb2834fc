"""Tiers of packed tokens: ragged rows, groups, narrow positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elision.kv.packed import INT16, ListTier, RowTier, narrow, side_by_side
from elision.kv.store import Slots
from elision.tensors.packing import Grid, channel_scale, quantize


def _kv(n: int, b: int = 2, g: int = 3, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(b, g, n, d, generator=gen) for _ in "kv")
    return k, v, torch.arange(n, dtype=torch.int32).expand(b, g, n)


def _read(tier: RowTier | ListTier, like: Tensor) -> tuple[Tensor, Tensor]:
    b, g, _, d = like.shape
    k, v = (torch.empty(b, g, tier.meta.n, d) for _ in "kv")
    tier.read(k, v)
    return k, v


def test_put_fills_rows_from_their_own_ends() -> None:
    table = Slots()
    start = torch.zeros(2, 2, dtype=torch.int64)
    a = torch.arange(1, 13).view(2, 2, 3)
    counts = torch.tensor([[3, 1], [0, 2]])
    table.put(start, counts, x=a, shared=torch.arange(3).expand(2, 1, 3))
    assert table["x"].tolist() == [[[1, 2, 3], [4, 0, 0]], [[0, 0, 0], [10, 11, 0]]]
    table.put(counts, torch.tensor([[1, 1], [2, 0]]), x=a * 10, shared=torch.arange(3).expand(2, 1, 3))
    assert table["x"].tolist() == [[[1, 2, 3, 10], [4, 40, 0, 0]], [[70, 80, 0, 0], [10, 11, 0, 0]]]
    assert table["shared"].tolist() == [[[0, 1, 2, 0], [0, 0, 0, 0]], [[0, 1, 0, 0], [0, 1, 0, 0]]]


@pytest.mark.parametrize("keys", [Grid(2, "token", group=4), Grid(4, "channel", group=4), Grid(3, "channel", group=2)])
def test_ragged_rows_hold_what_single_rows_hold(keys: Grid) -> None:
    size = keys.group if keys.per == "channel" else 1
    k, v, pos = _kv(48)
    together, values = RowTier(keys, Grid(4)), Grid(4)
    singles = [RowTier(keys, values) for _ in range(2)]
    used = [0, 0]
    for amounts in ([2, 0], [1, 2], [0, 1], [2, 2], [3, 3]):
        counts = torch.tensor(amounts) * size
        most = int(counts.max())
        parts = [[x[b : b + 1, :, used[b] : used[b] + most] for b in range(2)] for x in (k, v, pos)]
        together.append(*(torch.cat(p) for p in parts), counts=counts[:, None])
        for b in range(2):
            n = int(counts[b])
            if n:
                singles[b].append(*(p[b][:, :, :n] for p in parts))
            used[b] += n
    read = _read(together, k)
    for b in range(2):
        assert int(together.meta["valid"][b].sum()) == 3 * used[b] == 3 * singles[b].meta.n
        for mine, alone in zip(read, _read(singles[b], k[:1]), strict=True):
            assert torch.equal(mine[b, :, : used[b]], alone[0])
        assert torch.equal(together.meta["pos"][b, :, : used[b]], singles[b].meta["pos"][0])


def test_tokens_added_one_by_one_equal_those_added_at_once() -> None:
    k, v, pos = _kv(12)
    balance = torch.rand(2, 3, 1, 8) + 0.5
    once, slowly = (RowTier(Grid(3, group=4), Grid(2, group=4), balance) for _ in "ab")
    once.append(k, v, pos)
    for t in range(12):
        slowly.append(k[:, :, t : t + 1], v[:, :, t : t + 1], pos[:, :, t : t + 1])
    for a, b in zip(_read(once, k), _read(slowly, k), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(_read(once, k)[0], quantize(k * balance, Grid(3, group=4)).dequantize() / balance)
    index = torch.tensor([[[5, 1]], [[0, 11]]])
    taken = [torch.empty(2, 3, 2, 8) for _ in "kv"]
    once.take(index, *taken)
    for part, whole in zip(taken, _read(once, k), strict=True):
        assert torch.equal(part, whole.gather(2, index[..., None].expand(2, 3, 2, 8)))
    half = torch.empty(2, 3, 12, 8, dtype=torch.bfloat16)
    once.read(half, half.clone())
    assert torch.equal(half, _read(once, k)[0].bfloat16())


def test_positions_grow_out_of_sixteen_bits() -> None:
    k, v, _ = _kv(1)
    tier, where = RowTier(Grid(4), Grid(4)), [5, INT16, INT16 + 1, 10**6]
    for p in where:
        tier.append(k, v, narrow(torch.full((2, 3, 1), p), p))
    assert tier.meta["pos"][0, 0].tolist() == where
    assert narrow(torch.tensor([INT16]), INT16).dtype == torch.int16


def test_lists_side_by_side() -> None:
    """Keys per channel of every head, values per place in the lists, padding apart."""
    k, v, pos = _kv(10)
    valid = torch.ones(2, 3, 10, dtype=torch.bool)
    valid[1, :, 7:] = False
    scale = channel_scale(side_by_side(v))
    grids = {"keys": Grid(4, "channel"), "values": Grid(4, "token")}
    tier = ListTier(k, v, pos, valid, scale=scale, **grids)
    alone = ListTier(k[1:, :, :7], v[1:, :, :7], pos[1:, :, :7], None, scale=scale[1:], **grids)
    for padded, single in zip(_read(tier, k), _read(alone, k[1:]), strict=True):
        assert torch.equal(padded[1:, :, :7], single)
    keys, values = _read(tier, k)
    step = tier.keys.step.view(2, 1, 3, 8).transpose(1, 2)
    assert ((keys - k).abs() <= step / 2 + 1e-6)[0].all()
    step = tier.values.step.view(2, 1, 10, 1) * scale.view(2, 3, 1, 8)
    assert ((values - v).abs() <= step / 2 + 1e-6)[0].all()
    tier.map_batch(lambda t: t[[1, 1, 0]])
    tier.meta.map_batch(lambda t: t[[1, 1, 0]])
    moved = _read(tier, k.expand(2, -1, -1, -1)[[0, 0, 0]])
    assert torch.equal(moved[0], keys[[1, 1, 0]])
    assert torch.equal(moved[1], values[[1, 1, 0]])
