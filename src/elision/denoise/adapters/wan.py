"""`WanTransformer3DModel` and `WanVACETransformer3DModel`: video tokens through self-, ungated cross-attention and MLP.

VACE has blocks beside the stack that make hints from the control video. They run at every step in which the denoiser
does, but their branches are sites like those of the others; hints are added behind the blocks of the stack.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_float_table

_BRANCHES = (BranchSpec("attn1", "self"), BranchSpec("attn2", "cross"), BranchSpec("ffn", "mlp"))

WAN = Adapter(
    "WanTransformer3DModel",
    lists=("blocks",),
    blocks={"WanTransformerBlock": BlockSpec(("hidden_states",), _BRANCHES)},
    head="proj_out",
    calls=("cond", "uncond"),  # of video to video; the others name theirs
    modulated=partial(by_float_table, -2),
)

WAN_VACE = replace(
    WAN,
    model_class="WanVACETransformer3DModel",
    blocks={**WAN.blocks, "WanVACETransformerBlock": BlockSpec(("hidden_states",), _BRANCHES)},
    side=("vace_blocks",),
    calls=(),
)
