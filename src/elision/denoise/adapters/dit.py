"""`DiTTransformer2DModel`: class-conditional blocks with attention and MLP, a prediction that carries its variance."""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.sites import Call


def _modulated(block: nn.Module, call: Call) -> Tensor:
    out: Tensor = block.norm1(  # type: ignore[operator]
        call.x, call.get("timestep"), call.get("class_labels"), hidden_dtype=call.x.dtype
    )[0]
    return out


DIT = Adapter(
    "DiTTransformer2DModel",
    lists=("transformer_blocks",),
    blocks={
        "BasicTransformerBlock": BlockSpec(("hidden_states",), (BranchSpec("attn1", "self"), BranchSpec("ff", "mlp")))
    },
    head="proj_out_2",
    batched="cond first",
    modulated=_modulated,
)
