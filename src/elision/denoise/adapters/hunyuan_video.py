"""`HunyuanVideoTransformer3DModel`: two-stream blocks, then single blocks that fuse attention and MLP.

With an image as its first frame the blocks give those tokens a time of their own ("token replace").
"""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_norm
from elision.denoise.sites import Call

_STREAMS = ("hidden_states", "encoder_hidden_states")
_DOUBLE = BlockSpec(
    _STREAMS, (BranchSpec("attn", "joint", streams=_STREAMS), BranchSpec("ff", "mlp"), BranchSpec("ff_context", "mlp"))
)
_SINGLE = BlockSpec(_STREAMS, (BranchSpec("proj_out", "fused", feeders=("proj_mlp", "attn")),))


def _modulated(block: nn.Module, call: Call) -> Tensor:
    if "token_replace_emb" not in call.names:
        return by_norm(block, call)
    frame = call.get("token_replace_emb"), call.get("num_tokens")
    out: Tensor = block.norm1(call.x, call.get("temb"), *frame)[0]  # type: ignore[operator]
    return out


HUNYUAN_VIDEO = Adapter(
    "HunyuanVideoTransformer3DModel",
    lists=("transformer_blocks", "single_transformer_blocks"),
    blocks={
        "HunyuanVideoTransformerBlock": _DOUBLE,
        "HunyuanVideoTokenReplaceTransformerBlock": _DOUBLE,
        "HunyuanVideoSingleTransformerBlock": _SINGLE,
        "HunyuanVideoTokenReplaceSingleTransformerBlock": _SINGLE,
    },
    head="proj_out",
    joint="image first",
    modulated=_modulated,
)
