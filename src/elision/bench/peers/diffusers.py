"""The caches that diffusers ships, by its own configurations: `enable_cache` before a run, `disable_cache` after it.

PAB and FasterCache keep one state for all calls of a denoiser. Pipelines that call it once per guidance branch would
mix the branches, so each branch is given a state of its own here.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from elision.bench.peers._base import Kept, Peer, Stage, tensors_in
from elision.errors import MissingDependency, UnsupportedTarget
from elision.hooks.diffusers import unwrap
from elision.method import option


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks that diffusers logs when a cache goes on."""
    logging = importlib.import_module("diffusers.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _hooks(models: Sequence[nn.Module]) -> list[Any]:
    """The hooks of diffusers' registries in these models."""
    found: list[Any] = []
    for model in models:
        for module in model.modules():
            registry = module.__dict__.get("_diffusers_hook")
            if registry is not None:
                found += registry.hooks.values()
    return found


def _name_calls(stage: Stage) -> None:
    """Where a pipeline does not name its calls (`cache_context`), name them by their place in the step."""
    managers = [hook.state_manager for hook in _hooks(stage.denoisers) if hasattr(hook, "state_manager")]
    if not managers:
        return
    context = importlib.import_module("diffusers.hooks.hooks").CacheContext
    unnamed: list[bool] = []

    def name() -> None:
        if not unnamed:
            unnamed.append(managers[0]._context is None)
        if unnamed[0]:
            for manager in managers:
                manager.set_context(context(f"call {stage.branch()}"))

    stage.before_call.append(name)


@dataclass(frozen=True)
class Diffusers(Peer):
    """A cache of diffusers: `config` makes its configuration."""

    @abstractmethod
    def config(self, stage: Stage, model: nn.Module) -> Any:
        """The configuration for one denoiser."""

    @contextmanager
    def on(self, stage: Stage) -> Iterator[Kept]:
        """Enable it on every denoiser; what its hooks hold is what it keeps."""
        done: list[Any] = []
        try:
            for model in stage.denoisers:
                inner: Any = unwrap(model)
                if not callable(getattr(inner, "enable_cache", None)):
                    raise UnsupportedTarget(f"{self.name}: {type(inner).__name__} has no caches of diffusers")
                with quiet():
                    inner.enable_cache(self.config(stage, inner))
                done.append(inner)
            if not _hooks(stage.denoisers):
                raise UnsupportedTarget(f"{self.name} finds nothing to hook in {type(done[0]).__name__}")
            _name_calls(stage)
            states = self.separate(stage)
            yield lambda: self.kept(stage, states)
        finally:
            for inner in done:
                with contextlib.redirect_stdout(io.StringIO()):
                    inner.disable_cache()

    def separate(self, stage: Stage) -> dict[Any, Any]:
        """Where states are told apart by hand, all of them."""
        del stage
        return {}

    def kept(self, stage: Stage, states: Mapping[Any, Any]) -> Iterable[Tensor]:
        """Tensors of the states that the hooks hold."""
        yield from tensors_in(dict(states))
        for hook in _hooks(stage.denoisers):
            yield from tensors_in(getattr(hook, "state", None))
            yield from tensors_in(getattr(getattr(hook, "state_manager", None), "_state_cache", None))


@dataclass(frozen=True)
class _Stateful(Diffusers):
    """A cache whose hooks have one state each, which this gives to every guidance branch anew."""

    def separate(self, stage: Stage) -> dict[Any, Any]:
        """Exchange the states of all hooks before every call, by the branch that it belongs to."""
        if stage.calls == 1:
            return {}
        hooks = [hook for hook in _hooks(stage.denoisers) if hasattr(hook, "state")]
        states: dict[Any, Any] = {}

        def exchange() -> None:
            branch = stage.branch()
            for number, hook in enumerate(hooks):
                if (branch, number) not in states:
                    states[branch, number] = type(hook.state)()
                hook.state = states[branch, number]

        stage.before_call.append(exchange)
        stage.notes.append(
            f"{self.name}: each guidance branch has a state of its own, which diffusers does not give it"
        )
        return states


@dataclass(frozen=True)
class PAB(_Stateful):
    """Pyramid Attention Broadcast: attention outputs are reused for some calls, by the kind of attention."""

    name: ClassVar[str] = "diffusers:pab"
    description: ClassVar[str] = "diffusers' Pyramid Attention Broadcast"

    range: int = option(2, "calls between computations of self-attention", ge=1)
    cross: int = option(0, "the same for cross-attention; 0 computes it always", ge=0)
    temporal: int = option(0, "the same for temporal attention; 0 computes it always", ge=0)
    times: tuple[float, float] = option((100, 800), "timesteps between which outputs are reused")

    def config(self, stage: Stage, model: nn.Module) -> Any:
        """Its configuration."""
        return _library().PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.range,
            cross_attention_block_skip_range=self.cross or None,
            temporal_attention_block_skip_range=self.temporal or None,
            spatial_attention_timestep_skip_range=self.times,
            cross_attention_timestep_skip_range=self.times,
            temporal_attention_timestep_skip_range=self.times,
            current_timestep_callback=stage.time,
        )


@dataclass(frozen=True)
class FasterCache(_Stateful):
    """FasterCache: attention outputs extrapolated from the last two, and the unconditional branch from the other one.

    The second part, CFG-Cache, needs both branches in one call and predictions with the axes of an image.
    """

    name: ClassVar[str] = "diffusers:faster"
    description: ClassVar[str] = "diffusers' FasterCache"
    kind: ClassVar[Literal["reused", "predicted"]] = "predicted"

    range: int = option(2, "calls between computations of attention", ge=1)
    weight: float = option(0.5, "of the difference that is added to the last attention output", ge=0)
    uncond: int = option(5, "calls between computations of the unconditional branch", ge=1)
    times: tuple[float, float] = option((-1, 681), "timesteps between which attention is extrapolated")
    uncond_times: tuple[float, float] = option((-1, 641), "timesteps between which the branch is extrapolated")
    format: str = option("auto", "axes of the prediction", choices=("auto", "BCFHW", "BFCHW", "BCHW"))

    def config(self, stage: Stage, model: nn.Module) -> Any:
        """Its configuration; without CFG-Cache where the pipeline does not allow it."""
        whole = stage.batched and stage.image
        if not whole:
            why = "the branches are called in turn" if stage.calls > 1 else "predictions are tokens"
            why = why if stage.calls > 1 or stage.batched else "there is no guidance"
            stage.notes.append(f"{self.name}: the unconditional branch is not extrapolated, {why}")
        axes = "BCFHW" if "3D" in type(model).__name__ else "BCHW"
        return _library().FasterCacheConfig(
            spatial_attention_block_skip_range=self.range,
            spatial_attention_timestep_skip_range=self.times,
            unconditional_batch_skip_range=self.uncond,
            unconditional_batch_timestep_skip_range=self.uncond_times,
            attention_weight_callback=lambda module: self.weight,
            tensor_format=axes if self.format == "auto" else self.format,
            is_guidance_distilled=not whole,
            current_timestep_callback=stage.time,
        )


@dataclass(frozen=True)
class MagCache(Diffusers):
    """MagCache: whole calls reuse the residual while the product of calibrated magnitude ratios stays near 1.

    The ratios are measured first, by its own calibration over one uncached run from noise that no row uses.
    """

    name: ClassVar[str] = "diffusers:mag"
    description: ClassVar[str] = "diffusers' MagCache, calibrated on this model"

    threshold: float = option(0.06, "accumulated error at which a call is computed", ge=0)
    max_skip: int = option(3, "most calls in a row that are skipped", ge=0)
    retention: float = option(0.2, "share of the run, from its beginning, that is always computed", ge=0, le=1)

    def prepare(self, stage: Stage) -> None:
        """Calibrate once for every number of steps; branches are averaged."""
        if (self.name, stage.steps) in stage.memory:
            return
        told = io.StringIO()
        config = _library().MagCacheConfig(num_inference_steps=stage.steps, calibrate=True)
        models: list[Any] = [unwrap(model) for model in stage.denoisers]
        try:
            with contextlib.redirect_stdout(told):
                for model in models:
                    model.enable_cache(config)
                stage.sample()
        finally:
            for model in models:
                if model.is_cache_enabled:
                    model.disable_cache()
        found = [ast.literal_eval(text) for text in re.findall(r"^\[[-\d., e]+\]$", told.getvalue(), re.MULTILINE)]
        if not found:
            raise UnsupportedTarget(f"{self.name}: its calibration gave no ratios on {type(models[0]).__name__}")
        stage.memory[self.name, stage.steps] = np.mean(found, axis=0).tolist()

    def config(self, stage: Stage, model: nn.Module) -> Any:
        """Its configuration."""
        return _library().MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.max_skip,
            retention_ratio=self.retention,
            num_inference_steps=stage.steps,
            mag_ratios=stage.memory[self.name, stage.steps],
        )


@dataclass(frozen=True)
class FirstBlock(Diffusers):
    """First-block cache: whole calls reuse the residual of the other blocks while that of the first changes little."""

    name: ClassVar[str] = "diffusers:first_block"
    description: ClassVar[str] = "diffusers' first-block cache"

    threshold: float = option(0.05, "relative change of the first block's residual", ge=0)

    def config(self, stage: Stage, model: nn.Module) -> Any:
        """Its configuration."""
        return _library().FirstBlockCacheConfig(threshold=self.threshold)


@dataclass(frozen=True)
class TaylorSeer(Diffusers):
    """TaylorSeer: module outputs are extrapolated by divided differences, on a fixed interval."""

    name: ClassVar[str] = "diffusers:taylorseer"
    description: ClassVar[str] = "diffusers' TaylorSeer"
    kind: ClassVar[Literal["reused", "predicted"]] = "predicted"

    interval: int = option(5, "steps between computations", ge=1)
    before: int = option(3, "first steps, which are computed", ge=1)
    order: int = option(1, "of the expansion", ge=0)
    sites: str = option(
        "attention",
        "its default, or the branches where this library's taylorseer stands in",
        choices=("attention", "branches"),
    )
    lite: bool = option(False, "extrapolate the output of the head only")
    dtype: str = option("float32", "of the factors", choices=("float32", "bfloat16", "float16"))

    def config(self, stage: Stage, model: nn.Module) -> Any:
        """Its configuration."""
        tails, feeders = _branches(model) if self.sites == "branches" and not self.lite else (None, None)
        return _library().TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.before,
            max_order=self.order,
            taylor_factors_dtype=getattr(torch, self.dtype),
            cache_identifiers=tails,
            skip_predict_identifiers=feeders,
            use_lite_mode=self.lite,
        )


def _branches(model: nn.Module) -> tuple[list[str], list[str]]:
    """Patterns of the modules where this library stands in, and of those that then need not run."""
    from elision.denoise.adapters import adapter_for

    sites = adapter_for(model).sites(model, "branch", "diffusers:taylorseer")
    return [re.escape(site.tail) for site in sites], [re.escape(path) for site in sites for path in site.feeders]


def _library() -> Any:
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise MissingDependency("diffusers is not installed: pip install 'elision[diffusers]'") from error


_ALL: tuple[type[Diffusers], ...] = (PAB, FasterCache, MagCache, FirstBlock, TaylorSeer)
PEERS: Mapping[str, Callable[..., Peer]] = {cls.name.partition(":")[2]: cls for cls in _ALL}
