"""DBCache of cache-dit 1.5.3, with its calibrators, through `enable_cache` and `disable_cache` on the denoiser."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from elision.bench.peers._base import Kept, Peer, Stage, tensors_in
from elision.errors import MissingDependency, OptionError, UnsupportedTarget
from elision.hooks.diffusers import unwrap
from elision.method import option

VERSION = "1.5.3"
_STATE = ("buffers", "calibrator", "encoder_calibrator", "cfg_calibrator", "cfg_encoder_calibrator")


@dataclass(frozen=True)
class DBCache(Peer):
    """Dual block cache: the first blocks are a probe, the last ones correct, and between them residuals stand in.

    With `steps` the decision is not the probe's: exactly these steps are computed, as with a static mask of cache-dit.
    """

    name: ClassVar[str] = "cache_dit:dbcache"
    description: ClassVar[str] = "cache-dit's DBCache, with its calibrators"

    first: int = option(1, "first blocks, which always run and decide (Fn)", ge=1)
    last: int = option(0, "last blocks, which always run (Bn)", ge=0)
    threshold: float = option(0.08, "relative change of the probe's residual", ge=0)
    warmup: int = option(4, "first steps, which are computed", ge=0)
    max_cached: int = option(-1, "most steps that are skipped; -1 is no limit", ge=-1)
    max_continuous: int = option(-1, "most steps in a row that are skipped; -1 is no limit", ge=-1)
    calibrator: str = option("none", "what extrapolates the residuals", choices=("none", "taylorseer", "foca"))
    order: int = option(1, "of the calibrator taylorseer", ge=1)
    steps: tuple[int, ...] | None = option(None, "steps that are computed, counted from 0, instead of a threshold")

    def __post_init__(self) -> None:
        """The first step has nothing to stand in for it."""
        super().__post_init__()
        if self.steps is not None and 0 not in self.steps:
            raise OptionError(f"{self.name}: step 0 must be among steps={self.steps}, nothing can stand in for it")

    @contextmanager
    def on(self, stage: Stage) -> Iterator[Kept]:
        """Enable it on every denoiser."""
        library = _library()
        models: list[Any] = [unwrap(model) for model in stage.denoisers]
        for model in models:
            if not library.BlockAdapterRegister.is_supported(model):
                raise UnsupportedTarget(f"{self.name}: cache-dit does not support {type(model).__name__}")
        marked = [kind for kind in _classes(models) if "_is_cached" not in vars(kind)]
        try:
            for model in models:
                with contextlib.redirect_stdout(io.StringIO()):
                    library.enable_cache(
                        model, cache_config=self._config(library, stage), calibrator_config=self._calibrator(library)
                    )
            managers = [model._context_manager for model in models]
            yield lambda: _kept(managers)
        finally:
            for model in models:
                with contextlib.redirect_stdout(io.StringIO()):
                    library.disable_cache(model)
            for kind in marked:  # it also marks classes, and leaves the mark there
                if "_is_cached" in vars(kind):
                    delattr(kind, "_is_cached")

    def _config(self, library: Any, stage: Stage) -> Any:
        computed = self.steps
        mask = None if computed is None else [int(n in computed) for n in range(stage.steps)]
        return library.DBCacheConfig(
            Fn_compute_blocks=self.first,
            Bn_compute_blocks=self.last,
            residual_diff_threshold=self.threshold,
            max_warmup_steps=self.warmup if mask is None else 1,
            max_cached_steps=self.max_cached,
            max_continuous_cached_steps=self.max_continuous,
            enable_separate_cfg=stage.calls == 2,
            num_inference_steps=stage.steps,
            steps_computation_mask=mask,
            steps_computation_policy="dynamic" if mask is None else "static",
        )

    def _calibrator(self, library: Any) -> Any:
        if self.calibrator == "none":
            return None
        if self.calibrator == "foca":
            return library.FoCaCalibratorConfig()
        return library.TaylorSeerCalibratorConfig(taylorseer_order=self.order)


def _classes(models: list[Any]) -> list[type]:
    """Classes that cache-dit marks: those of the denoisers, and its own stand-in for a pipeline."""
    fake = importlib.import_module("cache_dit.caching.block_adapters").FakeDiffusionPipeline
    return [fake, *{type(model) for model in models}]


def _kept(managers: list[Any]) -> Iterable[Tensor]:
    for manager in managers:
        for context in manager._cached_context_manager.values():
            for name in _STATE:
                yield from tensors_in(getattr(context, name, None))


def _library() -> Any:
    try:
        found = importlib.metadata.version("cache-dit")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependency(f"cache-dit is not installed: pip install cache-dit=={VERSION}") from error
    if found != VERSION:
        raise MissingDependency(f"cache-dit {found} is installed, but these rows are written for {VERSION}")
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module("cache_dit")


PEERS: Mapping[str, Callable[..., Peer]] = {"dbcache": DBCache}
