"""Images as data URIs: samples, their amplified difference from the uncached run, videos, and edited regions."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, features
from torch import Tensor

AMPLIFY = 4
_THUMBNAIL = 192
_LOSSLESS = 64  # images of at most this side are kept as they are
_REGION = 128  # side to which images with regions are enlarged, so that outlines are thin
_EDITED = torch.tensor([255.0, 138.0, 20.0])[:, None, None]
_TRUE = torch.tensor([90.0, 220.0, 255.0])[:, None, None]
# dark to bright, so that no difference is dark and a large one glows
_RAMP = np.array([[12, 10, 22], [72, 20, 105], [165, 44, 96], [237, 105, 37], [251, 180, 26], [252, 255, 164]])


def sample_uri(image: Tensor) -> str:
    """`image` [C, H, W] in [0, 1]; large ones become thumbnails."""
    return _uri(_pixels(image))


def _pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    """[H, W] or [H, W, 3] of an image [C, H, W] in [0, 1]."""
    pixels: npt.NDArray[np.uint8] = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]


def moving_uri(frames: Tensor, milliseconds: int = 125) -> str:
    """Frames [F, C, H, W] in [0, 1] as one animated image that repeats."""
    pictures = [Image.fromarray(_pixels(frame)).convert("RGB") for frame in frames]
    small = max(pictures[0].size) <= _LOSSLESS
    for picture in pictures if not small else ():
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    given = {"save_all": True, "append_images": pictures[1:], "duration": milliseconds, "loop": 0}
    kind = "png" if small or not features.check("webp") else "webp"  # animated PNG is lossless
    pictures[0].save(stream, kind.upper(), **given)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def sheet(frames: Tensor, columns: int = 4, most: int = 8) -> Tensor:
    """At most `most` of the frames [F, C, H, W], evenly chosen, as one image [C, h, w] with `columns` in a row."""
    chosen = [i * len(frames) // min(most, len(frames)) for i in range(min(most, len(frames)))]
    tiles = torch.nn.functional.pad(frames[chosen], (0, 1, 0, 1))  # a dark line between the frames
    empty = -len(tiles) % columns
    tiles = torch.cat([tiles, torch.zeros_like(tiles[:1]).expand(empty, -1, -1, -1)]) if empty else tiles
    rows = tiles.reshape(-1, min(columns, len(tiles)), *tiles.shape[1:])  # [rows, columns, C, h, w]
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[:, :-1, :-1]


def region_uri(image: Tensor, region: Tensor | None, truth: Tensor | None) -> str:
    """An image [C, H, W] with what a method takes for edited shining, the rest dark; the true region is outlined.

    Args:
        image: what is shown.
        region: [h, w] bool, one entry for every token; None shows the image as it is.
        truth: [H, W] bool.
    """
    scale = max(1, round(_REGION / max(image.shape[-2:])))
    pixels = torch.from_numpy(_pixels(image).copy()).float()
    pixels = pixels.unsqueeze(-1).expand(-1, -1, 3) if pixels.ndim == 2 else pixels
    pixels = _enlarged(pixels.permute(2, 0, 1), [n * scale for n in image.shape[-2:]])  # [3, H, W]
    if region is not None:
        mine = _enlarged(region[None].float(), list(pixels.shape[-2:]))[0] > 0.5
        pixels = torch.where(mine, 0.7 * pixels + 0.3 * _EDITED, 0.35 * pixels)
        pixels = torch.where(_outline(mine, scale), _EDITED, pixels)
    if truth is not None:
        whole = _enlarged(truth[None].float(), list(pixels.shape[-2:]))[0] > 0.5
        pixels = torch.where(_outline(whole, scale), _TRUE, pixels)
    return _uri(pixels.round().byte().permute(1, 2, 0).numpy(), lossless=True)


def _enlarged(image: Tensor, size: list[int]) -> Tensor:
    return torch.nn.functional.interpolate(image[None], size=size, mode="nearest")[0]


def _outline(mask: Tensor, width: int) -> Tensor:
    """Pixels [H, W] of a mask that lie within `width // 2 + 1` of its border, to which the image's belongs."""
    reach = width // 2 + 1
    outside = torch.nn.functional.pad(1 - mask[None].float(), (reach,) * 4, value=1.0)
    return mask & (torch.nn.functional.max_pool2d(outside, 2 * reach + 1, 1)[0] > 0.5)


def difference(image: Tensor, reference: Tensor) -> Tensor:
    """The absolute difference, averaged over channels and amplified, [1, H, W] in [0, 1]."""
    return ((image - reference).abs().mean(0, keepdim=True) * AMPLIFY).clamp(0, 1)


def difference_uri(image: Tensor, reference: Tensor) -> str:
    """The absolute difference, averaged over channels and amplified, on a dark-to-bright ramp."""
    return ramp_uri(difference(image, reference))


def ramp_uri(values: Tensor) -> str:
    """Values [1, H, W] in [0, 1] on a dark-to-bright ramp."""
    place = values[0].numpy() * (len(_RAMP) - 1)
    channels = [np.interp(place, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)]
    return _uri(np.stack(channels, -1).round().astype(np.uint8))


def _uri(pixels: npt.NDArray[np.uint8], lossless: bool = False) -> str:
    picture = Image.fromarray(pixels)
    lossless = lossless or max(picture.size) <= _LOSSLESS
    if not lossless:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if lossless:
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.save(stream, "JPEG", quality=88)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
