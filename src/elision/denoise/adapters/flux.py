"""`FluxTransformer2DModel`: two-stream blocks, then single-stream blocks that fuse attention and MLP."""

from __future__ import annotations

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._grids import by_positions
from elision.denoise.adapters._modulated import by_norm

_STREAMS = ("encoder_hidden_states", "hidden_states")


FLUX = Adapter(
    "FluxTransformer2DModel",
    lists=("transformer_blocks", "single_transformer_blocks"),
    blocks={
        "FluxTransformerBlock": BlockSpec(
            _STREAMS,
            (
                BranchSpec("attn", "joint", streams=("hidden_states", "encoder_hidden_states", "ip_hidden_states")),
                BranchSpec("ff", "mlp"),
                BranchSpec("ff_context", "mlp"),
            ),
        ),
        "FluxSingleTransformerBlock": BlockSpec(
            _STREAMS, (BranchSpec("proj_out", "fused", feeders=("proj_mlp", "attn")),)
        ),
    },
    head="proj_out",
    modulated=by_norm,
    token_axes={"hidden_states": 1, "img_ids": -2},
    unbatched=("img_ids", "txt_ids"),
    grids=by_positions,
)
