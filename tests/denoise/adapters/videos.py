"""Tiny random models of the video classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    CosmosTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor, nn

from tests.denoise.adapters.subjects import Subject, text, video
from tests.models import Inputs, draw

_WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "rope_max_seq_len": 32,
}


def _wan_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {"encoder_hidden_states": text(batch, seed)}


def _wan_i2v_inputs(batch: int, size: int, seed: int) -> Inputs:
    pixels = draw(1, 257, 8, seed=99).repeat(batch, 1, 1)  # CLIP's, of the first image
    return {**_wan_inputs(batch, size, seed), "encoder_hidden_states_image": pixels}


def _vace_inputs(batch: int, size: int, seed: int) -> Inputs:
    control = draw(1, 6, 2, size, size, seed=98).repeat(batch, 1, 1, 1, 1)
    return {**_wan_inputs(batch, size, seed), "control_hidden_states": control}


def _hunyuan_video(kind: str | None) -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        guidance_embeds=kind is None,
        text_embed_dim=8,
        pooled_projection_dim=4,
        rope_axes_dim=(4, 2, 2),
        image_condition_type=kind,
    )


def _hunyuan_video_inputs(batch: int, size: int, seed: int) -> Inputs:
    mask = torch.ones(batch, 3, dtype=torch.long)
    mask[:, 2:] = int(seed != 10)
    return {
        "encoder_hidden_states": text(batch, seed),
        "encoder_attention_mask": mask,
        "pooled_projections": draw(1, 4, seed=seed + 2).repeat(batch, 1),
    }


def _guided_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {**_hunyuan_video_inputs(batch, size, seed), "guidance": torch.full((batch,), 6000.0)}


def _hunyuan_video15() -> nn.Module:
    return HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 2, 2),
    )


def _hunyuan_video15_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {
        "encoder_hidden_states": text(batch, seed),
        "encoder_attention_mask": torch.ones(batch, 3),
        "encoder_hidden_states_2": text(batch, seed + 50, 2),
        "encoder_attention_mask_2": torch.tensor([[1.0, 0.0]]).repeat(batch, 1),
        "image_embeds": torch.zeros(batch, 2, 8),
    }


def _cogvideox(channels: int) -> nn.Module:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=3,
    )


def _call_cogvideox(model: nn.Module, x: Tensor, time: Tensor, inputs: Inputs) -> Any:
    return model(x.transpose(1, 2), timestep=time, return_dict=False, **inputs)[0].transpose(1, 2)


def _ltx() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=8,
    )


def _ltx_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {
        "encoder_hidden_states": text(batch, seed),
        "encoder_attention_mask": torch.ones(batch, 3),
        "num_frames": 2,
        "height": size,
        "width": size,
    }


def _ltx2() -> nn.Module:
    return LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=8,
        rope_double_precision=False,
    )


def _ltx2_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {
        "encoder_hidden_states": text(batch, seed),
        "audio_encoder_hidden_states": text(batch, seed + 50),
        "num_frames": 2,
        "height": size,
        "width": size,
        "audio_num_frames": 5,
    }


def _call_ltx2(model: nn.Module, x: Tensor, time: Tensor, inputs: Inputs) -> Any:
    """Latents of both behind each other, [B, 2 n n + 5, 4]: video, then audio."""
    both = model(x[:, :-5], x[:, -5:], timestep=time, return_dict=False, **inputs)
    return torch.cat(both, dim=1)


def _mochi() -> nn.Module:
    return MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=4,
        text_embed_dim=8,
        time_embed_dim=8,
    )


def _mochi_inputs(batch: int, size: int, seed: int) -> Inputs:
    mask = torch.ones(batch, 3)
    mask[:, 2:] = int(seed != 10)
    return {"encoder_hidden_states": text(batch, seed), "encoder_attention_mask": mask}


def _cosmos() -> nn.Module:
    return CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=8,
        adaln_lora_dim=4,
        max_size=(2, 8, 8),
        concat_padding_mask=False,
    )


def _cosmos_inputs(batch: int, size: int, seed: int) -> Inputs:
    return {"encoder_hidden_states": text(batch, seed), "fps": 16}


VIDEOS: dict[str, Subject] = {
    "Wan (T2V)": Subject(
        lambda: WanTransformer3DModel(**_WAN, in_channels=4, num_layers=2),
        video,
        _wan_inputs,
        blocks=2,
        guidance="two named calls",
    ),
    "Wan (I2V)": Subject(
        lambda: WanTransformer3DModel(**_WAN, in_channels=9, num_layers=2, image_dim=8, added_kv_proj_dim=24),
        video,
        _wan_i2v_inputs,
        extra=5,
        blocks=2,
        guidance="two named calls",
    ),
    "Wan (VACE)": Subject(
        lambda: WanVACETransformer3DModel(
            **_WAN, in_channels=4, num_layers=3, vace_layers=[0, 1], vace_in_channels=6, cross_attn_norm=True
        ),
        video,
        _vace_inputs,
        blocks=3,
        guidance="two named calls",
    ),
    "SkyReels-V2": Subject(
        lambda: SkyReelsV2Transformer3DModel(**_WAN, in_channels=4, num_layers=2),
        video,
        _wan_inputs,
        blocks=2,
        guidance="two named calls",
    ),
    "HunyuanVideo": Subject(
        lambda: _hunyuan_video(None), video, _guided_inputs, blocks=4, guidance="none, or two named calls"
    ),
    "HunyuanVideo (I2V)": Subject(
        lambda: _hunyuan_video("token_replace"), video, _hunyuan_video_inputs, blocks=4, guidance="two named calls"
    ),
    "HunyuanVideo 1.5": Subject(
        _hunyuan_video15,
        video,
        _hunyuan_video15_inputs,
        extra=5,
        blocks=2,
        uncounted="it sorts text tokens by their mask",
        guidance="two named calls",
    ),
    "CogVideoX": Subject(lambda: _cogvideox(4), video, _wan_inputs, blocks=2, invoke=_call_cogvideox),
    "CogVideoX (I2V)": Subject(lambda: _cogvideox(8), video, _wan_inputs, extra=4, blocks=2, invoke=_call_cogvideox),
    "LTX": Subject(_ltx, lambda b, n: (b, 2 * n * n, 4), _ltx_inputs, blocks=2),
    "LTX2": Subject(_ltx2, lambda b, n: (b, 2 * n * n + 5, 4), _ltx2_inputs, blocks=2, invoke=_call_ltx2),
    "Mochi": Subject(
        _mochi, video, _mochi_inputs, blocks=2, uncounted="it leaves masked text tokens out of its attention"
    ),
    "Cosmos": Subject(_cosmos, video, _cosmos_inputs, blocks=2, guidance="two unnamed calls"),
}
