"""What is measured on images: PSNR and SSIM against the uncached run, Fréchet distance, LPIPS."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from elision.zoo._quality import frechet

__all__ = ["PSNR_CAP", "Array", "frechet", "lpips_metric", "psnr", "ssim"]
Array = npt.NDArray[np.float64]
PSNR_CAP = 100.0
_LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"


def psnr(images: Tensor, reference: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of every image, in dB, for values in [0, 1].

    Args:
        images: [B, C, H, W].
        reference: [B, C, H, W], what an uncached run drew from the same noise.

    Identical images have no error; they are given `PSNR_CAP` so that means stay finite.
    """
    a, b = _arrays(images), _arrays(reference)
    with np.errstate(divide="ignore"):
        return [min(PSNR_CAP, float(peak_signal_noise_ratio(y, x, data_range=1.0))) for x, y in zip(a, b, strict=True)]


def ssim(images: Tensor, reference: Tensor) -> list[float]:
    """Structural similarity of every image, for values in [0, 1]."""
    a, b = _arrays(images), _arrays(reference)
    side = min(a.shape[-2:])
    window = min(7, side if side % 2 else side - 1)
    return [
        float(structural_similarity(x, y, data_range=1.0, channel_axis=0, win_size=window))
        for x, y in zip(a, b, strict=True)
    ]


def _arrays(images: Tensor) -> Array:
    return images.detach().double().cpu().numpy()


def lpips_metric() -> tuple[Callable[[Tensor, Tensor], list[float]] | None, str]:
    """The LPIPS distance and an empty note, or None and why it cannot be had here. Nothing is downloaded."""
    if importlib.util.find_spec("lpips") is None:
        return None, "LPIPS is not reported: the package lpips is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_BACKBONE
    if not weights.exists():
        return None, f"LPIPS is not reported: its backbone weights ({_LPIPS_BACKBONE}) are not in torch's hub cache"
    network = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval()

    @torch.no_grad()
    def distance(images: Tensor, reference: Tensor) -> list[float]:
        def ready(x: Tensor) -> Tensor:
            x = x.float().cpu() * 2 - 1
            x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
            # below 64 pixels AlexNet's last maps vanish
            return torch.nn.functional.interpolate(x, size=64) if min(x.shape[-2:]) < 64 else x

        values: list[float] = network(ready(images), ready(reference)).reshape(-1).tolist()
        return values

    return distance, ""
