"""`LTXVideoTransformer3DModel`: video tokens through self-attention, ungated cross-attention and MLP."""

from __future__ import annotations

from functools import partial

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_table

LTX = Adapter(
    "LTXVideoTransformer3DModel",
    lists=("transformer_blocks",),
    blocks={
        "LTXVideoTransformerBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn1", "self"), BranchSpec("attn2", "cross"), BranchSpec("ff", "mlp"))
        )
    },
    head="proj_out",
    modulated=partial(by_table, "temb"),
    whole="makes positions from the size of the video",
)
