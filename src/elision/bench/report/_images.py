"""Images as data URIs: samples, and their amplified difference from the uncached run."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

AMPLIFY = 4
_THUMBNAIL = 192
_LOSSLESS = 64  # images of at most this side are kept as they are
# dark to bright, so that no difference is dark and a large one glows
_RAMP = np.array([[12, 10, 22], [72, 20, 105], [165, 44, 96], [237, 105, 37], [251, 180, 26], [252, 255, 164]])


def sample_uri(image: Tensor) -> str:
    """`image` [C, H, W] in [0, 1]; large ones become thumbnails."""
    pixels = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    return _uri(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])


def difference_uri(image: Tensor, reference: Tensor) -> str:
    """The absolute difference, averaged over channels and amplified, on a dark-to-bright ramp."""
    size = (image - reference).abs().mean(0).numpy() * AMPLIFY
    place = np.clip(size, 0, 1) * (len(_RAMP) - 1)
    channels = [np.interp(place, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)]
    return _uri(np.stack(channels, -1).round().astype(np.uint8))


def _uri(pixels: npt.NDArray[np.uint8]) -> str:
    picture = Image.fromarray(pixels)
    lossless = max(picture.size) <= _LOSSLESS
    if not lossless:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if lossless:
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.save(stream, "JPEG", quality=88)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
