"""Sites: the places in a denoiser whose value can be kept, and what a call at one of them looks like.

Levels, from the outside in: `guided` (what guidance made of the predictions of a step, seen at `scheduler.step`),
`model` (latent to prediction), `head` (the output projection, with hollow blocks), `stack` (tokens after the embedding
to tokens before the head), `run` (consecutive blocks), `branch` (attention or MLP output before its gate), `kv` (keys
and values of one attention). A stand-in of a stack or run goes in at its last block: what other code adds between the
blocks (ControlNet residuals) is then counted once.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Level = Literal["guided", "model", "head", "stack", "run", "branch", "kv"]
Kind = Literal["self", "cross", "joint", "mlp", "fused"]
Joined = Literal["text first", "image first"]


@dataclass(frozen=True)
class Site:
    """One place whose output can be replaced.

    Attributes:
        key: unique name within the denoiser, for instance `transformer_blocks.0.attn`.
        level: how far in it lies.
        tail: path of the module whose output is the value ("" is the denoiser itself).
        feeders: modules that only feed the tail; on a stand-in they return zero-width tensors.
        blocks: for head, stack and run: block paths in order; on a stand-in they hand their streams through.
        streams: names of the values at the tail, in the order it returns them; empty for a single tensor.
        only: the streams that are kept; empty means all.
        kind: what a branch computes.
        entry: a block whose incoming image tokens are shown to the site as `call.entry`; empty for none.
        joined: for a tail that returns in one tensor the tokens of two streams that enter the first block apart: which
            come first.
    """

    key: str
    level: Level
    tail: str
    feeders: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    kind: Kind | None = None
    entry: str = ""
    joined: Joined | None = None

    @property
    def modules(self) -> frozenset[str]:
        """Paths of all modules that do not run when this site stands in."""
        return frozenset((self.tail, *self.feeders, *self.blocks))

    @property
    def returned(self) -> bool:
        """Whether the value itself, or a view of it, is in the hands of the sampling loop."""
        return self.level in ("guided", "model", "head")

    def contains(self, other: Site) -> bool:
        """Whether a stand-in here means that `other` is never reached."""
        if self.level in ("guided", "model"):
            return other.level != "guided"
        return all(self._reaches(module) for module in other.modules)

    def overlaps(self, other: Site) -> bool:
        """Whether a stand-in here leaves out a part of `other`, but not all of it."""
        if self.level in ("guided", "model") or other.level in ("guided", "model"):
            return False
        return any(self._reaches(module) for module in other.modules) and not self.contains(other)

    def blinds(self, other: Site) -> bool:
        """Whether a stand-in here hides the block whose input `other` looks at, and not `other` itself."""
        inside = self.level not in ("guided", "model") and not self.contains(other)
        return bool(other.entry) and inside and self._reaches(other.entry)

    def _reaches(self, module: str) -> bool:
        """Whether a module is one of this site's, or inside of one."""
        return any(module == mine or module.startswith(mine + ".") for mine in self.modules)


@dataclass(slots=True)
class Call:
    """One call at a site.

    Attributes:
        x: the tensor that goes in: the latent at `model`, the scheduler's sample at `guided` (the denoiser's latent
            while it is decided), the image tokens at `stack` and `run`, the first tensor argument elsewhere.
        names: parameter names of the module's forward, in order.
        args: positional and
        kwargs: keyword arguments of the call; at `guided` those of the denoiser's call.
        entry: the image tokens that entered the block `site.entry` in this call, where the site asks for them.
        inputs: at `stack` and `run` the incoming value of every stream, at `model` of every further latent.
        module: the module that was called.
        sigmas: at `guided` the noise levels of the full grid, one more than there are steps.
    """

    x: Tensor
    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: nn.Module
    entry: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    sigmas: Sequence[float] = ()

    def stream(self, x: Tensor) -> str:
        """The name of the stream that `x` is the incoming value of, empty if it is none of several."""
        return next((name for name, value in self.inputs.items() if value is x), "")

    def get(self, name: str, default: Any = None) -> Any:
        """The argument called `name`, wherever it stands in the call."""
        return argument(self.names, self.args, self.kwargs, name, default)


def argument(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, default: Any = None
) -> Any:
    """The argument called `name` of a call, by keyword or by its position among `names`."""
    if name in kwargs:
        return kwargs[name]
    if name in names:
        position = names.index(name)
        if position < len(args):
            return args[position]
    return default


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the module's own forward (the class's, so that wrapped instances read the same)."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor argument of a call, positional ones first."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("a tapped module was called without a tensor argument")


def split_tokens(tokens: Tensor, image: int, order: Joined) -> tuple[Tensor, Tensor]:
    """Image and text tokens of [B, image + text, C], as views."""
    text = tokens.shape[1] - image
    first, second = torch.split_with_sizes(tokens, [image, text] if order == "image first" else [text, image], dim=1)
    return (first, second) if order == "image first" else (second, first)


def join_tokens(image: Tensor, text: Tensor, order: Joined) -> Tensor:
    """What `split_tokens` takes apart."""
    return torch.cat([image, text] if order == "image first" else [text, image], dim=1)


def channel_axis(x: Tensor) -> int:
    """The channel axis of a latent: 1 for [B, C, H, W] and [B, C, F, H, W], the last for tokens [B, L, C]."""
    return 1 if x.ndim >= 4 else x.ndim - 1


def common(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Views of `x` and `out` on the channels that both have.

    Image-to-video models see condition channels behind the latent ones, learned-variance models return more channels
    than they see; neither belongs to statistics nor to residuals.
    """
    axis = channel_axis(out)
    width = min(x.shape[axis], out.shape[axis])
    return x.narrow(axis, 0, width), out.narrow(axis, 0, width)
