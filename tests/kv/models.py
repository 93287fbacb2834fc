"""Tiny models of the KV tests."""

from __future__ import annotations

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
