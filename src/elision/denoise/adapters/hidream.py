"""`HiDreamImageTransformer2DModel`: two-stream blocks, then blocks of one joined stream; every one gets new text."""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.sites import Call


def _modulated(block: nn.Module, call: Call) -> Tensor:
    shift, scale = block.adaLN_modulation(call.get("temb"))[:, None].chunk(12, dim=-1)[:2]  # type: ignore[operator]
    out: Tensor = block.norm1_i(call.x).to(call.x.dtype) * (1 + scale) + shift  # type: ignore[operator]
    return out


HIDREAM = Adapter(
    "HiDreamImageTransformer2DModel",
    timestep="timesteps",
    lists=("double_stream_blocks", "single_stream_blocks"),
    inner="block",
    blocks={
        "HiDreamImageTransformerBlock": BlockSpec(
            ("hidden_states", "encoder_hidden_states"),
            (
                BranchSpec("attn1", "joint", streams=("hidden_states", "encoder_hidden_states")),
                BranchSpec("ff_i", "mlp"),
                BranchSpec("ff_t", "mlp"),
            ),
        ),
        "HiDreamImageSingleTransformerBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn1", "self"), BranchSpec("ff_i", "mlp")), joined="image first"
        ),
    },
    head="final_layer",
    joint="image first",
    modulated=_modulated,
)
