"""`AuraFlowTransformer2DModel`: two-stream blocks, then blocks of one joined stream; norms follow the attention."""

from __future__ import annotations

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.adapters._modulated import by_norm

AURA_FLOW = Adapter(
    "AuraFlowTransformer2DModel",
    lists=("joint_transformer_blocks", "single_transformer_blocks"),
    blocks={
        "AuraFlowJointTransformerBlock": BlockSpec(
            ("encoder_hidden_states", "hidden_states"),
            (
                BranchSpec("attn", "joint", streams=("hidden_states", "encoder_hidden_states")),
                BranchSpec("ff", "mlp"),
                BranchSpec("ff_context", "mlp"),
            ),
        ),
        "AuraFlowSingleTransformerBlock": BlockSpec(
            ("hidden_states",), (BranchSpec("attn", "self"), BranchSpec("ff", "mlp")), joined="text first"
        ),
    },
    head="proj_out",
    modulated=by_norm,
)
