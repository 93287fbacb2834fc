"""The measure of quality that cards quote beside accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def frechet(features: Array, reference: Array) -> float:
    """Fréchet distance between Gaussians fitted to two feature sets [n, d] and [m, d].

    The trace of the root of the product of the covariances is the sum of the singular values of `Ra @ Rb.T`, with R
    the triangular factors of the centred sets: the same number as by a matrix root, also where there are fewer samples
    than features and the covariances are singular.
    """
    (mean_a, root_a), (mean_b, root_b) = _gaussian(features), _gaussian(reference)
    common = float(np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum())
    spread = float((root_a**2).sum() + (root_b**2).sum())
    return max(0.0, float(((mean_a - mean_b) ** 2).sum()) + spread - 2 * common)


def _gaussian(features: Array) -> tuple[Array, Array]:
    """Mean [d] and a factor R with R.T @ R the covariance [d, d]."""
    mean = features.mean(0)
    factor: Array = np.linalg.qr(features - mean, mode="r") / np.sqrt(max(1, len(features) - 1))
    return mean, factor
