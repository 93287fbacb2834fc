"""Tiny random models of the image classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    Flux2Transformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    SanaTransformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn

from tests.denoise.adapters.subjects import Subject, image, text
from tests.models import KINDS, Inputs, draw


def _flux2() -> nn.Module:
    return Flux2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )


def _flux2_inputs(batch: int, size: int, seed: int, images: int = 1) -> Inputs:
    side, zero = torch.arange(size).float(), torch.zeros(1)
    ids = torch.cartesian_prod(10 * torch.arange(images).float(), side, side, zero)
    return {
        "encoder_hidden_states": text(batch, seed),
        "img_ids": ids.expand(batch, -1, -1),
        "txt_ids": torch.cartesian_prod(zero, zero, zero, torch.arange(3).float()).expand(batch, -1, -1),
    }


def _qwen_edit() -> nn.Module:
    """References are told that their time is zero, as in the later Edit models."""
    plain = KINDS["qwen"].build()
    return type(plain)(**{**plain.config, "zero_cond_t": True})  # type: ignore[arg-type, dict-item]


def _sana() -> nn.Module:
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=4,
    )


def _lumina2() -> nn.Module:
    return Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 8, 8),
        cap_feat_dim=8,
    )


def _lumina2_inputs(batch: int, size: int, seed: int) -> Inputs:
    mask = torch.ones(batch, 3, dtype=torch.bool)
    mask[:, 2:] = seed == 10  # the empty prompt is shorter
    return {"encoder_hidden_states": text(batch, seed), "encoder_attention_mask": mask}


def _backwards(model: nn.Module, x: Tensor, time: Tensor, inputs: Inputs) -> Any:
    return -model(x, timestep=1 - time, return_dict=False, **inputs)[0]


def _hidream() -> nn.Module:
    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[8, 8],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1, 0, 1],
    )


def _hidream_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {
        "encoder_hidden_states_t5": text(batch, seed),
        "encoder_hidden_states_llama3": draw(1, 2, 2, 8, seed=seed + 2).repeat(batch, 1, 1, 1),
        "pooled_embeds": draw(1, 8, seed=seed + 3).repeat(batch, 1),
    }


def _call_hidream(model: nn.Module, x: Tensor, time: Tensor, inputs: Inputs) -> Any:
    layers = inputs["encoder_hidden_states_llama3"].unbind(1)  # [B, layer, L, D]: a list of layers
    return -model(x, timesteps=time, return_dict=False, **{**inputs, "encoder_hidden_states_llama3": layers})[0]


def _z_image() -> nn.Module:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 8, 8],
    )


def _call_z_image(model: nn.Module, x: Tensor, time: Tensor, inputs: Inputs) -> Any:
    rows = list(x.unsqueeze(2).unbind(0))
    captions = list(inputs["cap_feats"].unbind(0))
    out = model(rows, (1000 - time) / 1000, captions, return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


def _aura_flow() -> nn.Module:
    return AuraFlowTransformer2DModel(
        sample_size=4,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )


def _hunyuan_dit() -> nn.Module:
    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=4,
        hidden_size=16,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        text_len=3,
        text_len_t5=3,
        use_style_cond_and_image_meta_size=False,
    )


def _hunyuan_dit_inputs(batch: int, size: int, seed: int) -> Inputs:
    n = size // 2
    return {
        "encoder_hidden_states": text(batch, seed),
        "text_embedding_mask": torch.ones(batch, 3),
        "encoder_hidden_states_t5": text(batch, seed + 50),
        "text_embedding_mask_t5": torch.ones(batch, 3),
        "image_rotary_emb": get_2d_rotary_pos_embed(8, ((0, 0), (n, n)), (n, n), output_type="pt"),
    }


IMAGES: dict[str, Subject] = {
    "Flux2": Subject(
        _flux2, lambda b, n: (b, n * n, 4), _flux2_inputs, scale=1000.0, blocks=4, guidance="none, or two named calls"
    ),
    "Flux2 (edit)": Subject(
        _flux2,
        lambda b, n: (b, n * n, 4),
        lambda b, n, s: _flux2_inputs(b, n, s, images=2),
        scale=1000.0,
        blocks=4,
        edits=True,
        guidance="none, or two named calls",
    ),
    "Qwen-Image": Subject(
        KINDS["qwen"].build,
        lambda b, n: (b, n * n, 4),
        lambda b, n, s: KINDS["qwen"].inputs(b, n, s) | {"img_shapes": [[(1, n, n)]] * b},
        scale=1000.0,
        guidance="two named calls",
    ),
    "Qwen-Image (edit)": Subject(
        _qwen_edit,
        lambda b, n: (b, n * n, 4),
        KINDS["qwen"].inputs,
        scale=1000.0,
        edits=True,
        guidance="two named calls",
    ),
    "Sana": Subject(_sana, image, lambda b, n, s: {"encoder_hidden_states": text(b, s)}, blocks=2),
    "Lumina2": Subject(
        _lumina2,
        image,
        _lumina2_inputs,
        scale=1000.0,
        blocks=2,
        invoke=_backwards,
        uncounted="it places text by the sums of its mask",
        guidance="two unnamed calls",
    ),
    "HiDream": Subject(
        _hidream,
        image,
        _hidream_inputs,
        blocks=4,
        invoke=_call_hidream,
        uncounted="its experts are chosen by the data",
    ),
    "Z-Image": Subject(
        _z_image,
        image,
        lambda b, n, s: {"cap_feats": text(b, s)},
        blocks=2,
        cond_first=True,
        invoke=_call_z_image,
    ),
    "AuraFlow": Subject(
        _aura_flow, image, lambda b, n, s: {"encoder_hidden_states": text(b, s)}, scale=1000.0, blocks=4
    ),
    "HunyuanDiT": Subject(_hunyuan_dit, image, _hunyuan_dit_inputs, variance=True, blocks=4),
}
