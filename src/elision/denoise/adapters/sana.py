"""`SanaTransformer2DModel`: linear self-attention, ungated cross-attention, and an MLP of convolutions."""

from __future__ import annotations

from functools import partial

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_table

SANA = Adapter(
    "SanaTransformer2DModel",
    lists=("transformer_blocks",),
    blocks={
        "SanaTransformerBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn1", "self"), BranchSpec("attn2", "cross"), BranchSpec("ff", "mlp"))
        )
    },
    head="proj_out",
    modulated=partial(by_table, "timestep"),
)
