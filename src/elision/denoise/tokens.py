"""Token views: a prediction as tokens [B, N, d] and back, with one token per modality where there are several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elision.denoise.sites import channel_axis
from elision.errors import UnsupportedTarget


class TokenView:
    """Split an output into tokens and put it together again.

    Outputs [B, L, d] are tokens already. Of [B, C, H, W], [B, C, F, H, W] (and [B, F, C, H, W] where only that axis has
    as many channels as the modalities together) every place becomes a token, or with `modalities` one token for each:
    all places of the first one, then all of the second, short ones padded with zero channels.

    Args:
        modalities: number of channels of each; None is one modality with all channels.
    """

    def __init__(self, modalities: Sequence[int] | None = None) -> None:
        self.modalities = modalities
        self._axis = 0
        self._shape: tuple[int, ...] = ()

    def split(self, out: Tensor) -> Tensor:
        """Tokens [B, N, d] of an output, in memory of their own where the axes moved."""
        self._axis = self._channels(out)
        last = out.movedim(self._axis, -1)
        self._shape = last.shape
        places = last.reshape(len(out), -1, last.shape[-1])
        if self.modalities is None:
            return places
        width = max(self.modalities)
        parts = torch.split_with_sizes(places, list(self.modalities), dim=-1)
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts], dim=1)

    def join(self, tokens: Tensor) -> Tensor:
        """The output of the last `split` with these tokens in it."""
        if self.modalities is not None:
            parts = tokens.chunk(len(self.modalities), dim=1)
            tokens = torch.cat([p[..., :c] for p, c in zip(parts, self.modalities, strict=True)], dim=-1)
        return tokens.reshape(self._shape).movedim(-1, self._axis)

    def _channels(self, out: Tensor) -> int:
        """The channel axis."""
        axis = channel_axis(out)
        if self.modalities is None:
            return axis
        wanted = sum(self.modalities)
        found = [a for a in dict.fromkeys((axis, 2 if out.ndim == 5 else axis)) if out.shape[a] == wanted]
        if not found:
            raise UnsupportedTarget(
                f"modalities={tuple(self.modalities)} are {wanted} channels, and the prediction of shape "
                f"{tuple(out.shape)} has {out.shape[axis]}: give as many as it has"
            )
        return found[0]
