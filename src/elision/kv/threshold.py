"""One threshold of cumulative importance for all layers, found by halving (PrefixKV, "binary search")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

ROUNDS = 50


def threshold(scores: Sequence[Tensor], target: float, protect: int, tolerance: float) -> tuple[float, Tensor]:
    """The threshold p, and what each layer drops at it before rescaling: scores [n_l] of L layers, counts [L].

    At p a layer keeps its best tokens until their cumulative importance reaches p, and `protect` more. The halving ends
    once the layers together drop `target` tokens to within `tolerance`.
    """
    longest = max(len(s) for s in scores)
    ranked = torch.stack([functional.pad(s.float(), (0, longest - len(s))) for s in scores])
    ranked = ranked.sort(-1, descending=True).values
    curve = (ranked / ranked.sum(-1, keepdim=True)).cumsum(-1).contiguous()  # [L, n]
    lengths = torch.tensor([len(s) for s in scores], device=curve.device)
    low, high = 0.0, 1.0
    best: tuple[float, float, Tensor] | None = None
    for _ in range(ROUNDS):
        p = (low + high) / 2
        kept = torch.searchsorted(curve, curve.new_full((len(curve), 1), p))[:, 0] + 1
        forget = (lengths - kept - protect).clamp(min=0)
        total = int(forget.sum())
        if best is None or abs(total - target) < best[0]:
            best = (abs(total - target), p, forget)
        if abs(total - target) < tolerance:
            break
        low, high = (low, p) if total < target else (p, high)
    assert best is not None
    return best[1], best[2]


def rescale(forget: Tensor, target: float, limits: Tensor) -> Tensor:
    """Counts [L] scaled to `target` in total and truncated; what a layer cannot drop is spread over those that can."""
    total = float(forget.sum())
    wanted = (
        forget.double() * (target / total)
        if total
        else torch.full_like(forget, target / len(forget), dtype=torch.float64)
    )
    while True:
        excess = (wanted - limits).clamp(min=0).sum()
        wanted = torch.minimum(wanted, limits.double())
        able = (wanted < limits).double()
        if excess < 1e-6 or not able.any():
            return wanted.long()
        weight = able * wanted.clamp(min=1)
        wanted = wanted + excess * weight / weight.sum()


def search(scores: Sequence[Tensor], drop: float, seen: int, protect: int, tolerance: float) -> Tensor:
    """Drop ratios [L] of one prompt, float64: shares of the `seen` tokens that each layer is without afterwards.

    Where even the protected tokens alone are too many, the ratio is the same in all layers.
    """
    lengths = torch.tensor([len(s) for s in scores])
    before = seen - lengths  # dropped in earlier turns
    target = drop * len(scores) * seen - int(before.sum())
    limits = (lengths - protect).clamp(min=0)
    if target <= 0:
        return before.double() / seen
    if target > int(limits.sum()):
        return torch.full((len(scores),), drop, dtype=torch.float64)
    forget = rescale(threshold(scores, target, protect, tolerance)[1].cpu(), target, limits)
    return (before + forget).double() / seen
