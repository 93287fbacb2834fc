"""What the engine must know of a denoiser class, as data: one small file per diffusers architecture."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec, generic
from elision.denoise.adapters.dit import DIT
from elision.denoise.adapters.flux import FLUX
from elision.denoise.adapters.pixart import PIXART
from elision.denoise.adapters.policy import POLICY
from elision.denoise.adapters.qwenimage import QWEN_IMAGE
from elision.denoise.adapters.sd3 import SD3
from elision.denoise.adapters.wan import WAN
from elision.denoise.sites import Level

__all__ = ["ADAPTERS", "Adapter", "BlockSpec", "BranchSpec", "adapter_for", "supported"]

ADAPTERS: dict[str, Adapter] = {a.model_class: a for a in (DIT, FLUX, PIXART, POLICY, QWEN_IMAGE, SD3, WAN)}


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of the model's class or of one it inherits from; otherwise the generic one (site `model` only)."""
    for cls in type(model).__mro__:
        if cls.__name__ in ADAPTERS:
            return ADAPTERS[cls.__name__]
    return generic(model)


def supported(levels: Iterable[Level]) -> tuple[str, ...]:
    """Names of the denoiser classes that have a site at one of `levels`."""
    wanted = set(levels)
    if "model" in wanted:
        return ("any denoiser",)
    return tuple(sorted(name for name, adapter in ADAPTERS.items() if wanted & set(adapter.levels)))
