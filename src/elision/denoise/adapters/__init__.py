"""What the engine must know of a denoiser class, as data: one small file per diffusers architecture."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec, generic
from elision.denoise.adapters.aura_flow import AURA_FLOW
from elision.denoise.adapters.cogvideox import COGVIDEOX
from elision.denoise.adapters.cosmos import COSMOS
from elision.denoise.adapters.dit import DIT
from elision.denoise.adapters.flux import FLUX
from elision.denoise.adapters.flux2 import FLUX2
from elision.denoise.adapters.hidream import HIDREAM
from elision.denoise.adapters.hunyuan_dit import HUNYUAN_DIT
from elision.denoise.adapters.hunyuan_video import HUNYUAN_VIDEO
from elision.denoise.adapters.hunyuan_video15 import HUNYUAN_VIDEO15
from elision.denoise.adapters.ltx import LTX
from elision.denoise.adapters.ltx2 import LTX2
from elision.denoise.adapters.lumina2 import LUMINA2
from elision.denoise.adapters.mochi import MOCHI
from elision.denoise.adapters.pixart import PIXART
from elision.denoise.adapters.policy import POLICY
from elision.denoise.adapters.qwenimage import QWEN_IMAGE
from elision.denoise.adapters.sana import SANA
from elision.denoise.adapters.sd3 import SD3
from elision.denoise.adapters.skyreels_v2 import SKYREELS_V2
from elision.denoise.adapters.wan import WAN, WAN_VACE
from elision.denoise.adapters.z_image import Z_IMAGE
from elision.denoise.sites import Level

__all__ = ["ADAPTERS", "Adapter", "BlockSpec", "BranchSpec", "adapter_for", "supported"]

_ALL = (
    AURA_FLOW,
    COGVIDEOX,
    COSMOS,
    DIT,
    FLUX,
    FLUX2,
    HIDREAM,
    HUNYUAN_DIT,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO15,
    LTX,
    LTX2,
    LUMINA2,
    MOCHI,
    PIXART,
    POLICY,
    QWEN_IMAGE,
    SANA,
    SD3,
    SKYREELS_V2,
    WAN,
    WAN_VACE,
    Z_IMAGE,
)
ADAPTERS: dict[str, Adapter] = {a.model_class: a for a in _ALL}


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
