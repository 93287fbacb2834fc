"""Regions of an image in tokens: which of them differ from another image, and the shapes they form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, normalize, pad


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine [B, L] of tokens [B, L, d]; exactly 0 where one of them is zero."""
    return (normalize(a.float(), dim=-1) * normalize(b.float(), dim=-1)).sum(-1)


def erode(mask: Tensor) -> Tensor:
    """Places [..., h, w] that are set together with their four neighbours; outside nothing is set."""
    wide = pad(mask, (1, 1, 1, 1))
    up, down = wide[..., :-2, 1:-1], wide[..., 2:, 1:-1]
    left, right = wide[..., 1:-1, :-2], wide[..., 1:-1, 2:]
    return mask & up & down & left & right


def dilate(mask: Tensor) -> Tensor:
    """Places [..., h, w] with something set in the 5 x 5 square around them."""
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return max_pool2d(flat, 5, stride=1, padding=2).bool().reshape(mask.shape)


def edited(estimate: Tensor, reference: Tensor, grid: tuple[int, int], eta: float) -> Tensor:
    """The edited tokens [B, L] of an estimate [B, L, d] of the result: those unlike the reference's, without specks.

    Args:
        estimate: tokens of the estimated result, row by row.
        reference: tokens of the image that is edited.
        grid: height and width in tokens.
        eta: cosine up to which (inclusive) a token counts as edited.
    """
    raw = similarity(estimate, reference) <= eta
    return dilate(erode(raw.reshape(-1, *grid))).flatten(1)


def indices(mask: Tensor) -> Tensor | list[Tensor]:
    """Indices of the set tokens of a mask [B, L]: [N] if all rows have the same, else one tensor for each row."""
    host = mask.cpu()
    rows = [row.nonzero().flatten().to(mask.device) for row in host]
    return rows[0] if bool((host == host[:1]).all()) else rows


def as_rows(mask: Tensor, grid: tuple[int, int]) -> list[list[list[int]]]:
    """A mask [B, L] as plain 0 and 1, image by image and row by row."""
    rows: list[list[list[int]]] = mask.to("cpu", torch.int).reshape(-1, *grid).tolist()
    return rows
