"""One forward of a prompt for many methods: what its attention saw is recorded and shown to each of them.

No method changes what the prompt's own tokens compute: rules act on a layer after its attention. So the queries, keys,
values and outputs of one full forward are those of every method's, and a method under test need not pay for the rest of
the model again. Where that is not so (rolled positions, pseudo rows, layers that a method does not manage) the prompt
is passed for real. Bytes and peaks are those of the real thing: the same tensors go into the same stores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from elision.hooks.transformers import Attention, Host, Out, Seam
from elision.kv.engine import KVApplied


@dataclass(slots=True)
class Shown(Attention):
    """A recorded call: asked for the attention of its own queries and keys it gives the recorded output."""

    out: Out

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Out:
        """The recorded output, or the model's own function for anything else."""
        same = q is self.q and k.shape == self.k.shape and mask is self.mask
        return self.out if same else Attention.run(self, q, k, v, mask)


@dataclass
class Recording:
    """A prompt's forward with the full cache.

    Attributes:
        ids: of the prompts, [B, S].
        calls: the attention calls in the order in which they ran.
        logits: after the last token, [B, V].
        cache: the full cache; the recorded tensors are its own.
    """

    ids: Tensor
    calls: list[Shown]
    logits: Tensor
    cache: DynamicCache

    @property
    def tokens(self) -> int:
        """Tokens recorded, all rows together."""
        return self.ids.numel()


@torch.no_grad()
def record(model: Any, ids: Tensor) -> Recording:
    """Pass prompts `ids` [B, S] through the full cache and remember every attention call."""
    host = Host.of(model)
    calls: list[Shown] = []

    def seen(att: Attention) -> Out:
        out = att.run(att.q, att.k, att.v, att.mask)
        calls.append(Shown(att.module, att.layer, att.q, att.k, att.v, att.mask, att.rotary, att.extra, out))
        return out

    def forward(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return inner(*args, **kwargs)

    cache = DynamicCache(config=host.config)
    seam = Seam(host, host.attention, forward, seen)
    try:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    finally:
        seam.remove()
    return Recording(ids, calls, logits, cache)


def replayable(run: KVApplied) -> bool:
    """Whether a recorded prompt is all that this method sees of a model."""
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=run.host.config).layers)
    return plain and run.pseudo is None and not run.method.raw() and set(run.layers) == set(run.host.attention)


@torch.no_grad()
def replay(run: KVApplied, recording: Recording, cache: DynamicCache) -> None:
    """Fill `cache`, which must be fresh and of `run`, as the recorded prompts would."""

    def shown(**kwargs: Any) -> BaseModelOutputWithPast:
        hidden = recording.calls[0].q
        for call in recording.calls:
            call = Shown(
                call.module,
                call.layer,
                call.q,
                # a store owns what it is given and writes into it
                call.k.clone(),
                call.v.clone(),
                call.mask,
                call.rotary,
                call.extra,
                call.out,
            )
            run._attention(call)
        for layer in cache.layers:
            layer.is_initialized = True
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=kwargs["past_key_values"])

    run._decoder(shown, (), {"input_ids": recording.ids, "past_key_values": cache, "use_cache": True})
