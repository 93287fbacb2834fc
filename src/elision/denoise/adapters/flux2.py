"""`Flux2Transformer2DModel`: two-stream blocks, then blocks of one joined stream in which attention and MLP are one."""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._grids import by_positions
from elision.denoise.sites import Call


def _modulated(block: nn.Module, call: Call) -> Tensor:
    modulation = call.get("temb_mod_img")  # shared by all blocks
    modulation = modulation.unsqueeze(1) if modulation.ndim == 2 else modulation
    shift, scale = modulation.chunk(6, dim=-1)[:2]
    out: Tensor = (1 + scale) * block.norm1(call.x) + shift  # type: ignore[operator]
    return out


FLUX2 = Adapter(
    "Flux2Transformer2DModel",
    lists=("transformer_blocks", "single_transformer_blocks"),
    blocks={
        "Flux2TransformerBlock": BlockSpec(
            ("encoder_hidden_states", "hidden_states"),
            (
                BranchSpec("attn", "joint", streams=("hidden_states", "encoder_hidden_states")),
                BranchSpec("ff", "mlp"),
                BranchSpec("ff_context", "mlp"),
            ),
        ),
        "Flux2SingleTransformerBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn", "fused"),), joined="text first"
        ),
    },
    head="proj_out",
    refused={"kv_cache_mode": "it keeps keys and values of the references itself, in calls of changing length"},
    modulated=_modulated,
    token_axes={"hidden_states": 1, "img_ids": -2},
    unbatched=("img_ids", "txt_ids"),
    grids=by_positions,
)
