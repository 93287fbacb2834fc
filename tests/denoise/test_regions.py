"""Regions: against the recorded official runs and brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elision.denoise.regions import as_rows, dilate, edited, erode, indices, similarity
from tests.golden import cases
from tests.models import draw

GOLDEN = cases("regione")["partition"]


@pytest.mark.parametrize("part", sorted(GOLDEN.options))
def test_the_official_partition(part: str) -> None:
    about = GOLDEN.options[part]
    x, v, ref = (GOLDEN[f"{part}.{name}"] for name in ("x", "v", "ref"))
    grid: tuple[int, int] = tuple(about["grid"])
    estimate = x + (about["sigma_end"] - about["sigma_now"]) * v
    cosine = similarity(estimate, ref)
    assert torch.allclose(cosine, GOLDEN[f"{part}.cosine"], **GOLDEN.tolerance)
    raw = (cosine <= about["eta"]).unflatten(1, grid)
    assert torch.equal(raw[0].float(), GOLDEN[f"{part}.raw_mask"])
    assert torch.equal(erode(raw)[0].float(), GOLDEN[f"{part}.eroded_mask"])
    mask = edited(estimate, ref, grid, about["eta"])
    assert torch.equal(mask[0].unflatten(0, grid).float(), GOLDEN[f"{part}.edited_mask"])
    live = indices(mask)
    assert isinstance(live, Tensor)
    assert torch.equal(live, GOLDEN[f"{part}.edited"])
    rest = indices(~mask)
    assert isinstance(rest, Tensor)
    assert torch.equal(rest, GOLDEN[f"{part}.unedited"])
    assert as_rows(mask, grid)[0] == GOLDEN[f"{part}.edited_mask"].int().tolist()


def brute(mask: Tensor, offsets: list[tuple[int, int]], every: bool) -> Tensor:
    """All or any of the places at these offsets; what lies outside is not set."""
    out, (height, width) = torch.zeros_like(mask), mask.shape
    for y in range(height):
        for x in range(width):
            inside = [
                bool(mask[y + a, x + b]) if 0 <= y + a < height and 0 <= x + b < width else False for a, b in offsets
            ]
            out[y, x] = all(inside) if every else any(inside)
    return out


CROSS = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
SQUARE = [(a, b) for a in range(-2, 3) for b in range(-2, 3)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 7), (3, 3), (6, 9)])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95, 1.0])
def test_morphology_by_brute_force(shape: tuple[int, int], share: float) -> None:
    masks = torch.rand(2, *shape, generator=torch.Generator().manual_seed(3)) < share
    for mask, small, large in zip(masks, erode(masks), dilate(masks), strict=True):
        assert torch.equal(small, brute(mask, CROSS, every=True))
        assert torch.equal(large, brute(mask, SQUARE, every=False))


def test_the_threshold_at_its_ends() -> None:
    a, b = draw(2, 35, 4, seed=1), draw(2, 35, 4, seed=2)
    assert edited(a, b, (5, 7), 1.1).all()  # erosion takes the border away, dilation brings it back
    assert not edited(a, b, (5, 7), -1.1).any()
    assert not edited(a, b, (1, 35), 1.1).any()  # a side below 3 is eroded away


def test_zero_tokens_have_cosine_zero_and_equality_counts() -> None:
    zero = torch.zeros(1, 9, 4)
    assert torch.equal(similarity(zero, draw(1, 9, 4, seed=0)), torch.zeros(1, 9))
    assert edited(zero, draw(1, 9, 4, seed=0), (3, 3), 0.0).all()
    assert not edited(zero, draw(1, 9, 4, seed=0), (3, 3), -1e-6).any()


def test_indices_are_shared_where_all_images_have_the_same() -> None:
    one = torch.tensor([[True, False, True]])
    assert indices(one).tolist() == [0, 2]  # type: ignore[union-attr]
    assert indices(one.repeat(3, 1)).tolist() == [0, 2]  # type: ignore[union-attr]
    several = indices(torch.cat([one, ~one, torch.zeros_like(one)]))
    assert [row.tolist() for row in several] == [[0, 2], [1], []]


def test_gather_and_scatter_are_inverse() -> None:
    x, mask = draw(1, 12, 3, seed=0), torch.rand(1, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    inside, outside = indices(mask), indices(~mask)
    together = torch.zeros_like(x).index_copy_(1, inside, x[:, inside]).index_copy_(1, outside, x[:, outside])
    assert torch.equal(together, x)
