"""`CosmosTransformer3DModel`: gated self- and cross-attention; learned positions are added at every block.

Its pipelines call it for the condition, then without.
"""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.sites import Call


def _modulated(block: nn.Module, call: Call) -> Tensor:
    positions = call.get("extra_pos_emb")
    x = call.x if positions is None else call.x + positions
    out: Tensor = block.norm1(x, call.get("embedded_timestep"), call.get("temb"))[0]  # type: ignore[operator]
    return out


COSMOS = Adapter(
    "CosmosTransformer3DModel",
    lists=("transformer_blocks",),
    blocks={
        "CosmosTransformerBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn1", "self"), BranchSpec("attn2", "cross"), BranchSpec("ff", "mlp"))
        )
    },
    head="proj_out",
    calls=("cond", "uncond"),
    modulated=_modulated,
)
