"""`SD3Transformer2DModel`: two-stream blocks; the last one drops its text stream, some have a second self-attention."""

from __future__ import annotations

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_norm

SD3 = Adapter(
    "SD3Transformer2DModel",
    lists=("transformer_blocks",),
    blocks={
        "JointTransformerBlock": BlockSpec(
            ("encoder_hidden_states", "hidden_states"),
            (
                BranchSpec("attn", "joint", streams=("hidden_states", "encoder_hidden_states")),
                BranchSpec("attn2", "self"),
                BranchSpec("ff", "mlp"),
                BranchSpec("ff_context", "mlp"),
            ),
        )
    },
    head="proj_out",
    joint="image first",
    modulated=by_norm,
)
