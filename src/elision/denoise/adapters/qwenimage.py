"""`QwenImageTransformer2DModel`: two-stream blocks; positions come from the shapes of the images."""

from __future__ import annotations

from torch import Tensor, nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.sites import Call


def _modulated(block: nn.Module, call: Call) -> Tensor:
    modulation = block.img_mod(call.get("temb")).chunk(2, dim=-1)[0]  # type: ignore[operator]
    normed = block.img_norm1(call.x)  # type: ignore[operator]
    out: Tensor = block._modulate(normed, modulation, call.get("modulate_index"))[0]  # type: ignore[operator]
    return out


def _grids(call: Call) -> list[tuple[int, int]]:
    """From `img_shapes`, (frames, height, width) of every image; all rows of a batch have the same."""
    shapes = call.get("img_shapes")[0]
    return [(frames * height, width) for frames, height, width in (shapes if isinstance(shapes, list) else [shapes])]


QWEN_IMAGE = Adapter(
    "QwenImageTransformer2DModel",
    lists=("transformer_blocks",),
    blocks={
        "QwenImageTransformerBlock": BlockSpec(
            ("encoder_hidden_states", "hidden_states"),
            (
                BranchSpec("attn", "joint", streams=("hidden_states", "encoder_hidden_states")),
                BranchSpec("img_mlp", "mlp"),
                BranchSpec("txt_mlp", "mlp"),
            ),
        )
    },
    head="proj_out",
    modulated=_modulated,
    token_axes={"hidden_states": 1},
    token_tables={"pos_embed": (0, 0)},
    token_inputs={"modulate_index": 1},
    grids=_grids,
)
