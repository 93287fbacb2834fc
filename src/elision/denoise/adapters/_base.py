"""Adapters as data: where blocks, branches and the head of a denoiser lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from elision.denoise.sites import Call, Joined, Kind, Level, Site, parameter_names
from elision.errors import UnsupportedTarget

Modulated = Callable[[nn.Module, Call], Tensor]
Grids = Callable[[Call], list[tuple[int, int]]]


@dataclass(frozen=True)
class BranchSpec:
    """One sub-block whose output is added to the residual stream.

    Attributes:
        tail: module, relative to the block, whose output is the branch before its gate.
        kind: what it computes.
        feeders: modules whose output only the tail reads.
        streams: names of the values that the tail returns, for joint attention.
    """

    tail: str
    kind: Kind
    feeders: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockSpec:
    """One block class.

    Attributes:
        streams: the values it takes and returns, in return order.
        branches: in call order.
        joined: for blocks whose one stream holds text and image tokens behind those that have them apart: which come
            first.
    """

    streams: tuple[str, ...]
    branches: tuple[BranchSpec, ...]
    joined: Joined | None = None


@dataclass(frozen=True)
class Adapter:
    """One denoiser class.

    Attributes:
        model_class: its name in diffusers.
        latent: parameter that holds the latent.
        timestep: parameter that holds the time, None if there is none.
        lists: attributes that hold the blocks, in call order.
        inner: path of the block proper within the entries of the lists.
        side: attributes that hold blocks beside the stack: their branches are sites, but no stack or run has them.
        blocks: what the block classes look like.
        head: the module that ends the denoiser; what follows it only reshapes. A final `*` is the only child there is.
        image: the stream that the head reads.
        kept: the streams that leave the stack, where it is not that one alone.
        joint: which tokens come first where attention joins image and text.
        batched: which half of a call that carries both guidance branches is conditional, in diffusers' pipelines.
        calls: the guidance branches in the order in which diffusers' pipelines call the denoiser for them without
            naming them; empty where they name them or make one call.
        layout: how latents and predictions differ from one tensor [B, C, ...] or [B, L, C]: 5-D ones are
            [B, F, C, ...], or they are lists with an entry for each row.
        others: parameters that hold further latents, in the order of the further predictions.
        lacks: levels at which there is no site (and "modulated", where nothing is), and why.
        refused: arguments with which the denoiser does what no cache of it can stand in for, and what that is.
        long_skips: whether late blocks read what early ones returned, so that runs must not hide it.
        modulated: the input of the first block after its own modulation (TeaCache's indicator).
        known: False for the generic adapter.
        token_axes: arguments with an axis of image tokens, and that axis: what a call with live tokens alone must cut.
            Empty where the denoiser cannot be called with some of its tokens.
        whole: why it cannot, where it cannot.
        token_tables: modules that make a row for every image token whatever they are called with (tables of positions):
            which of their outputs that is, and the axis of the rows.
        token_inputs: arguments of the blocks that the denoiser makes for every image token, and the axis.
        unbatched: arguments whose first axis is not the batch.
        grids: height and width, in tokens, of every image among the image tokens of a call: of the one that is drawn,
            then of the references.
    """

    model_class: str
    latent: str = "hidden_states"
    timestep: str | None = "timestep"
    lists: tuple[str, ...] = ()
    inner: str = ""
    side: tuple[str, ...] = ()
    blocks: Mapping[str, BlockSpec] = field(default_factory=dict)
    head: str | None = None
    image: str = "hidden_states"
    kept: tuple[str, ...] = ()
    joint: Literal["text first", "image first"] = "text first"
    batched: Literal["uncond first", "cond first"] = "uncond first"
    calls: tuple[str, ...] = ()
    layout: Literal["plain", "frames first", "list"] = "plain"
    others: tuple[str, ...] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    long_skips: bool = False
    modulated: Modulated | None = None
    known: bool = True
    token_axes: Mapping[str, int] = field(default_factory=dict)
    whole: str = "cuts its latent into tokens itself"
    token_tables: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    token_inputs: Mapping[str, int] = field(default_factory=dict)
    unbatched: tuple[str, ...] = ()
    grids: Grids | None = None

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels at which this class has sites."""
        inside: tuple[Level, ...] = ("head", "stack", "run", "branch") if self.lists else ()
        kv: tuple[Level, ...] = ("kv",) if self.token_axes else ()
        return ("guided", "model", *(level for level in inside if level not in self.lacks), *kv)

    def show(self, value: Any) -> Any:
        """A latent or a prediction as methods see it: one tensor with its channels at the second or the last axis."""
        if self.layout == "list" and isinstance(value, (list, tuple)):
            tensors = all(isinstance(row, Tensor) for row in value)
            return torch.stack(list(value)) if tensors and len({row.shape for row in value}) == 1 else value
        if self.layout == "frames first" and isinstance(value, Tensor) and value.ndim == 5:
            return value.transpose(1, 2)
        return value

    def give(self, value: Tensor) -> Any:
        """What `show` showed, as the denoiser returns it."""
        return list(value.unbind(0)) if self.layout == "list" else self.show(value)

    def block_paths(self, model: nn.Module) -> list[str]:
        """Paths of all blocks of the stack, in call order."""
        return self._paths(self.depths(model))

    def branch_paths(self, model: nn.Module) -> list[str]:
        """Paths of all blocks whose branches are sites: those beside the stack, then those of the stack."""
        beside = {name: len(model.get_submodule(name)) for name in self.side}  # type: ignore[arg-type]
        return [*self._paths(beside), *self.block_paths(model)]

    def _paths(self, depths: Mapping[str, int]) -> list[str]:
        inner = f".{self.inner}" if self.inner else ""
        return [f"{name}.{i}{inner}" for name, depth in depths.items() for i in range(depth)]

    def depths(self, model: nn.Module) -> dict[str, int]:
        """The number of blocks in each list; refuses models that are built without one."""
        try:
            return {name: len(model.get_submodule(name)) for name in self.lists}  # type: ignore[arg-type]
        except AttributeError:
            raise UnsupportedTarget(
                f"this {type(model).__name__} is built without {' or '.join(self.lists)}, where its blocks should be "
                "(an encoder-only variant?): use a method at the site 'model'"
            ) from None

    def spec(self, model: nn.Module, path: str) -> BlockSpec:
        """What the block at `path` looks like; refuses classes that are not in the table."""
        block = model.get_submodule(path)
        for cls in type(block).__mro__:
            if cls.__name__ in self.blocks:
                return self.blocks[cls.__name__]
        raise UnsupportedTarget(
            f"{path} of {type(model).__name__} is a {type(block).__name__}, which this adapter does not know; "
            f"known: {', '.join(self.blocks)}; use a method at the site 'model'"
        )

    def sites(self, model: nn.Module, level: Level, method: str) -> list[Site]:
        """The sites of one level: one each for guided, model, head and stack, one per branch and kv of every block."""
        if level in ("guided", "model"):
            return [Site(level, level, "")]
        if not self.lists:
            raise UnsupportedTarget(
                f"{method} works at the site {level!r}, and {self.model_class} has no adapter that says where that is: "
                f"use a method at the site 'model', or one of {', '.join(_known())}"
            )
        if level in self.lacks:
            raise UnsupportedTarget(
                f"{method} works at the site {level!r}, and {self.model_class} has none: {self.lacks[level]}"
            )
        paths = self.block_paths(model)
        if level == "head":
            return [Site("head", "head", self._head(model), blocks=tuple(paths))]
        if level == "stack":
            return [self.run(model, 0, len(paths), key="stack", level="stack", only=self.kept or (self.image,))]
        if level == "kv":
            return self._kv(model, method)
        if level == "branch":
            return [site for path in self.branch_paths(model) for site in self._branches(model, path)]
        raise UnsupportedTarget(f"sites of level {level!r} are named by their blocks: use run(first, stop)")

    def run(
        self,
        model: nn.Module,
        first: int,
        stop: int,
        key: str | None = None,
        level: Literal["stack", "run"] = "run",
        only: tuple[str, ...] = (),
    ) -> Site:
        """The site of the blocks `first` to `stop - 1` (counted over all lists)."""
        every = self.block_paths(model)
        paths = every[first:stop]
        if self.long_skips and len(paths) > 1 and stop < len(every):
            raise UnsupportedTarget(
                f"blocks {first} to {stop - 1} of {type(model).__name__} are no run: late blocks read what early ones "
                "returned; take single blocks, or all up to the last"
            )
        start, end = self.spec(model, paths[0]), self.spec(model, paths[-1])
        joined = end.joined if start.joined is None else None
        streams = end.streams if joined is None else start.streams
        name = key or f"run.{first}-{stop - 1}"
        return Site(name, level, paths[-1], (), tuple(paths), streams, only, joined=joined)

    def _head(self, model: nn.Module) -> str:
        assert self.head is not None
        if not self.head.endswith(".*"):
            return self.head
        children = [name for name, _ in model.get_submodule(self.head[:-2]).named_children()]
        if len(children) != 1:
            raise UnsupportedTarget(
                f"this {type(model).__name__} has {len(children)} output projections ({', '.join(children)}), and the "
                "site 'head' is one: use another site"
            )
        return self.head[:-1] + children[0]

    def attention(self, model: nn.Module) -> dict[str, list[str]]:
        """Per block the modules in which its image tokens attend to each other (of a fused branch all its modules)."""
        found: dict[str, list[str]] = {}
        for path in self.block_paths(model):
            block, modules = model.get_submodule(path), list[str]()
            for branch in self.spec(model, path).branches:
                if branch.kind in ("self", "joint", "fused") and getattr(block, branch.tail, None) is not None:
                    modules += [f"{path}.{name}" for name in (branch.tail, *branch.feeders)]
            found[path] = modules
        return found

    def _kv(self, model: nn.Module, method: str) -> list[Site]:
        if not self.token_axes:
            able = sorted(name for name, adapter in _adapters().items() if adapter.token_axes)
            raise UnsupportedTarget(
                f"{method} calls the denoiser with some of its tokens, which {self.model_class} cannot be: it "
                f"{self.whole}; known: {', '.join(able)}"
            )
        return [
            Site(f"{path}.kv", "kv", modules[0], tuple(modules[1:])) for path, modules in self.attention(model).items()
        ]

    def _branches(self, model: nn.Module, path: str) -> list[Site]:
        block = model.get_submodule(path)
        return [
            Site(
                f"{path}.{branch.tail}",
                "branch",
                f"{path}.{branch.tail}",
                tuple(f"{path}.{feeder}" for feeder in branch.feeders),
                streams=branch.streams,
                kind=branch.kind,
            )
            for branch in self.spec(model, path).branches
            if getattr(block, branch.tail, None) is not None
        ]


def generic(model: nn.Module) -> Adapter:
    """An adapter for any denoiser: the latent is its first parameter, the time the one that is called so."""
    names = parameter_names(model)
    if not names:
        raise UnsupportedTarget(f"{type(model).__name__}.forward takes no argument, so it is no denoiser")
    timestep = next((n for n in names if n in ("timestep", "timesteps", "t", "sigma", "time")), None)
    return Adapter(type(model).__name__, latent=names[0], timestep=timestep, known=False)


def _adapters() -> Mapping[str, Adapter]:
    from elision.denoise.adapters import ADAPTERS  # this module is imported by that one

    return ADAPTERS


def _known() -> list[str]:
    return sorted(_adapters())
