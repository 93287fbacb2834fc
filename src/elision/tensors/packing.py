"""Real tensors held as packed integers of 2, 3, 4 or 8 bits, with the grids that give them back.

    x [..., n, C]  ->  Packed: codes uint8 [..., n, W], low and step per group  ->  x̂ = code · step + low

A `Grid` says which elements share one `low` (their minimum, kept in floating point: no integer zero point) and one
`step` = (max - min) / (2^bits - 1): one token, a group of channels of one token, one channel, or one channel over a
group of tokens. Codes are rounded half to even and are fitted to `low` and `step` as they are stored, so that
|x - x̂| <= step / 2 holds on the stored grid whatever its dtype. A channel scale (see `channel_scale`) divides the
tensor before the grid and multiplies it after: ZipCache's channel-separable token-wise quantisation (arXiv 2405.14256).
The grouped grids are those of MiKV (arXiv 2402.18096, eq. 1) and KIVI (arXiv 2402.02750).

    grid = Grid(4, "token", group=32, params=torch.float16)
    held = quantize(keys, grid)          # [B, G, n, D]
    held.nbytes                          # of its storages, exactly
    held.dequantize(out=scratch)         # float32 is the fastest output
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from elision.errors import OptionError
from elision.session import storage_bytes

BITS = (2, 3, 4, 8)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}  # of parameters, by name
PARAMS = tuple(DTYPES.values())


def packed_width(channels: int, bits: int) -> int:
    """Bytes that `channels` codes of `bits` bits take in one row, padding of the last byte included."""
    if bits == 3:  # two bits of each code in one area, its third bit in another
        return 3 * _ceil(channels, 8)
    return _ceil(channels, _per_byte(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` uint8 [..., C], each below 2^bits, into uint8 [..., packed_width(C, bits)].

    4 bits: the byte j holds channel j (low nibble) and j + C/2. 2 bits: channels j, j + C/4, j + C/2, j + 3C/4 from the
    lowest bits up. 8 bits: plain. 3 bits: the two lower bits likewise in 2C/8 bytes, then C/8 bytes of upper bits: the
    byte j holds those of the four channels of byte j (low nibble) and of byte j + C/8. A channel count that does not
    divide is padded with zero codes.

    Raises:
        OptionError: `bits` is not 2, 3, 4 or 8.
    """
    if bits == 8:
        return codes.contiguous()
    if bits == 3:
        codes = pad(codes, (0, -codes.shape[-1] % 8))
        third = _interleave(codes >> 2, 4, 1)
        return torch.cat([_interleave(codes & 3, 4, 2), _interleave(third, 2, 4)], -1)
    parts = _per_byte(bits)
    return _interleave(pad(codes, (0, -codes.shape[-1] % parts)), parts, bits)


def unpack(packed: Tensor, bits: int, channels: int, out: Tensor | None = None) -> Tensor:
    """Undo `pack`: the codes of `packed` uint8 [..., W] as [..., channels], into `out` of any dtype where given."""
    if packed.shape[-1] != packed_width(channels, bits):
        width = packed_width(channels, bits)
        raise OptionError(f"{channels} codes of {bits} bits take {width} bytes, not {packed.shape[-1]}: use their bits")
    if out is None:
        out = packed.new_empty(*packed.shape[:-1], channels)
    if bits == 8:
        return out.copy_(packed)
    for start, codes in _areas(packed, bits):
        out[..., start : start + codes.shape[-1]].copy_(codes[..., : max(channels - start, 0)])
    return out


def _ceil(n: int, k: int) -> int:
    return -(-n // k)


def _per_byte(bits: int) -> int:
    if bits not in BITS:
        raise OptionError(f"bits={bits!r} is not one of {', '.join(map(str, BITS))}")
    return {2: 4, 3: 0, 4: 2, 8: 1}[bits]


def _interleave(codes: Tensor, parts: int, bits: int) -> Tensor:
    """OR the `parts` equal areas of the last axis into one, each `bits` bits further up than the one before."""
    first, *rest = codes.chunk(parts, -1)
    out = first.clone()
    for i, part in enumerate(rest, 1):
        out |= part << (i * bits)
    return out


def _areas(packed: Tensor, bits: int) -> Iterable[tuple[int, Tensor]]:
    """The areas that `pack` laid over each other: first channel and codes, contiguous.

    Shifts into a strided output are slow, so each area is a plain temporary.
    """
    third = None
    if bits == 3:
        eighth = packed.shape[-1] // 3
        third = torch.cat([packed[..., -eighth:] & 15, packed[..., -eighth:] >> 4], -1)
        packed, bits = packed[..., :-eighth].contiguous(), 2
    width, mask = packed.shape[-1], (1 << bits) - 1
    for i in range(8 // bits):
        codes = packed >> (i * bits) if i else packed
        if (i + 1) * bits < 8:
            codes = codes & mask
        if third is not None:
            codes |= ((third >> i) & 1) << 2
        yield i * width, codes


@dataclass(frozen=True)
class Grid:
    """Which elements of a tensor [..., n, C] share one `low` and one `step`.

    Attributes:
        bits: Bits of a code: 2, 3, 4 or 8.
        per: "token": every token has its own range, over `group` channels (`None`: all of them).
            "channel": every channel has its own range, over `group` tokens (`None`: all of them).
        group: Channels or tokens of one range; channels must divide into groups, the last group of tokens may be short.
        params: dtype of the stored `low` and `step`: float16, bfloat16 or float32. In 16 bits the range is rounded
            outwards, so that no element leaves it; ranges beyond float16's limit are cut off there.

    Raises:
        OptionError: A value is not one of these.
    """

    bits: int
    per: Literal["token", "channel"] = "token"
    group: int | None = None
    params: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Check the values."""
        _per_byte(self.bits)
        if self.per not in ("token", "channel"):
            raise OptionError(f"per={self.per!r} is not one of 'token', 'channel'")
        if self.group is not None and self.group < 1:
            raise OptionError(f"group={self.group!r} must be at least 1, or None for all")
        if self.params not in PARAMS:
            raise OptionError(f"params={self.params} is not one of {', '.join(map(str, PARAMS))}")

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def param_shape(self, n: int, channels: int) -> tuple[int, int]:
        """The last two axes of `low` and `step` for a tensor [..., n, channels]."""
        if self.per == "channel":
            return _ceil(n, self.group or max(n, 1)), channels
        if channels % (self.group or channels):
            raise OptionError(f"{channels} channels do not divide into groups of {self.group}: use a divisor")
        return n, channels // (self.group or channels)

    def row_bytes(self, channels: int) -> int:
        """Bytes of one token under a grid per token: its codes and its parameters."""
        if self.per != "token":
            raise OptionError("row_bytes is of grids per token: the parameters of a channel belong to many tokens")
        return packed_width(channels, self.bits) + 2 * self.params.itemsize * self.param_shape(1, channels)[1]


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor [..., n, C] in packed form.

    Attributes:
        codes: uint8 [..., n, packed_width(C, bits)].
        low: The minimum of each range; per token [..., n, C / group], per channel [..., ceil(n / group), C].
        step: Like `low`.
        grid: What shares a range.
        channels: C.
        scale: [..., 1, C] or `None`: what the tensor was divided by per channel before the grid.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    grid: Grid
    channels: int
    scale: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor that is held."""
        return torch.Size((*self.codes.shape[:-1], self.channels))

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is stored."""
        return (self.codes, self.low, self.step) + (() if self.scale is None else (self.scale,))

    @property
    def nbytes(self) -> int:
        """Bytes of the storages, exactly."""
        return storage_bytes(self.tensors())

    def map(self, f: Callable[[Tensor], Tensor]) -> Packed:
        """The same with `f` on every stored tensor: reorder or repeat the leading axes, move to a device."""
        scale = None if self.scale is None else f(self.scale)
        return dataclasses.replace(self, codes=f(self.codes), low=f(self.low), step=f(self.step), scale=scale)

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """x̂ [..., n, C] into `out`, of any float dtype and any strides; float32 is new memory where there is none."""
        return dequantize(self.codes, self.low, self.step, self.grid, self.channels, self.scale, out)


def quantize(x: Tensor, grid: Grid, *, valid: Tensor | None = None, scale: Tensor | None = None) -> Packed:
    """Hold `x` [..., n, C] on `grid`.

    Args:
        x: The tensor, of any float dtype; ranges are taken in float32.
        grid: What shares a range.
        valid: bool, broadcast to x: elements that are False count in no range, and come back as anything in it.
        scale: [..., 1, C] from `channel_scale`; stored by reference.

    Raises:
        OptionError: The channels do not divide into the groups of the grid.
    """
    n, channels = x.shape[-2:]
    shape = (*x.shape[:-2], *grid.param_shape(n, channels))
    y = x.float() if scale is None else x.float() / torch.where(scale > 0, scale, 1)
    if y.numel() == 0:
        none = torch.zeros(shape, dtype=grid.params, device=x.device)
        codes = torch.zeros(*x.shape[:-1], packed_width(channels, grid.bits), dtype=torch.uint8, device=x.device)
        return Packed(codes, none, none.clone(), grid, channels, scale)
    low, step = _fit(*_ranges(y, grid, valid), grid)
    codes = _encode(y, low, step, grid)
    if valid is not None:
        codes = codes * valid  # no cast of NaN, and the same bytes whatever the padding holds
    return Packed(pack(codes, grid.bits), low, step, grid, channels, scale)


def dequantize(
    codes: Tensor, low: Tensor, step: Tensor, grid: Grid, channels: int, scale: Tensor | None, out: Tensor | None
) -> Tensor:
    """x̂ of the tensors of a `Packed`; for stores that hold those as columns of their own."""
    shape = (*codes.shape[:-1], channels)
    if out is not None and out.shape != shape:
        raise OptionError(f"out has shape {tuple(out.shape)}, the held tensor {shape}: give a view of that shape")
    # A 16-bit output would round the product before the sum, so it gets a finished float32 result.
    direct = out is not None and out.dtype in (torch.float32, torch.float64)
    x = out if direct and out is not None else codes.new_empty(shape, dtype=torch.float32)
    if x.numel():
        unpack(codes, grid.bits, channels, x)
        # Two passes with one broadcast operand each: `addcmul` with two has no vectorised kernel on CPU.
        for view, a, b in zip(_groups(x, grid), _spread(step, x, grid), _spread(low, x, grid), strict=True):
            view.mul_(a).add_(b)
        if scale is not None:
            x.mul_(scale)
    return x if out is None or x is out else out.copy_(x)


def channel_scale(
    v: Tensor, *, valid: Tensor | None = None, params: torch.dtype = torch.float32, root: bool = True
) -> Tensor:
    """c_j = sqrt(max over tokens |v_tj|), [..., 1, C] of `v` [..., n, C] (ZipCache, channel-separable quantisation).

    A channel that is zero everywhere, or has no valid token, gets 0 and comes back as exactly 0 (released code turns
    every value of every token into NaN there). `root=False` leaves the square root out (a reading of the paper that its
    code does not share).
    """
    peak = v.abs().float()
    if valid is not None:
        peak = peak.masked_fill(~valid, 0)
    c = peak.amax(-2, keepdim=True) if v.shape[-2] else peak.new_zeros(*v.shape[:-2], 1, v.shape[-1])
    return (c.sqrt() if root else c).clamp(max=torch.finfo(params).max).to(params)


def _groups(x: Tensor, grid: Grid) -> list[Tensor]:
    """`x` [..., n, C] as views in which the elements of one range lie along one axis; two where a last group is short.

    Per token [..., n, C/g, g], the axis -1; per channel [..., n/g, g, C], the axis -2.
    """
    n, channels = x.shape[-2:]
    if grid.per == "token":
        size = grid.group or channels
        return [x.view(*x.shape[:-1], channels // size, size)]
    size = min(grid.group or n, n)
    whole = n // size * size
    views = [x[..., :whole, :].view(*x.shape[:-2], n // size, size, channels)]
    return views if whole == n else [*views, x[..., None, whole:, :]]


def _spread(param: Tensor, x: Tensor, grid: Grid) -> list[Tensor]:
    """`low` or `step` in the shapes that broadcast to the views of `_groups`, in float32."""
    p = param.float()
    if grid.per == "token":
        return [p[..., None]]  # [..., n, C/g, 1]
    n = x.shape[-2]
    whole = n // min(grid.group or n, n)
    p = p[..., None, :]  # [..., m, 1, C]
    return [p] if whole == p.shape[-3] else [p[..., :whole, :, :], p[..., whole:, :, :]]


def _ranges(y: Tensor, grid: Grid, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every range in the shape of the parameters; both 0 where nothing in it is valid."""
    axis = -1 if grid.per == "token" else -2
    if valid is None:
        low = [v.amin(axis) for v in _groups(y, grid)]
        high = [v.amax(axis) for v in _groups(y, grid)]
    else:
        low = [v.amin(axis) for v in _groups(y.masked_fill(~valid, torch.inf), grid)]
        high = [v.amax(axis) for v in _groups(y.masked_fill(~valid, -torch.inf), grid)]
        seen = [h >= lo for lo, h in zip(low, high, strict=True)]
        low = [lo.where(s, 0) for lo, s in zip(low, seen, strict=True)]
        high = [h.where(s, 0) for h, s in zip(high, seen, strict=True)]
    along = -2  # the groups of tokens follow each other; per token there is one view only
    return torch.cat(low, along), torch.cat(high, along)


def _fit(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """`low` and `step` as they are stored; the step spans the range from the *stored* minimum."""
    if grid.params == torch.float32:
        return low, (high - low) / grid.levels
    low = _outwards(low, grid.params, -1)
    return low, _outwards((high - low.float()) / grid.levels, grid.params, 1)


def _outwards(x: Tensor, dtype: torch.dtype, sign: int) -> Tensor:
    """`x` float32 in `dtype`, rounded down (sign -1) or up (+1), and kept finite."""
    info = torch.finfo(dtype)
    x = x.clamp(-info.max, info.max)
    near = x.to(dtype)
    beyond = (x + sign * (x.abs() * info.eps + info.smallest_normal * info.eps)).clamp(-info.max, info.max).to(dtype)
    return torch.where((near.float() - x) * sign >= 0, near, beyond)


def _encode(y: Tensor, low: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Codes uint8 of `y` float32 on the stored grid, rounded half to even. `y` is not changed."""
    codes = y.clone()
    for view, a, b in zip(_groups(codes, grid), _spread(step, y, grid), _spread(low, y, grid), strict=True):
        # A range of one value has step 0: its code is 0, its value comes back as `low`.
        view.sub_(b).div_(torch.where(a > 0, a, 1))
    return codes.round_().clamp_(0, grid.levels).to(torch.uint8)
