"""`Lumina2Transformer2DModel`: text and image tokens in one stream; both are refined before, at every step.

Its pipeline calls it for the condition, then without, and tells it 1 - t.
"""

from __future__ import annotations

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_norm

LUMINA2 = Adapter(
    "Lumina2Transformer2DModel",
    lists=("layers",),
    blocks={
        "Lumina2TransformerBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn", "self"), BranchSpec("feed_forward", "mlp")), joined="text first"
        )
    },
    head="norm_out",
    calls=("cond", "uncond"),
    modulated=by_norm,
)
