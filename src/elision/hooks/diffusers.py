"""Diffusers' objects: what an `apply` target contains, and taps on its scheduler and cache contexts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from elision.errors import UnsupportedTarget
from elision.hooks.taps import Inner, Tap, tap_method

DENOISERS = ("transformer", "transformer_2", "unet", "prior")


@dataclass(frozen=True)
class Target:
    """What an `apply` target contains.

    Attributes:
        name: class name of what the user passed.
        denoisers: the modules that are called once or more per step.
        pipeline: the pipeline they came from, None for a bare denoiser.
    """

    name: str
    denoisers: tuple[nn.Module, ...]
    pipeline: Any = None

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler as it is now (users swap it)."""
        return getattr(self.pipeline, "scheduler", None)


def inspect_target(target: Any) -> Target:
    """Find the denoisers of a pipeline, or take a module as the denoiser itself."""
    if isinstance(target, nn.Module):
        return Target(type(unwrap(target)).__name__, (target,))
    found = [getattr(target, name, None) for name in DENOISERS]
    modules = tuple(m for m in found if isinstance(m, nn.Module))
    if not modules:
        raise UnsupportedTarget(
            f"{type(target).__name__} is neither a denoiser (torch.nn.Module) nor a pipeline with one of "
            f"{', '.join(DENOISERS)}: pass the denoiser itself"
        )
    return Target(type(target).__name__, modules, target)


def is_stock(pipeline: Any) -> bool:
    """Whether the pipeline's class is one of diffusers itself, whose calls of the denoiser are known."""
    return type(pipeline).__module__.startswith("diffusers.")


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, or the module itself."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def tap_scheduler(scheduler: Any, begin: Callable[[], None], advance: Callable[[], None]) -> list[Tap]:
    """Call `begin` after every `set_timesteps` and `advance` after every `step` of this one scheduler."""

    def after(told: Callable[[], None]) -> Callable[[Inner, tuple[Any, ...], dict[str, Any]], Any]:
        def wrap(inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = inner(*args, **kwargs)
            told()
            return out

        return wrap

    return [tap_method(scheduler, "set_timesteps", after(begin)), tap_method(scheduler, "step", after(advance))]


def tappable(scheduler: Any) -> bool:
    """Whether the object has the two methods that tell the steps of a run."""
    return callable(getattr(scheduler, "set_timesteps", None)) and callable(getattr(scheduler, "step", None))


def is_set_up(scheduler: Any) -> bool:
    """Whether `set_timesteps` was called and, as far as the scheduler can tell, no step was taken since."""
    if not hasattr(scheduler, "step_index"):
        return False  # it does not tell whether its run is over
    return scheduler.step_index is None and getattr(scheduler, "num_inference_steps", None) is not None


def tap_cache_context(model: nn.Module, enter: Callable[[str, dict[str, Any]], Callable[[], None]]) -> list[Tap]:
    """Call `enter(name, metadata)` when the model's `cache_context` is entered, and what it returned at the exit."""
    if not callable(getattr(model, "cache_context", None)):
        return []

    def wrap(inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(inner).bind(*args, **kwargs).arguments
        extra = bound.get("kwargs", {})

        @contextmanager
        def both() -> Iterator[None]:
            leave = enter(bound["name"], dict(extra))
            try:
                with inner(*args, **kwargs):
                    yield
            finally:
                leave()

        return both()

    return [tap_method(model, "cache_context", wrap)]


@dataclass(frozen=True)
class Form:
    """The shape of what a denoiser returns, without its prediction: a tensor, a tuple, or an output object."""

    kind: type
    key: str | None = None
    rest: tuple[Any, ...] = ()

    @classmethod
    def split(cls, output: Any) -> tuple[Any, Form]:
        """The prediction inside `output`, and the form that is left."""
        if isinstance(output, (tuple, list)):
            return output[0], cls(type(output), None, tuple(output[1:]))
        if isinstance(output, dict):  # diffusers' output classes are ordered dicts
            key, *others = output
            return output[key], cls(type(output), key, tuple((name, output[name]) for name in others))
        return output, cls(type(output))

    @property
    def others(self) -> tuple[Any, ...]:
        """What was returned beside the prediction, in order."""
        return self.rest if self.key is None else tuple(value for _, value in self.rest)

    def carrying(self, others: Sequence[Any]) -> Form:
        """The form with other values in the first places beside the prediction."""
        if self.key is None:
            return replace(self, rest=(*others, *self.rest[len(others) :]))
        new = zip(self.rest, others, strict=False)
        return replace(self, rest=(*((name, value) for (name, _), value in new), *self.rest[len(others) :]))

    def join(self, value: Any) -> Any:
        """An output of this form that carries `value` as its prediction."""
        if issubclass(self.kind, (tuple, list)):
            return self.kind((value, *self.rest))
        if self.key is not None:
            return self.kind(**{self.key: value}, **dict(self.rest))
        return value
