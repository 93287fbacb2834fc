"""`FluxTransformer2DModel`: two-stream blocks, then single-stream blocks that fuse attention and MLP."""

from __future__ import annotations

import torch

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_norm
from elision.denoise.sites import Call

_STREAMS = ("encoder_hidden_states", "hidden_states")


def _grids(call: Call) -> list[tuple[int, int]]:
    """From the positions (image, row, column) of the tokens; images stand behind each other."""
    ids = call.get("img_ids")
    ids = ids[0] if ids.ndim == 3 else ids
    counts = torch.unique_consecutive(ids[:, 0], return_counts=True)[1].tolist()
    sides = [part[:, 1:].amax(0) - part[:, 1:].amin(0) + 1 for part in ids.split(counts)]
    return [(int(height), int(width)) for height, width in torch.stack(sides).tolist()]


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
    grids=_grids,
)
