"""Row sets and the row-writable store."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elision.session import storage_bytes
from elision.tensors.slots import Rows, RowSlots


def chosen(*rows: str) -> Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])


def test_rows_of_one_sample() -> None:
    rows = Rows.where(chosen("x..xx"))
    assert rows.pos.tolist() == [[0, 3, 4]]
    assert rows.flat.tolist() == [0, 3, 4]
    assert rows.count == (3,)


def test_equal_sets() -> None:
    rows = Rows.where(chosen(".x.x.", "x...x"))
    assert rows.pos.tolist() == [[1, 3], [0, 4]]
    assert rows.flat.tolist() == [1, 3, 5, 9]
    assert rows.count == (2, 2)


def test_unequal_sets_repeat_their_first_position() -> None:
    rows = Rows.where(chosen(".x.xx", "..x..", "....."))
    assert rows.pos.tolist() == [[1, 3, 4], [2, 2, 2], [0, 0, 0]]
    assert rows.count == (3, 1, 1)
    assert rows.real().tolist() == [[True] * 3, [True, False, False], [True, False, False]]


@pytest.mark.parametrize("batch", [1, 3])
def test_empty_sets(batch: int) -> None:
    rows = Rows.where(torch.zeros(batch, 4, dtype=torch.bool))
    assert rows.pos.shape == (batch, 0)
    assert rows.count == (0,) * batch
    assert not rows.mask().any()


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_mask_undoes_where(table: list[list[bool]]) -> None:
    mask = torch.tensor(table)
    rows = Rows.where(mask)
    if mask.any():  # a sample without any beside others is given position 0
        mask[:, 0] |= ~mask.any(dim=1)
    assert torch.equal(rows.mask(), mask)
    assert rows.count == tuple(mask.sum(dim=1).tolist())
    assert torch.equal(rows.flat.view_as(rows.pos), rows.pos + 6 * torch.arange(len(mask))[:, None])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=5, max_size=5), st.integers(1, 3))
def test_index_in(table: list[tuple[bool, bool]], batch: int) -> None:
    a, b = (torch.tensor([row]).repeat(batch, 1) for row in zip(*table, strict=True))
    if batch > 1:
        b[1, :2] = True  # sets of unequal sizes
    left, right = Rows.where(a), Rows.where(b)
    index, there = left.index_in(right)
    for i in range(batch):
        inside = right.pos[i].tolist()
        for j, position in enumerate(left.pos[i].tolist()):
            assert bool(there[i, j]) == (position in inside)
            if position in inside:
                assert int(index[i, j]) == inside.index(position)


def test_repeat_is_the_set_of_the_repeated_batch() -> None:
    mask = chosen(".x.xx", "..x..")
    twice, direct = Rows.where(mask).repeat(2), Rows.where(mask.repeat(2, 1))
    assert torch.equal(twice.pos, direct.pos)
    assert torch.equal(twice.flat, direct.flat)
    assert twice.count == direct.count


B, N, G, D, W = 2, 6, 2, 4, 5


def full() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, N, G, D), torch.randn(B, N, G, D), torch.randn(B, N, W)


def test_writes_touch_their_rows_and_nothing_else() -> None:
    slots = RowSlots(2, B, N, G, D, hidden=W)
    k, v, h = full()
    slots.fill(1, k, v)
    slots.fill_h(1, h)
    rows = Rows.where(chosen(".x..xx", "x....."))
    new_k, new_v, new_h = torch.randn(B, 3, G, D), torch.randn(B, 3, G, D), torch.randn(B, 3, W)
    for new in (new_k, new_v, new_h):
        new[1, 1:] = new[1, 0]  # repeated rows carry the same values
    slots.write(1, rows, new_k, new_v)
    slots.write_h(1, rows, new_h)
    for held, old, new in ((slots.k(1), k, new_k), (slots.v(1), v, new_v), (slots.h(1), h, new_h)):
        mask = rows.mask()
        assert torch.equal(held[~mask], old[~mask])
        assert torch.equal(held[0, [1, 4, 5]], new[0])
        assert torch.equal(held[1, 0], new[1, 0])


def test_fill_copies_and_can_stop_early() -> None:
    slots = RowSlots(1, B, N, G, D)
    k, v, _ = full()
    slots.fill(0, k, v)
    k.zero_()
    assert slots.k(0).abs().sum() > 0
    before, pointer = slots.k(0).clone(), slots.k(0).data_ptr()
    slots.fill(0, torch.ones(B, 4, G, D), torch.ones(B, 4, G, D), reach=4)
    assert torch.equal(slots.k(0)[:, 4:], before[:, 4:])
    assert bool((slots.k(0)[:, :4] == 1).all())
    assert slots.k(0).data_ptr() == pointer


def test_nothing_is_held_before_the_first_write() -> None:
    slots = RowSlots(3, B, N, G, D, hidden=W)
    assert list(slots.tensors()) == []
    for read in (slots.k, slots.v, slots.h):
        with pytest.raises(LookupError, match="layer 0 has no rows yet"):
            read(0)
    with pytest.raises(LookupError, match="must cover all 6"):
        slots.fill(0, torch.ones(B, 4, G, D), torch.ones(B, 4, G, D), reach=4)
    k, v, h = full()
    slots.fill(2, k, v)
    slots.fill_h(2, h)
    assert storage_bytes(slots.tensors()) == 4 * (2 * B * N * G * D + B * N * W)


def test_without_h_its_writes_are_ignored() -> None:
    slots = RowSlots(1, B, N, G, D)
    k, v, h = full()
    slots.fill(0, k, v)
    slots.fill_h(0, h)
    slots.write_h(0, Rows.where(chosen("x.....", "x.....")), h[:, :1])
    assert len(list(slots.tensors())) == 2
    with pytest.raises(LookupError):
        slots.h(0)
