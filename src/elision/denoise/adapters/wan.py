"""`WanTransformer3DModel`: video tokens through self-attention, ungated cross-attention and MLP."""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.sites import Call


def _modulated(block: nn.Module, call: Call) -> Tensor:
    table: Tensor = block.scale_shift_table  # type: ignore[assignment]
    time = call.get("temb").float()  # [B, 6, D], or [B, L, 6, D] with a time per token
    shift, scale = (table + time).chunk(6, dim=-2)[:2]
    if time.ndim == 4:
        shift, scale = shift.squeeze(2), scale.squeeze(2)
    out: Tensor = (block.norm1(call.x.float()) * (1 + scale) + shift).type_as(call.x)  # type: ignore[operator]
    return out


WAN = Adapter(
    "WanTransformer3DModel",
    lists=("blocks",),
    blocks={
        "WanTransformerBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn1", "self"), BranchSpec("attn2", "cross"), BranchSpec("ffn", "mlp"))
        )
    },
    head="proj_out",
    modulated=_modulated,
)
