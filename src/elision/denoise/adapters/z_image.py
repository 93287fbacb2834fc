"""`ZImageTransformer2DModel`: image and text tokens in one stream; both are refined before, at every step.

Latents and predictions are lists, with one entry [C, F, H, W] for each row, and the time is told as 1 - t.
"""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.sites import Call


def _modulated(block: nn.Module, call: Call) -> Tensor:
    scale = block.adaLN_modulation(call.get("adaln_input")).unsqueeze(1).chunk(4, dim=2)[0]  # type: ignore[operator]
    out: Tensor = block.attention_norm1(call.x) * (1.0 + scale)  # type: ignore[operator]
    return out


Z_IMAGE = Adapter(
    "ZImageTransformer2DModel",
    latent="x",
    timestep="t",
    lists=("layers",),
    blocks={
        "ZImageTransformerBlock": BlockSpec(
            ("x",), (BranchSpec("attention", "self"), BranchSpec("feed_forward", "mlp")), joined="image first"
        )
    },
    head="all_final_layer.*",
    image="x",
    joint="image first",
    batched="cond first",
    layout="list",
    refused={"siglip_feats": "its latents are lists of several images of different sizes"},
    modulated=_modulated,
)
