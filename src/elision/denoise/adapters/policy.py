"""`TransformerForDiffusion` of diffusion policies: torch's pre-norm decoder layers, an action chunk as the latent.

The branches are the outputs of a layer's three dropouts, which in evaluation are those of self-attention,
cross-attention and MLP just before the residual sums. There are no gates.
"""

from __future__ import annotations

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec

POLICY = Adapter(
    "TransformerForDiffusion",
    latent="sample",
    lists=("decoder.layers",),
    blocks={
        "TransformerDecoderLayer": BlockSpec(
            ("tgt",),
            (
                BranchSpec("dropout1", "self", feeders=("self_attn",)),
                BranchSpec("dropout2", "cross", feeders=("multihead_attn",)),
                BranchSpec("dropout3", "mlp", feeders=("linear1", "linear2")),
            ),
        )
    },
    head="head",
    image="tgt",
    whole="makes positions for the whole action chunk",
    lacks={"modulated": "its blocks see the time as a token that they attend to"},
)
