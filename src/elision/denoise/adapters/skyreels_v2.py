"""`SkyReelsV2Transformer3DModel`: Wan's layout, with a time for every frame under diffusion forcing."""

from __future__ import annotations

from functools import partial

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_float_table

SKYREELS_V2 = Adapter(
    "SkyReelsV2Transformer3DModel",
    lists=("blocks",),
    blocks={
        "SkyReelsV2TransformerBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn1", "self"), BranchSpec("attn2", "cross"), BranchSpec("ffn", "mlp"))
        )
    },
    head="proj_out",
    modulated=partial(by_float_table, 1),
)
