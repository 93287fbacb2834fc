"""`CogVideoXTransformer3DModel`: two streams that share their MLP; latents [B, F, C, H, W]."""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.sites import Call

_STREAMS = ("hidden_states", "encoder_hidden_states")


def _modulated(block: nn.Module, call: Call) -> Tensor:
    text = call.get("encoder_hidden_states")
    out: Tensor = block.norm1(call.x, text, call.get("temb"))[0]  # type: ignore[operator]
    return out


COGVIDEOX = Adapter(
    "CogVideoXTransformer3DModel",
    lists=("transformer_blocks",),
    blocks={
        "CogVideoXBlock": BlockSpec(_STREAMS, (BranchSpec("attn1", "joint", streams=_STREAMS), BranchSpec("ff", "mlp")))
    },
    head="proj_out",
    layout="frames first",
    modulated=_modulated,
)
