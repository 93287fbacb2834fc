"""What is measured on images: PSNR and SSIM against the uncached run, Fréchet distance, class accuracy, LPIPS."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import linalg
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

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


def frechet(features: Array, reference: Array) -> float:
    """Fréchet distance between Gaussians fitted to two feature sets [n, d] and [m, d].

    The trace of the root of the product of the covariances is the sum of the singular values of `Ra @ Rb.T`, with R
    the triangular factors of the centred sets: the same number as by a matrix root, also where there are fewer samples
    than features and the covariances are singular.
    """
    (mean_a, root_a), (mean_b, root_b) = _gaussian(features), _gaussian(reference)
    common = float(linalg.svdvals(root_a @ root_b.T).sum())
    spread = float((root_a**2).sum() + (root_b**2).sum())
    return max(0.0, float(((mean_a - mean_b) ** 2).sum()) + spread - 2 * common)


def _gaussian(features: Array) -> tuple[Array, Array]:
    """Mean [d] and a factor R with R.T @ R the covariance [d, d]."""
    mean = features.mean(0)
    factor: Array = np.linalg.qr(features - mean, mode="r") / np.sqrt(max(1, len(features) - 1))
    return mean, factor


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
