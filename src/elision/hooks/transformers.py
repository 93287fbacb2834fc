"""The seam: where caches of language models meet transformers. It knows transformers and no method.

Two places of one decoder are tapped, per instance: the decoder's call, where a session learns what enters and puts its
cache layers in place, and the call of every managed attention module, where it sees queries, keys and values after the
rotation. Attention classes look their function up under the name in `self.config`, so each managed module gets a
shallow copy of its config with a private name; the model's own config, its masks and its unmanaged layers stay as they
are. The tap adds one keyword to the call, which every attention class hands through to the function; without it the
private name means the function that the model used before.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from elision.errors import UnsupportedTarget
from elision.hooks.taps import Tap, Wrap, tap_call

NAME = "elision"
KEYWORD = "elision_seam"
SUPPORTED = ("sdpa", "eager")
Out = tuple[Tensor, Tensor | None]
_seams: weakref.WeakSet[Seam] = weakref.WeakSet()


@dataclass(slots=True)
class Attention:
    """One call of a managed attention module, after projections, norms and rotation.

    Attributes:
        module: the attention module.
        layer: its index in the cache.
        q: queries [B, Hq, m, D].
        k, v: keys and values [B, G, m, D] as `Cache.update` returned them.
        mask: what the model made: None, bool (True attends) or additive float [B, 1, m, n].
        rotary: (cos, sin) that the seam kept from the module because it was made with `raw=True`, else None.
        extra: the remaining keywords of the attention function (scaling, dropout, softcap ...).
    """

    module: nn.Module
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    extra: dict[str, Any]

    @property
    def scale(self) -> float:
        """Factor of the dot products."""
        given = self.extra.get("scaling")
        return float(self.q.shape[-1] ** -0.5 if given is None else given)

    @property
    def softcap(self) -> float | None:
        """Bound of the logits (Gemma 2), if the model has one."""
        return self.extra.get("softcap")

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Out:
        """The model's own attention function: output [B, m, Hq, D] and, from eager, the weights."""
        out: Out = _base(self.module)(self.module, q, k, v, self.fit_mask(mask, q.dtype), **self.extra)
        return out

    def fit_mask(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A boolean mask in the form that the model's attention function takes."""
        if mask is None or mask.dtype != torch.bool or implementation(self.module) != "eager":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """`q` and `k` rotated by the model's own function; cos and sin [B, n, D]."""
        turned: tuple[Tensor, Tensor] = _rotation(type(self.module))(q, k, cos, sin)  # type: ignore[arg-type]
        return turned

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [B, H, n, D] rotated as the model's own function does it, to the bit."""
        rotate = _rotation(type(self.module))  # type: ignore[arg-type]
        if cos.shape[-1] == x.shape[-1] and _turns_halves(rotate):
            return _turn_halves(x, cos, sin)
        turned: Tensor = rotate(x[:, :1], x, cos, sin)[1]  # the function turns pairs; the other half is kept small
        return turned


def implementation(module: nn.Module) -> str:
    """The attention implementation that `module` uses, seen through the seam."""
    config = module.config
    assert config is not None
    return str(getattr(config, "_elision_base", config._attn_implementation))  # type: ignore[union-attr]


def _base(module: nn.Module) -> Callable[..., Out]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Out] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation(module), eager)
    return found


@functools.cache
def _rotation(kind: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor]]:
    rotate = getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
    source = inspect.getsource(kind.forward)
    if rotate is None or "apply_rotary_pos_emb(" not in source or "position_embeddings" not in source:
        raise UnsupportedTarget(
            f"{kind.__name__} does not take its rotation as `position_embeddings`, so its keys cannot be kept "
            "unrotated: use the mode of the method that keeps rotated keys"
        )
    return rotate  # type: ignore[no-any-return]


@functools.cache
def _turns_halves(rotate: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """Whether a model's function is the usual rotation of the two halves of a head, found by trying it."""
    draw = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(*shape, generator=draw) for shape in ((1, 2, 3, 8), (1, 3, 8), (1, 3, 8)))
    return torch.equal(rotate(x, x, cos, sin)[1], _turn_halves(x, cos, sin))


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (-second half, first half) * sin without the copies that this formula makes."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    out = x * cos
    out[..., :half] -= x[..., half:] * sin[..., :half]
    out[..., half:] += x[..., :half] * sin[..., half:]
    return out


def _dispatch(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **extra: Any) -> Out:
    """The function behind the private name: to the session if its tap was passed, else what the model used before."""
    token = extra.pop(KEYWORD, None)
    if token is None:
        return _base(module)(module, q, k, v, mask, **extra)
    seam, rotary = token
    layer: int = module.layer_idx  # type: ignore[assignment]
    out: Out = seam.on_attention(Attention(module, layer, q, k, v, mask, rotary, extra))
    return out


@dataclass
class Host:
    """What the seam found in a model.

    Attributes:
        model: what the user gave.
        decoder: the module that owns the attention layers and takes `past_key_values`.
        attention: every self-attention module of the decoder by layer index.
    """

    model: nn.Module
    decoder: nn.Module
    attention: dict[int, nn.Module] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The decoder's configuration."""
        return self.decoder.config

    @classmethod
    def of(cls, model: Any) -> Host:
        """The decoder of a transformers model and its attention modules.

        Raises:
            UnsupportedTarget: no transformers decoder, an encoder–decoder, cross-attention, or an attention class that
                does not go through transformers' attention interface.
        """
        if not isinstance(model, nn.Module) or not hasattr(model, "get_decoder"):
            raise UnsupportedTarget(
                f"{type(model).__name__} is no transformers model: give a causal language model, a vision-language "
                "model or their decoder"
            )
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedTarget(
                f"{type(model).__name__} is an encoder–decoder: its cross-attention cache is not handled; give a "
                "decoder-only model"
            )
        decoder = model.get_decoder()  # type: ignore[operator]
        host = cls(model, decoder)
        for module in decoder.modules():
            if _is_attention(module):
                host.attention[module.layer_idx] = module
        if not host.attention:
            raise UnsupportedTarget(
                f"{type(decoder).__name__} has no self-attention module with a layer index and a config: its "
                "architecture is not supported"
            )
        for module in host.attention.values():
            _check(module)
        return host


def _is_attention(module: nn.Module) -> bool:
    has = hasattr(module, "layer_idx") and hasattr(module, "config") and hasattr(module, "scaling")
    return has and isinstance(module.layer_idx, int)


def _check(module: nn.Module) -> None:
    name = type(module).__name__
    if implementation(module) not in SUPPORTED:
        raise UnsupportedTarget(
            f"{name} uses attention implementation {implementation(module)!r}: only {' and '.join(SUPPORTED)} take the "
            'masks that a compressed cache needs; load the model with attn_implementation="sdpa"'
        )
    kinds = [p.kind for p in inspect.signature(type(module).forward).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise UnsupportedTarget(f"{name}.forward takes no extra keywords, so the seam cannot reach its attention")


class Seam:
    """Taps on one decoder and its attention modules, until `remove()`.

    Args:
        host: what `Host.of` found.
        layers: the layer indices to manage; all others are left alone.
        on_forward: wraps the decoder's call.
        on_attention: takes every managed attention call and returns the output [B, m, Hq, D] and weights or None.
        on_module: may change the keywords of a managed attention module's call before it runs.
        raw: keep keys unrotated: the module sees the identity rotation and `Attention.rotary` carries the true one.
    """

    def __init__(
        self,
        host: Host,
        layers: Mapping[int, nn.Module],
        on_forward: Wrap,
        on_attention: Callable[[Attention], Out],
        *,
        raw: bool = False,
    ) -> None:
        self.host = host
        self.on_attention = on_attention
        self.raw = raw
        self._shims: list[tuple[nn.Module, Any]] = []
        if raw:
            for module in layers.values():
                _rotation(type(module))  # type: ignore[arg-type]
        AttentionInterface.register(NAME, _dispatch)
        _seams.add(self)
        self.taps: list[Tap] = [tap_call(host.decoder, on_forward)]
        for module in layers.values():
            self._shims.append((module, module.config))
            shim = copy.copy(module.config)
            shim._elision_base = implementation(module)  # type: ignore[union-attr]
            shim._attn_implementation_internal = NAME  # type: ignore[union-attr]
            # a deepcopy of the model is untapped, so it gets the model's own config back
            shim.__dict__["__deepcopy__"] = functools.partial(copy.deepcopy, module.config)
            module.config = shim
            self.taps.append(tap_call(module, self._pass))

    def _pass(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rotary = None
        if self.raw:
            rotary = kwargs["position_embeddings"]
            cos, sin = rotary
            kwargs["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
        kwargs[KEYWORD] = (self, rotary)
        return inner(*args, **kwargs)

    @property
    def in_place(self) -> bool:
        """Whether all calls still reach the seam."""
        return all(tap.in_place for tap in self.taps)

    def remove(self) -> None:
        """Put every config object back and take the taps off."""
        for tap in reversed(self.taps):
            tap.remove()
        for module, config in self._shims:
            module.config = config
        self._shims.clear()
        _seams.discard(self)
        if not _seams:
            AttentionInterface._global_mapping.pop(NAME, None)
