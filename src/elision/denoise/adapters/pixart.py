"""`PixArtTransformer2DModel`: self-attention, ungated cross-attention and MLP; may also predict its variance."""

from __future__ import annotations

from functools import partial

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_table

PIXART = Adapter(
    "PixArtTransformer2DModel",
    lists=("transformer_blocks",),
    blocks={
        "BasicTransformerBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn1", "self"), BranchSpec("attn2", "cross"), BranchSpec("ff", "mlp"))
        )
    },
    head="proj_out",
    modulated=partial(by_table, "timestep"),
)
