"""`HunyuanDiT2DModel`: no gates, and the late blocks read what the early ones returned; predicts its variance."""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.sites import Call


def _modulated(block: nn.Module, call: Call) -> Tensor:
    out: Tensor = block.norm1(call.x, call.get("temb"))  # type: ignore[operator]
    return out


HUNYUAN_DIT = Adapter(
    "HunyuanDiT2DModel",
    lists=("blocks",),
    blocks={
        "HunyuanDiTBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn1", "self"), BranchSpec("attn2", "cross"), BranchSpec("ff", "mlp"))
        )
    },
    head="proj_out",
    long_skips=True,
    modulated=_modulated,
)
