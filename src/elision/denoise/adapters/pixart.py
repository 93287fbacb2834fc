"""`PixArtTransformer2DModel`: self-attention, ungated cross-attention and MLP; may also predict its variance."""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.sites import Call


def _modulated(block: nn.Module, call: Call) -> Tensor:
    table: Tensor = block.scale_shift_table  # type: ignore[assignment]
    time = call.get("timestep").reshape(len(call.x), 6, -1)
    shift, scale = (table[None] + time).chunk(6, dim=1)[:2]
    out: Tensor = block.norm1(call.x) * (1 + scale) + shift  # type: ignore[operator]
    return out


PIXART = Adapter(
    "PixArtTransformer2DModel",
    lists=("transformer_blocks",),
    blocks={
        "BasicTransformerBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn1", "self"), BranchSpec("attn2", "cross"), BranchSpec("ff", "mlp"))
        )
    },
    head="proj_out",
    modulated=_modulated,
)
