"""`HunyuanVideo15Transformer3DModel`: two-stream blocks alone."""

from __future__ import annotations

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_norm

_STREAMS = ("hidden_states", "encoder_hidden_states")

HUNYUAN_VIDEO15 = Adapter(
    "HunyuanVideo15Transformer3DModel",
    lists=("transformer_blocks",),
    blocks={
        "HunyuanVideo15TransformerBlock": BlockSpec(
            _STREAMS,
            (
                BranchSpec("attn", "joint", streams=_STREAMS),
                BranchSpec("ff", "mlp"),
                BranchSpec("ff_context", "mlp"),
            ),
        )
    },
    head="proj_out",
    joint="image first",
    modulated=by_norm,
)
