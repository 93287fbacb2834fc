"""Checkpoints of masked-diffusion language models, by hub id or path.

LLaDA and Dream come with code of their own. Their weights are those of a Llama and of a Qwen2 decoder, so they are
loaded into the classes of transformers and no remote code runs. LLaDA names its parameters differently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elision.dllm.model import REFUSED, MaskedLM, masked_lm
from elision.errors import MissingDependency, UnsupportedTarget

_DREAM_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
    "torch_dtype",
)
_LLADA_PARTS = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_LLADA_ENDS = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_LLADA_FIXED = {  # what LLaDA's configuration language can say and a Llama decoder cannot
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "attention_layer_norm": (False, None),
    "alibi": (False, None),
    "rope": (True, None),
    "scale_logits": (False, None),
    "input_emb_norm": (False, None),
    "clip_qkv": (None,),
}


def load(
    path: str | Path, *, mask_id: int | None = None, shift: bool | None = None, dtype: torch.dtype | None = None
) -> MaskedLM:
    """A masked-diffusion language model by hub id or path: LLaDA, Dream, or any decoder in the Llama layout.

    Args:
        path: folder of a checkpoint (config.json and safetensors files), or a hub id.
        mask_id: the [MASK] token, where the config does not tell.
        shift: whether outputs are shifted by one; by default true for Dream only.
        dtype: of the weights; by default as stored.

    Raises:
        UnsupportedTarget: see `masked_lm`.
        MissingDependency: transformers is not installed.
    """
    transformers = _transformers()
    config = json.loads(_file(path, "config.json").read_text())
    kind = str(config.get("model_type", "")).lower()
    for name, why in REFUSED.items():
        if kind.replace("_", "").startswith(name.replace("_", "")):
            raise UnsupportedTarget(f"{path} is a {kind} model, which is not supported: {why}")
    model: nn.Module
    if kind == "llada":
        model = from_llada(config, _weights(path), dtype=dtype)
    elif kind == "dream":
        model = from_dream(config, _weights(path), dtype=dtype)
        shift = True if shift is None else shift
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto")
    model.eval()
    return masked_lm(model, mask_id=mask_id, shift=shift)


def from_llada(config: Any, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> nn.Module:
    """The Llama decoder with LLaDA's weights (shared with `weights` where no dtype is asked for)."""
    facts = _plain(config)
    for key, allowed in _LLADA_FIXED.items():
        if key in facts and facts[key] not in allowed:
            raise UnsupportedTarget(f"this LLaDA model has {key}={facts[key]!r}: only {allowed[0]!r} has a Llama layer")
    transformers = _transformers()
    heads = int(facts["n_heads"])
    bias = bool(facts.get("include_qkv_bias") or facts.get("include_bias"))
    hidden = int(facts["d_model"])
    made = transformers.LlamaConfig(
        vocab_size=int(facts.get("embedding_size") or facts["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(facts.get("mlp_hidden_size") or int(facts.get("mlp_ratio", 4)) * hidden),
        num_hidden_layers=int(facts["n_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(facts.get("n_kv_heads") or heads),
        max_position_embeddings=int(facts.get("max_sequence_length", 4096)),
        rms_norm_eps=float(facts.get("rms_norm_eps", 1e-5)),
        rope_theta=float(facts.get("rope_theta", 10000.0)),
        tie_word_embeddings=bool(facts.get("weight_tying", False)),
        attention_bias=bias,
        mlp_bias=bool(facts.get("include_bias")),
    )
    made.mask_token_id = facts.get("mask_token_id")
    mapped = {llada_name(name): tensor for name, tensor in weights.items()}
    if bias and "model.layers.0.self_attn.o_proj.bias" not in mapped:  # LLaDA may have biases of q, k and v alone
        for i in range(made.num_hidden_layers):
            mapped[f"model.layers.{i}.self_attn.o_proj.bias"] = torch.zeros(hidden)
    return _fill(transformers.LlamaForCausalLM, made, mapped, dtype)


def llada_name(name: str) -> str:
    """The Llama name of one of LLaDA's parameters."""
    short = name.removeprefix("model.").removeprefix("transformer.")
    block = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(weight|bias)", short)
    if block and block[2] in _LLADA_PARTS:
        return f"model.layers.{block[1]}.{_LLADA_PARTS[block[2]]}.{block[3]}"
    part, _, leaf = short.rpartition(".")
    if part in _LLADA_ENDS:
        return f"{_LLADA_ENDS[part]}.{leaf}"
    raise UnsupportedTarget(f"{name!r} is no parameter of a LLaDA model with Llama blocks")


def from_dream(config: Any, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> nn.Module:
    """The Qwen2 decoder with Dream's weights; the names are the same."""
    facts = _plain(config)
    transformers = _transformers()
    known = {key: facts[key] for key in _DREAM_KEYS if facts.get(key) is not None}
    scaling = facts.get("rope_scaling") or {}
    rope = {"rope_type": "default", **scaling, "rope_theta": float(facts.get("rope_theta", 10000.0))}
    made = transformers.Qwen2Config(**known, rope_parameters=facts.get("rope_parameters") or rope)
    made.mask_token_id = facts.get("mask_token_id")
    return _fill(transformers.Qwen2ForCausalLM, made, dict(weights), dtype)


def _fill(cls: Any, config: Any, weights: dict[str, Tensor], dtype: torch.dtype | None) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = cls(config)
    wanted = set(model.state_dict())
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    lacking, surplus = wanted - set(weights) - tied, set(weights) - wanted
    if lacking or surplus:
        raise UnsupportedTarget(
            f"the weights do not fit {cls.__name__}: lacking {', '.join(sorted(lacking)[:3]) or 'nothing'}, "
            f"unknown {', '.join(sorted(surplus)[:3]) or 'nothing'}"
        )
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    device = weights["model.embed_tokens.weight"].device
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # type: ignore[union-attr]
    return model.requires_grad_(False).eval()


def _plain(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, Mapping) else dict(config.to_dict())


def _weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, one file or several."""
    from safetensors.torch import load_file

    try:
        names = sorted(set(json.loads(_file(path, "model.safetensors.index.json").read_text())["weight_map"].values()))
    except OSError:
        names = ["model.safetensors"]
    return {key: tensor for name in names for key, tensor in load_file(_file(path, name)).items()}


def _file(path: str | Path, name: str) -> Path:
    folder = Path(path)
    if folder.is_dir():
        if name == "model.safetensors.index.json" or (folder / name).exists():
            return folder / name
        raise UnsupportedTarget(
            f"{folder} has no {name}: a checkpoint is a folder with config.json and its weights as safetensors files"
        )
    _transformers()
    from transformers.utils import cached_file

    return Path(str(cached_file(str(path), name)))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency(
            "loading a language model needs transformers: pip install 'elision[transformers]'"
        ) from error
    return transformers
