"""`MochiTransformer3DModel`: two streams of different width; the last block drops its text stream."""

from __future__ import annotations

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_norm

_STREAMS = ("hidden_states", "encoder_hidden_states")

MOCHI = Adapter(
    "MochiTransformer3DModel",
    lists=("transformer_blocks",),
    blocks={
        "MochiTransformerBlock": BlockSpec(
            _STREAMS,
            (
                BranchSpec("attn1", "joint", streams=_STREAMS),
                BranchSpec("ff", "mlp"),
                BranchSpec("ff_context", "mlp"),
            ),
        )
    },
    head="proj_out",
    joint="image first",
    modulated=by_norm,
)
