"""Calls of a denoiser with some of its image tokens, and the keys and values of those that are left out.

Every argument with an axis of image tokens is cut to the live ones (the adapter names them), and the output is put back
at their places, zero elsewhere. Attention then sees the live tokens and the text; where keys and values of all tokens
were kept in an earlier full call, those of the live tokens and of the text are written into them at their own positions
and attention sees the whole sequence. Kept keys are normed and rotated: tokens never change their positions, so this is
the same as keeping them raw and rotating them anew (RegionE's released code), without doing it anew.

Images of a batch may have different live tokens; then each goes through the denoiser alone, with its guidance branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elision.denoise.acting import Args, Kwargs
from elision.denoise.adapters import Adapter
from elision.denoise.sites import argument, parameter_names
from elision.errors import UnsupportedTarget
from elision.hooks.attention import AttentionCalls
from elision.hooks.diffusers import Form
from elision.hooks.taps import Inner, Tap, tap_call

if TYPE_CHECKING:
    from elision.denoise.runtime import HostRuntime

Live = Tensor | Sequence[Tensor]  # indices for all images, or for each of them


@dataclass
class Kept:
    """Keys and values [B, H, N, D] of one attention in the order of its sequence, and the mask of that call."""

    k: Tensor
    v: Tensor
    mask: Tensor | None

    def rows(self, rows: slice) -> Kept:
        """Views of some rows of the batch."""
        mask = self.mask
        return Kept(self.k[rows], self.v[rows], mask if mask is None or len(mask) == 1 else mask[rows])

    def write(self, k: Tensor, v: Tensor, where: Tensor, into: bool = True) -> Kept:
        """Live keys and values [B, H, n, D] at their positions `where` [n]; `into` False leaves what is kept alone."""
        if into:
            return Kept(self.k.index_copy_(2, where, k), self.v.index_copy_(2, where, v), self.mask)
        return Kept(self.k.index_copy(2, where, k), self.v.index_copy(2, where, v), self.mask)

    def mask_for(self, where: Tensor) -> Tensor | None:
        """The mask of the live queries over the whole sequence."""
        if self.mask is None or self.mask.shape[-2] == 1:
            return self.mask
        return self.mask.index_select(-2, where)


@dataclass
class _Pass:
    """What the call that is running is about.

    Attributes:
        count: image tokens of a full call.
        live: the live ones of this one; None is a full call.
        rows: which rows of the batch it has.
        keep: whether keys and values are kept (full call), or written (live call).
        branch: guidance branch.
        hits: attention calls seen so far, by module.
        places: where the rows of a live call stand in the sequence, by their number.
    """

    count: int
    live: Tensor | None
    rows: slice
    keep: bool
    branch: str
    hits: dict[str, int] = field(default_factory=dict)
    places: dict[int, Tensor] = field(default_factory=dict)

    def where(self, length: int, text_first: bool) -> Tensor:
        """Where the `length` rows of a live call stand among all rows of a full one."""
        if length not in self.places:
            assert self.live is not None
            self.places[length] = positions(self.live, self.count, length, text_first)
        return self.places[length]


class LiveCalls:
    """One denoiser that may be called with some of its image tokens.

    Args:
        host: the denoiser.
        holder: the method that asks for it, for messages.
    """

    def __init__(self, host: HostRuntime, holder: str) -> None:
        self.host, self.holder = host, holder
        self.adapter: Adapter = host.host.adapter
        self.names = parameter_names(host.model)
        self.kept: dict[tuple[str, str, int], Kept] = {}  # by branch, module and call within it
        self.peeking = False
        self._form: Form | None = None  # of the last full call, and what its output is like
        self._like = torch.empty(0)
        self._blocks = self.adapter.attention(host.model)
        self._pass: _Pass | None = None

    @property
    def paths(self) -> set[str]:
        """Paths of the tapped modules."""
        inside = {path for modules in self._blocks.values() for path in modules}
        return inside | set(self.adapter.token_tables) | (set(self._blocks) if self.adapter.token_inputs else set())

    def taps(self) -> list[Tap]:
        """The taps inside the denoiser."""
        taps = cutting(self.host.model, self.adapter, self._live)
        for modules in self._blocks.values():
            taps += [tap_call(self.host.module(path), self._on_attention(path)) for path in modules]
        return taps

    def forget(self) -> None:
        """Free what is kept."""
        self.kept = {}

    def tensors(self) -> Iterable[Tensor]:
        """What is kept."""
        for kept in self.kept.values():
            yield from (kept.k, kept.v) if kept.mask is None else (kept.k, kept.v, kept.mask)

    def _live(self) -> Tensor | None:
        return None if self._pass is None else self._pass.live

    # -- calls of the denoiser -----------------------------------------------------------------------------------

    def whole(self, inner: Inner, args: Args, kwargs: Kwargs, keep: bool) -> Any:
        """A call with all tokens; `keep` their keys and values, or drop what this branch has kept."""
        branch = self.host.step.branch
        self.kept = {key: kept for key, kept in self.kept.items() if key[0] != branch}
        if not keep:
            return self._seen(inner(*args, **kwargs))
        with self._running(_Pass(self._count(args, kwargs), None, slice(None), True, branch)) as about:
            out = inner(*args, **kwargs)
        for modules in self._blocks.values():
            if not any(about.hits.get(path) for path in modules):
                raise UnsupportedTarget(
                    f"{self.holder}: no scaled_dot_product_attention was seen in {modules[0]}: set the attention "
                    "backend to native, as in pipe.transformer.set_attention_backend('native')"
                )
        return self._seen(out)

    def _seen(self, out: Any) -> Any:
        value, self._form = Form.split(out)
        self._like = value.new_empty(0, 0, *value.shape[2:])
        return out

    def cut(self, inner: Inner, args: Args, kwargs: Kwargs, live: Live) -> Any:
        """A call with live tokens alone; its output is zero elsewhere.

        Args:
            inner: the denoiser.
            args: positional and
            kwargs: keyword arguments of the full call.
            live: indices [N] of the live tokens, or one tensor for each image; a call that carries both guidance
                branches has the images once more behind each other.
        """
        self._refuse(args, kwargs)
        count, x = self._count(args, kwargs), argument(self.names, args, kwargs, self.adapter.latent)
        same, parts = isinstance(live, Tensor), list[tuple[Tensor, slice]]()
        if isinstance(live, Tensor):
            parts = [(live, slice(None))]
        else:
            parts = [(one, slice(b, None, len(live))) for b, one in enumerate(live)]
        joined, form = self._like.new_zeros(len(x), count, *self._like.shape[2:]), self._form
        for mine, rows in parts:
            if not len(mine):
                continue
            some_args, some_kwargs = self._select(args, kwargs, mine, rows, len(x), same)
            if not self.peeking:
                self._book(some_args, some_kwargs, len(mine), count)
            with self._running(_Pass(count, mine, rows, not self.peeking, self.host.step.branch)):
                out, form = Form.split(inner(*some_args, **some_kwargs))
            if joined.shape[2:] != out.shape[2:] or joined.dtype != out.dtype:  # nothing was seen before
                joined = out.new_zeros(len(x), count, *out.shape[2:])
            joined[rows].index_copy_(1, mine, out)
        if not self.peeking:
            self.host.book.cut[self.host.signature] += 1
        if form is None:
            raise UnsupportedTarget(
                f"{self.holder} calls the denoiser with none of its tokens before it was called with all of them"
            )
        return form.join(joined)

    @contextmanager
    def _running(self, about: _Pass) -> Iterator[_Pass]:
        self._pass = about
        try:
            yield about
        finally:
            self._pass = None
        if about.live is not None:
            known = {path for branch, path, _ in self.kept if branch == about.branch}
            lost = sorted(known - {path for path, times in about.hits.items() if times})
            if lost:
                raise UnsupportedTarget(
                    f"{self.holder}: keys and values of {lost[0]} were kept, but its attention was not seen in this "
                    "call: set the attention backend to native for the whole run"
                )

    def _count(self, args: Args, kwargs: Kwargs) -> int:
        x = argument(self.names, args, kwargs, self.adapter.latent)
        return int(x.shape[self.adapter.token_axes[self.adapter.latent]])

    def _refuse(self, args: Args, kwargs: Kwargs) -> None:
        """Residuals that other networks made for all tokens."""
        for name in self.names:
            given = argument(self.names, args, kwargs, name)
            if name.startswith("controlnet") and isinstance(given, (Tensor, list, tuple)):
                raise UnsupportedTarget(
                    f"{self.holder} calls the denoiser with some of its tokens, and {name} has residuals for all: "
                    "leave the ControlNet out"
                )

    def _select(
        self, args: Args, kwargs: Kwargs, live: Tensor, rows: slice, batch: int, same: bool
    ) -> tuple[Args, Kwargs]:
        """The arguments for some rows of the batch and the live tokens."""
        adapter = self.adapter
        for name in self.names:
            value = argument(self.names, args, kwargs, name)
            if not same and name not in adapter.unbatched:
                if isinstance(value, Mapping) and value:
                    raise UnsupportedTarget(
                        f"{self.holder}: the images of this batch have regions of their own, and {name} cannot be "
                        "taken apart: draw one image at a time"
                    )
                if isinstance(value, (Tensor, list)) and not (isinstance(value, Tensor) and value.ndim == 0):
                    value = value[rows] if len(value) == batch else value
            if name in adapter.token_axes and isinstance(value, Tensor):
                value = value.index_select(adapter.token_axes[name], live)
            if value is not argument(self.names, args, kwargs, name):
                args, kwargs = put(self.names, args, kwargs, name, value)
        return args, kwargs

    def _book(self, args: Args, kwargs: Kwargs, live: int, count: int) -> None:
        missing = count - live if any(branch == self.host.step.branch for branch, *_ in self.kept) else 0
        about = Shape(self.adapter, live, count, missing)
        book = self.host.book
        book.ran[book.sign(args, kwargs, about)] += 1

    # -- attention -----------------------------------------------------------------------------------------------

    def _on_attention(self, path: str) -> Callable[[Inner, Args, Kwargs], Any]:
        def change(call: Mapping[str, Any]) -> Mapping[str, Any] | None:
            about, q, k, v = self._pass, call["query"], call["key"], call["value"]
            assert about is not None
            if q.shape[2] != k.shape[2]:
                return None  # an adapter's extra keys, not the tokens' own
            nth = about.hits.get(path, 0)
            about.hits[path] = nth + 1
            key = (about.branch, path, nth)
            if about.live is None:
                self.kept[key] = Kept(own(k), own(v), call.get("attn_mask"))
                return None
            kept = self.kept.get(key)
            if kept is None:
                return None
            where = about.where(k.shape[2], self.adapter.joint == "text first")
            whole = kept.rows(about.rows).write(k.detach(), v.detach(), where, about.keep)
            return {**call, "key": whole.k, "value": whole.v, "attn_mask": whole.mask_for(where)}

        def wrap(inner: Inner, args: Args, kwargs: Kwargs) -> Any:
            if self._pass is None or (self._pass.live is not None and not self.kept):
                return inner(*args, **kwargs)
            with AttentionCalls(change):
                return inner(*args, **kwargs)

        return wrap


@dataclass(frozen=True)
class Shape:
    """The shape of a call with live tokens, for counting its FLOPs; one of a book is told by its numbers.

    Attributes:
        adapter: of the denoiser.
        live: tokens that it is called with,
        count: that it has, and
        missing: that attention sees beside them.
    """

    adapter: Adapter = field(repr=False)
    live: int
    count: int
    missing: int

    @contextmanager
    def on(self, skeleton: nn.Module) -> Iterator[None]:
        """Let a copy of the denoiser on the meta device be called as the denoiser was."""
        live = torch.arange(self.live, device="meta")
        taps = cutting(skeleton, self.adapter, lambda: live)

        def change(call: Mapping[str, Any]) -> Mapping[str, Any] | None:
            q, k, v, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
            if q.shape[2] != k.shape[2]:
                return None
            n = k.shape[2] + self.missing
            longer = {
                "key": k.new_empty(*k.shape[:2], n, k.shape[3]),
                "value": v.new_empty(*v.shape[:2], n, v.shape[3]),
            }
            return {**call, **longer, "attn_mask": None if mask is None else mask.new_empty(*mask.shape[:-1], n)}

        try:
            with AttentionCalls(change):
                yield
        finally:
            for tap in taps:
                tap.remove()


def cutting(model: nn.Module, adapter: Adapter, live: Callable[[], Tensor | None]) -> list[Tap]:
    """Taps that cut what the denoiser itself makes for every image token: tables of positions, inputs of blocks."""

    def table(which: int, axis: int) -> Callable[[Inner, Args, Kwargs], Any]:
        def wrap(inner: Inner, args: Args, kwargs: Kwargs) -> Any:
            out, mine = inner(*args, **kwargs), live()
            if mine is None:
                return out
            return tuple(o.index_select(axis, mine) if i == which else o for i, o in enumerate(out))

        return wrap

    def inputs(names: tuple[str, ...]) -> Callable[[Inner, Args, Kwargs], Any]:
        def wrap(inner: Inner, args: Args, kwargs: Kwargs) -> Any:
            mine = live()
            for name, axis in adapter.token_inputs.items():
                value = argument(names, args, kwargs, name)
                if mine is not None and isinstance(value, Tensor):
                    args, kwargs = put(names, args, kwargs, name, value.index_select(axis, mine))
            return inner(*args, **kwargs)

        return wrap

    taps = [tap_call(model.get_submodule(path), table(*where)) for path, where in adapter.token_tables.items()]
    for path in adapter.block_paths(model) if adapter.token_inputs else ():
        block = model.get_submodule(path)
        taps.append(tap_call(block, inputs(parameter_names(block))))
    return taps


def positions(live: Tensor, count: int, length: int, text_first: bool) -> Tensor:
    """Where the `length` rows of a live call (text and live tokens) stand among all rows of a full one."""
    text = torch.arange(length - len(live), device=live.device)
    return torch.cat([text, live + len(text)]) if text_first else torch.cat([live, text + count])


def own(value: Tensor) -> Tensor:
    """The tensor without its history; copied where it is a part of a larger one, which would be kept alive with it."""
    value = value.detach()
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone()


def put(names: tuple[str, ...], args: Args, kwargs: Kwargs, name: str, value: Any) -> tuple[Args, Kwargs]:
    """The arguments with another value for `name`, wherever it stands in the call."""
    place = names.index(name)
    if name not in kwargs and place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}
