"""Tiny models of the KV tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.kv.rig import Recorded


def llama(case: Recorded) -> LlamaForCausalLM:
    """The Llama of a recorded run, with its weights."""
    config = dict(case.options["config"])
    theta = config.pop("rope_theta")
    model = LlamaForCausalLM(LlamaConfig(**config, rope_parameters={"rope_type": "default", "rope_theta": theta}))
    weights = {k.removeprefix("w."): t for k, t in case.tensors.items() if k.startswith("w.")}
    model.load_state_dict(weights, strict=not config.get("tie_word_embeddings"))
    return model.eval()


@torch.no_grad()
def decode(model: Any, prompt: Tensor, forced: Tensor, cache: Any = None) -> Tensor:
    """Logits after the prompt [B, S] and after every forced token [B, T]: [B, T + 1, V]."""
    prompt, forced = (x if x.ndim == 2 else x[None] for x in (prompt, forced))
    out = model(prompt, past_key_values=cache, use_cache=True)
    logits = [out.logits[:, -1]]
    for t in range(forced.shape[1]):
        out = model(forced[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
IMAGE = 7  # the image token of the vision-language models


def _text(name: str, **more: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**TINY, **more})


def _language(name: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(_text(name, **more))

    return make


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=_text("llama"), image_token_id=IMAGE)
    return LlavaForConditionalGeneration(config)


def _idefics3() -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = Idefics3Config(
        vision_config=vision, text_config=_text("llama"), image_token_id=IMAGE, scale_factor=1, pad_token_id=0
    )
    return Idefics3ForConditionalGeneration(config)


def _smolvlm() -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = SmolVLMConfig(
        vision_config=vision, text_config=_text("llama"), image_token_id=IMAGE, scale_factor=1, pad_token_id=0
    )
    return SmolVLMForConditionalGeneration(config)


def _qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {**TINY, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "fullatt_block_indexes": [0],
        "window_size": 8,
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=8, vision_end_token_id=9
    )
    return Qwen2_5_VLForConditionalGeneration(config)


HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": _language("llama"),
    "llama-mha": _language("llama", num_key_value_heads=4),
    "llama-mqa": _language("llama", num_key_value_heads=1),
    "qwen2": _language("qwen2"),
    "qwen3": _language("qwen3", head_dim=8),
    "mistral": _language("mistral", sliding_window=None, head_dim=8),
    "gemma2": _language("gemma2", head_dim=8, **HYBRID),
    "gemma3": _language("gemma3_text", head_dim=8, **HYBRID),
    "phi3": _language("phi3"),
    "olmo2": _language("olmo2"),
    "gpt_neox": _language("gpt_neox", num_key_value_heads=4),
    "qwen3_next": _language(
        "qwen3_next",
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "llava": _llava,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "qwen2_5_vl": _qwen2_5_vl,
}


@functools.cache
def tiny(name: str) -> Any:
    """A random model of an architecture, the same every time; every layer is wide enough that heads differ."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
    return model


def prompts(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Left-padded random prompts: ids and mask [B, max]."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(10, 64, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()
