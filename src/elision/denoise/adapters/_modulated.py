"""The first block's input after its own norm and modulation (TeaCache's indicator), for blocks that share a form."""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.sites import Call


def by_norm(block: nn.Module, call: Call) -> Tensor:
    """Blocks whose `norm1` takes the time embedding and returns the modulated input first."""
    out: Tensor = block.norm1(call.x, emb=call.get("temb"))[0]  # type: ignore[operator]
    return out


def by_table(name: str, block: nn.Module, call: Call) -> Tensor:
    """Blocks that add a table [K, D] to the time embedding [B, K D] or [B, L, K D], an argument of this name."""
    table: Tensor = block.scale_shift_table  # type: ignore[assignment]
    time = call.get(name)
    time = time.reshape(len(call.x), -1, *table.shape)
    shift, scale = (table + time).unbind(dim=2)[:2]
    out: Tensor = block.norm1(call.x) * (1 + scale) + shift  # type: ignore[operator]
    return out


def by_float_table(axis: int, block: nn.Module, call: Call) -> Tensor:
    """Wan's blocks: a table [1, 6, D] and the time embedding [B, 6, D] in float32; per token `axis` is 6."""
    table: Tensor = block.scale_shift_table  # type: ignore[assignment]
    time = call.get("temb").float()
    time = time.movedim(axis, -2) if time.ndim == 4 else time
    shift, scale = (table + time).chunk(6, dim=-2)[:2]
    if time.ndim == 4:
        shift, scale = shift.squeeze(2), scale.squeeze(2)
    out: Tensor = (block.norm1(call.x.float()) * (1 + scale) + shift).type_as(call.x)  # type: ignore[operator]
    return out
