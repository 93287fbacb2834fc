"""Tiny models and recorded trajectories for the tests of this family."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from elision.dllm import MaskedLM, masked_lm
from elision.dllm.decode import Noise

DATA = Path(__file__).parents[1] / "data"
MASK = 47


@dataclass(frozen=True)
class Recorded:
    """One recorded trajectory."""

    slug: str
    name: str
    options: dict[str, Any]
    about: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors


@functools.cache
def recorded(slug: str) -> dict[str, Recorded]:
    """All trajectories of one system by name."""
    about = json.loads((DATA / f"{slug}.json").read_text())
    tensors = load_file(DATA / f"{slug}.safetensors")
    out = {}
    for case in about["cases"]:
        mine = {k.removeprefix(case["name"] + "."): v for k, v in tensors.items() if k.startswith(case["name"] + ".")}
        out[case["name"]] = Recorded(slug, case["name"], case["options"], case, mine)
    return out


def names(slug: str) -> list[str]:
    """Names of the trajectories of one system."""
    return [case["name"] for case in json.loads((DATA / f"{slug}.json").read_text())["cases"]]


@functools.cache
def recorded_model(slug: str, weights: str) -> nn.Module:
    """One of the two models of a recording."""
    about = json.loads((DATA / f"{slug}.json").read_text())["models"][weights]
    facts = {k: v for k, v in about.items() if k not in ("qkv_bias", "rope_theta")}
    kind = transformers.Qwen2Config if about["qkv_bias"] else transformers.LlamaConfig
    config = kind(**facts, rope_parameters={"rope_type": "default", "rope_theta": about["rope_theta"]})
    config.mask_token_id = MASK
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tensors = load_file(DATA / f"{slug}.safetensors")
    model.load_state_dict({k.removeprefix(weights + "."): v for k, v in tensors.items() if k.startswith(weights + ".")})
    return model.requires_grad_(False)


def recorded_lm(slug: str, weights: str, *, shift: bool = False) -> MaskedLM:
    """The same, taken in."""
    return masked_lm(recorded_model(slug, weights), shift=shift)


class Replay(Noise):
    """Random numbers of a recording; `table[(purpose, number)]` is [B, N]."""

    def __init__(self, table: dict[tuple[str, int], Tensor]) -> None:
        super().__init__()
        self.table = table

    def draw(
        self, purpose: str, number: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        return self.table[purpose, number].to(dtype)


KINDS = ("mha", "gqa", "qk_norm", "mistral")


@functools.cache
def tiny(kind: str, layers: int = 3, seed: int = 0, vocab: int = 48) -> nn.Module:
    """A random model with a [MASK] token that it never predicts."""
    facts: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind == "mha" else 2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config: Any
    if kind == "qk_norm":
        config = transformers.Qwen3Config(**facts, head_dim=16)
    elif kind == "gqa":
        config = transformers.Qwen2Config(**facts)
    elif kind == "mistral":
        config = transformers.MistralConfig(**facts, sliding_window=None)
    else:
        config = transformers.LlamaConfig(**facts)
    config.mask_token_id = vocab - 1
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 0.25 if "proj" in name else 1.0)
            elif "bias" in name:
                p.normal_(0, 0.1)
        model.lm_head.weight[-1] = 0
    return model.requires_grad_(False)


def lm_of(kind: str, *, shift: bool = False, layers: int = 3, seed: int = 0) -> MaskedLM:
    """A random model, taken in."""
    return masked_lm(tiny(kind, layers, seed), shift=shift)


def prompts(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random prompts [B, P] of ordinary tokens."""
    return torch.randint(0, MASK - 1, (batch, length), generator=torch.Generator().manual_seed(seed))
