"""Watching attention: how much of it every token receives, without ever storing an N x N matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elision.denoise.sites import argument, parameter_names
from elision.hooks.attention import AttentionCalls
from elision.hooks.taps import Inner, Tap, tap_call


def received(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    image: slice = slice(None),
    chunk: int = 1024,
) -> Tensor:
    """Attention that each token receives: column means of the softmax over queries and heads, summing to 1.

    Args:
        query: [B, H, N, D] after norm and rotation.
        key: [B, H or a divisor of it, N, D].
        scale: of the products; None is 1 / sqrt(D).
        mask: boolean (True may attend) or added to the products, broadcast against [B, H, N, N].
        image: the tokens that count, as queries and as receivers; the others only take their share of the softmax.
        chunk: queries at a time.

    Returns:
        [B, n] in float32, n the number of tokens of `image`.
    """
    q, k = query.float(), key.float()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = range(*image.indices(q.shape[2]))
    total = q.new_zeros(q.shape[0], len(rows))
    for start in range(rows.start, rows.stop, chunk):
        part = slice(start, min(start + chunk, rows.stop))
        products = q[:, :, part] @ k.transpose(-1, -2) * scale
        if mask is not None:
            mine = mask[..., part, :] if mask.shape[-2] > 1 else mask
            products = products.masked_fill(~mine, -torch.inf) if mine.dtype == torch.bool else products + mine
        total += products.softmax(-1)[..., image].sum(dim=(1, 2)) / q.shape[1]
    return total / total.sum(-1, keepdim=True)


class AttentionWatch:
    """Taps on the self- and joint attention of every block; `pending` holds what was seen since the last `take`.

    Args:
        model: the denoiser.
        blocks: block path to the paths of the modules in which its self-attention happens.
        image: the parameter of a block that holds its image tokens.
        text_first: whether text tokens stand before the image tokens in joint attention.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, list[str]], image: str, text_first: bool) -> None:
        self.text_first = text_first
        self.pending: dict[str, list[Tensor]] = {}
        self._tokens = 0
        self.taps: list[Tap] = []
        for path, modules in blocks.items():
            self.taps.append(tap_call(model.get_submodule(path), self._on_block(model.get_submodule(path), image)))
            self.taps += [tap_call(model.get_submodule(m), self._on_attention(path)) for m in modules]

    def remove(self) -> None:
        """Take all taps off."""
        for tap in reversed(self.taps):
            tap.remove()

    def take(self) -> dict[str, Tensor]:
        """Per block the attention received [B, n]; several attentions of one block are averaged."""
        out = {path: torch.stack(several).mean(0) for path, several in self.pending.items()}
        self.pending.clear()
        return out

    def _on_block(self, block: nn.Module, image: str) -> Callable[[Inner, tuple[Any, ...], dict[str, Any]], Any]:
        names = parameter_names(block)

        def wrap(inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._tokens = argument(names, args, kwargs, image).shape[1]
            return inner(*args, **kwargs)

        return wrap

    def _on_attention(self, path: str) -> Callable[[Inner, tuple[Any, ...], dict[str, Any]], Any]:
        def seen(call: Mapping[str, Any]) -> None:
            q, k = call["query"], call["key"]
            if q.shape[2] != k.shape[2]:
                return  # an adapter's extra keys, not the tokens' own
            n = q.shape[2]
            image = slice(n - self._tokens, n) if self.text_first else slice(0, self._tokens)
            mine = received(q, k, scale=call.get("scale"), mask=call.get("attn_mask"), image=image)
            self.pending.setdefault(path, []).append(mine)

        def wrap(inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with AttentionCalls(seen):
                return inner(*args, **kwargs)

        return wrap
