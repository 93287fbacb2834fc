"""Masked-diffusion language models: one layer as data, and the three things that may be done with its rows.

Any decoder in the Llama layout of transformers (Llama, Qwen2, Qwen3, Mistral ...: projections for q, k, v and o,
perhaps norms of q and k, perhaps biases, grouped heads, rotation by absolute position) is driven here layer by layer,
through its own modules, without a causal mask. Nothing is installed on the model: a method decides which rows go
through `Block.project` and `Block.finish`, and no linear layer ever sees another one. When a model is taken in, its own
forward pass and this loop are compared on a few tokens, so that an architecture with a twist is refused, not damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from elision.errors import OptionError, UnsupportedTarget

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_ATTENTION_EXTRA = {"q_norm", "k_norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROBE = 5  # tokens of the comparison
_SHIFTED = {"dream"}

REFUSED = {
    "llada2": (
        "LLaDA-2 attends causally between blocks, so the keys and values of finished blocks are exact and its own "
        "prefix cache already elides what the methods of this family elide; use a fully bidirectional model, "
        "such as LLaDA or Dream"
    ),
    "diffusion_gemma": (
        "DiffusionGemma has no [MASK] token: every canvas token is renoised and fed back through self-conditioning at "
        "every step, so no row of the canvas ever holds still, and its prompt is cached exactly by its own encoder"
    ),
}


@dataclass(frozen=True)
class Rotation:
    """Rotary factors of all positions: cos and signed sin, [B | 1, N, 1, D]."""

    cos: Tensor
    sin: Tensor

    def at(self, pos: Tensor) -> Rotation:
        """The factors at positions [B, m]."""
        if self.cos.shape[0] == 1:
            return Rotation(self.cos[0][pos], self.sin[0][pos])
        index = pos[:, :, None, None].expand(-1, -1, 1, self.cos.shape[-1])
        return Rotation(self.cos.gather(1, index), self.sin.gather(1, index))

    def first(self, reach: int) -> Rotation:
        """The factors of the first `reach` positions."""
        return Rotation(self.cos[:, :reach], self.sin[:, :reach])

    def turn(self, x: Tensor) -> Tensor:
        """Rotate x [B, m, heads, D]."""
        half = x.shape[-1] // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
        return torch.addcmul(x * self.cos, swapped, self.sin)


class Block:
    """One decoder layer, taken apart.

    Attributes:
        heads: Hq, query heads.
        kv_heads: G, key and value heads.
        head_dim: D.
        scale: factor of the dot products.
    """

    def __init__(self, layer: nn.Module) -> None:
        _expect(layer, _LAYER, set())
        attention = cast(Any, layer.self_attn)
        _expect(attention, _ATTENTION, _ATTENTION_EXTRA)
        self.attention = attention
        whole = cast(Any, layer)
        self.norm_in, self.norm_mid, self.mlp = whole.input_layernorm, whole.post_attention_layernorm, whole.mlp
        self.q, self.k, self.v, self.o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_dim = int(attention.head_dim)
        self.heads = _width(self.q) // self.head_dim
        self.kv_heads = _width(self.k) // self.head_dim
        self.scale = float(getattr(attention, "scaling", self.head_dim**-0.5))
        for norm in (self.q_norm, self.k_norm):
            if norm is not None and norm.weight.numel() != self.head_dim:
                raise UnsupportedTarget(
                    f"{type(attention).__name__} norms queries over {norm.weight.numel()} channels: only norms over "
                    f"one head ({self.head_dim}) are supported"
                )

    def project(self, h: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [B, m, Hq, D] and k [B, m, G, D], and v [B, m, G, D], of layer inputs h [B, m, d]."""
        x = self.norm_in(h)
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q(x).view(split), self.k(x).view(split), self.v(x).view(split)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turned = rotation.turn(torch.cat((q, k), dim=2))
        return turned[:, :, : self.heads], turned[:, :, self.heads :], v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of q [B, m, Hq, D] over k, v [B, n, G, D]: [B, m, Hq · D]; mask [B, 1, 1, n], True attends."""
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            scale=self.scale,
            enable_gqa=self.heads != self.kv_heads,
        )
        return out.transpose(1, 2).flatten(2)

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Attention weights of few queries q [B, m, Hq, D] over k [B, n, G, D]: [B, G, Hq/G, m, n] in float32."""
        batch, rows = q.shape[:2]
        grouped = q.view(batch, rows, self.kv_heads, -1, self.head_dim).permute(0, 2, 3, 1, 4)  # [B, G, g, m, D]
        scores = ((grouped * self.scale).flatten(2, 3) @ k.permute(0, 2, 3, 1)).float()  # [B, G, g · m, n]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=-1).view(batch, self.kv_heads, -1, rows, k.shape[1])

    def mix(self, weights: Tensor, v: Tensor) -> Tensor:
        """Values v [B, n, G, D] under weights [B, G, g, m, n]: [B, m, Hq · D]."""
        out = weights.flatten(2, 3).to(v.dtype) @ v.transpose(1, 2)  # [B, G, g · m, D]
        return out.view(*weights.shape[:4], -1).permute(0, 3, 1, 2, 4).flatten(2)

    def finish(self, h: Tensor, o: Tensor) -> Tensor:
        """The rest of the layer: h [B, m, d] with attention output o [B, m, Hq · D]."""
        h = h + self.o(o)
        return cast(Tensor, h + self.mlp(self.norm_mid(h)))


class MaskedLM:
    """A masked-diffusion language model, ready to be driven row by row.

    Attributes:
        model: the module that the user gave.
        blocks: its layers.
        mask_id: the [MASK] token.
        shift: whether the output at position t predicts token t + 1 (Dream) rather than token t (LLaDA).
    """

    def __init__(self, model: nn.Module, mask_id: int, shift: bool, *, source: nn.Module | None = None) -> None:
        decoder = cast(Any, model).model
        self.model = model if source is None else source
        self.embed, self.norm, self._rotary = decoder.embed_tokens, decoder.norm, decoder.rotary_emb
        self.lm_head = cast(Any, model).lm_head
        self.blocks = [Block(layer) for layer in decoder.layers]
        self.mask_id = mask_id
        self.shift = shift
        first = self.blocks[0]
        self.heads, self.kv_heads, self.head_dim = first.heads, first.kv_heads, first.head_dim
        self.width = int(self.embed.weight.shape[1])
        self.vocab = int(self.embed.weight.shape[0])

    @property
    def layers(self) -> int:
        """L, the number of layers."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return cast(Tensor, self.embed.weight).device

    @property
    def dtype(self) -> torch.dtype:
        """What the embeddings are made of."""
        return cast(Tensor, self.embed.weight).dtype

    def rotation(self, positions: Tensor) -> Rotation:
        """Rotary factors of absolute positions [B | 1, N]."""
        like = self.embed.weight[:1, : self.head_dim][None]
        cos, sin = self._rotary(like, positions)
        half = self.head_dim // 2
        if cos.shape[-1] != self.head_dim:
            raise UnsupportedTarget(
                f"{type(self.model).__name__} rotates {cos.shape[-1]} of {self.head_dim} channels: partial rotation is "
                "not supported"
            )
        signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return Rotation(cos[:, :, None], signed[:, :, None])

    def head(self, h: Tensor) -> Tensor:
        """Logits [B, m, V] of outputs h [B, m, d] of the last layer."""
        return cast(Tensor, self.lm_head(self.norm(h)))

    @torch.no_grad()
    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, N, V] of one plain pass over ids [B, N], nothing cached."""
        positions, mask = place(ids, attention_mask)
        rotation, h = self.rotation(positions), self.embed(ids)
        for block in self.blocks:
            q, k, v = block.project(h, rotation)
            h = block.finish(h, block.attend(q, k, v, mask))
        return self.head(h)


def place(ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Absolute positions [B | 1, N] and the key mask [B, 1, 1, N] of a left-padded batch.

    Positions count real tokens; padded ones get 1, as in Dream. Without padding there is no mask.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return torch.arange(ids.shape[1], device=ids.device)[None], None
    real = attention_mask.bool()
    positions = (real.long().cumsum(dim=-1) - 1).masked_fill(~real, 1)
    return positions, real[:, None, None, :]


def masked_lm(model: Any, *, mask_id: int | None = None, shift: bool | None = None) -> MaskedLM:
    """Take in a model object.

    Args:
        model: a module in the Llama layout of transformers, a LLaDA or Dream model made by its own code, or what this
            function returned before.
        mask_id: the [MASK] token, if the config does not tell (`mask_token_id`).
        shift: whether the output at position t predicts token t + 1; by default true for Dream only.

    Raises:
        OptionError: a mask token outside the vocabulary, or one that differs from how the model was taken in.
        UnsupportedTarget: a causal model (no mask token known), an encoder–decoder, sliding or hybrid layers, another
            layout, or a model whose own forward pass differs from the loop of this module.
    """
    if isinstance(model, MaskedLM):
        if mask_id not in (None, model.mask_id) or shift not in (None, model.shift):
            raise OptionError(
                f"the model was taken in with mask_id={model.mask_id} and shift={model.shift}: give the model itself "
                "to take it in differently"
            )
        return model
    refuse(model)
    if not isinstance(model, nn.Module):
        raise UnsupportedTarget(
            f"{type(model).__name__} is no language model: give a transformers model, or what elision.dllm.load returns"
        )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedTarget(f"{type(model).__name__} is an encoder–decoder: give a decoder-only model")
    mask_id = _mask_id(model, config, mask_id)
    if shift is None:
        shift = str(getattr(config, "model_type", "")).lower() in _SHIFTED
    host = model
    if _is_llada(model):
        from elision.dllm.checkpoints import from_llada

        host = from_llada(config, model.state_dict())
    _check_layout(host)
    lm = MaskedLM(host, mask_id, shift, source=model)
    if not 0 <= mask_id < lm.vocab:
        raise OptionError(f"mask_id={mask_id} is outside the vocabulary of {lm.vocab} tokens")
    if type(host).__module__.startswith("transformers."):
        _compare(host, lm)
    return lm


def refuse(model: Any) -> None:
    """Raise for the models that are known and cannot be served, with the reason."""
    names = [type(model).__name__, type(getattr(model, "model", None)).__name__]
    names.append(str(getattr(getattr(model, "config", None), "model_type", "")))
    text = " ".join(names).lower().replace("_", "")
    for key, why in REFUSED.items():
        if key.replace("_", "") in text:
            raise UnsupportedTarget(f"{type(model).__name__} is not supported: {why}")


def _mask_id(model: nn.Module, config: Any, given: int | None) -> int:
    known = given if given is not None else getattr(config, "mask_token_id", None)
    if known is None:
        raise UnsupportedTarget(
            f"{type(model).__name__} declares no mask token (config.mask_token_id), so it is taken for a causal model, "
            "which these methods cannot serve: if it was trained as a masked-diffusion model, say "
            "elision.dllm.masked_lm(model, mask_id=...)"
        )
    return int(known)


def _is_llada(model: nn.Module) -> bool:
    return hasattr(getattr(getattr(model, "model", None), "transformer", None), "blocks")


def _check_layout(model: nn.Module) -> None:
    name, config = type(model).__name__, getattr(model, "config", None)
    decoder = getattr(model, "model", None)
    missing = [part for part in ("embed_tokens", "layers", "norm", "rotary_emb") if not hasattr(decoder, part)]
    if missing or not hasattr(model, "lm_head"):
        raise UnsupportedTarget(
            f"{name} is not in the Llama layout (model.{', model.'.join(missing) or 'layers'}, lm_head): only such "
            "decoders are supported"
        )
    kinds = {k for k in getattr(config, "layer_types", None) or () if k != "full_attention"}
    attention = [layer.self_attn for layer in cast(Any, decoder).layers if hasattr(layer, "self_attn")]
    windows = [w for w in (getattr(a, "sliding_window", None) for a in attention) if w is not None]
    window = windows[0] if windows else getattr(config, "sliding_window", None)
    if kinds or (window is not None and getattr(config, "use_sliding_window", True)):
        what = ", ".join(sorted(kinds)) or f"sliding_window={window}"
        raise UnsupportedTarget(
            f"{name} has layers that do not see every position ({what}): a masked-diffusion model is fully "
            "bidirectional; set sliding_window=None in its config if the model was trained without it"
        )


def _expect(module: nn.Module, needed: set[str], extra: set[str]) -> None:
    # modules without weights or children (dropout, activations) change nothing at inference
    found = {name for name, child in module.named_children() if _has_weights(child) or name in needed}
    if found - extra != needed:
        raise UnsupportedTarget(
            f"{type(module).__name__} has the parts {', '.join(sorted(found)) or 'none'}; the Llama layout has "
            f"{', '.join(sorted(needed))}: this architecture is not supported"
        )


def _has_weights(module: nn.Module) -> bool:
    parts: Iterator[Tensor] = module.parameters()
    return next(parts, None) is not None


def _width(linear: Any) -> int:
    return int(linear.out_features)


@torch.no_grad()
def _compare(model: nn.Module, lm: MaskedLM) -> None:
    """Run both ways over a few tokens; a 4-D mask of zeros takes the causal mask away."""
    if getattr(model.config, "_attn_implementation", "sdpa") not in ("sdpa", "eager"):
        return  # kernels that take no such mask; the layout was checked
    ids = torch.arange(_PROBE, device=lm.device)[None] % lm.vocab
    zeros = torch.zeros(1, 1, _PROBE, _PROBE, dtype=lm.dtype, device=lm.device)
    training = [module for module in model.modules() if module.training]  # dropout would make them differ
    try:
        for module in training:
            module.training = False
        theirs = model(input_ids=ids, attention_mask=zeros, use_cache=False).logits.float()
    finally:
        for module in training:
            module.training = True
    ours = lm.logits(ids).float()
    limit = 1e-3 if lm.dtype in (torch.float32, torch.float64) else 5e-2
    error = float((theirs - ours).norm() / theirs.norm().clamp(min=1e-9))
    if not error <= limit:
        raise UnsupportedTarget(
            f"{type(model).__name__} computes something else than a Llama layer does (relative difference {error:.2g}, "
            f"limit {limit:g}): its architecture is not supported"
        )
