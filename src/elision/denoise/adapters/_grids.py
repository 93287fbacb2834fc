"""The images among the tokens of a call."""

from __future__ import annotations

import torch

from elision.denoise.sites import Call


def by_positions(call: Call) -> list[tuple[int, int]]:
    """From `img_ids` [L, 3 or more] (image, row, column) of the tokens; images stand behind each other."""
    ids = call.get("img_ids")
    ids = ids[0] if ids.ndim == 3 else ids
    counts = torch.unique_consecutive(ids[:, 0], return_counts=True)[1].tolist()
    sides = [part[:, 1:3].amax(0) - part[:, 1:3].amin(0) + 1 for part in ids.split(counts)]
    return [(int(height), int(width)) for height, width in torch.stack(sides).tolist()]
