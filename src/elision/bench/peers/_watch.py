"""Counts from below what a denoiser computes while a cache of another library is on it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from elision.denoise.flops import count, meta_skeleton, to_meta
from elision.errors import UnsupportedTarget
from elision.hooks.diffusers import Form, inspect_target
from elision.hooks.taps import Inner, Tap, tap_call, tap_method

Counts = Mapping[str, int]
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[str, Counts]] = weakref.WeakKeyDictionary()


@dataclass
class CallRecord:
    """One call of a denoiser: at which step, with which shapes, and over how many rows each module ran."""

    n: int
    place: int
    shapes: str
    rows: Counter[str] = field(default_factory=Counter)


class Watch:
    """Taps on the denoisers and the scheduler of one pipeline, from `start` to `stop`.

    The taps on modules sit on their `forward`, so that hooks which other libraries add later come to lie outside of
    them: they count what really ran. The taps on denoisers lie outside of everything.
    """

    def __init__(self, pipe: Any) -> None:
        target = inspect_target(pipe)
        self.denoisers, self.scheduler = target.denoisers, target.scheduler
        if not callable(getattr(self.scheduler, "step", None)):
            raise UnsupportedTarget(
                f"{target.name} has no scheduler that counts steps: caches cannot be compared on it"
            )
        self.calls: list[CallRecord] = []
        self.before: list[Callable[[], None]] = []
        self.after: list[Callable[[], None]] = []
        self.n = self.branch = 0
        self.rows = 0
        self.image = False
        self._arguments: dict[tuple[int, str], Any] = {}
        self._tapped: dict[int, set[str]] = {}
        self._now: CallRecord | None = None
        self._taps: list[Tap] = []

    def start(self) -> None:
        """Install the taps; modules are tapped where an earlier run showed that they compute."""
        self.n = self.branch = 0
        self._taps.append(tap_method(self.scheduler, "step", self._step))
        for place, model in enumerate(self.denoisers):
            self._taps.append(tap_call(model, self._call(place)))
            self._tapped[place] = _computing(model)
            for path in self._tapped[place]:
                self._taps.append(tap_method(model.get_submodule(path), "forward", self._module(path)))

    def stop(self) -> None:
        """Remove the taps and count the operations of shapes that are new."""
        while self._taps:
            self._taps.pop().remove()
        for (place, shapes), arguments in self._arguments.items():
            known = _KNOWN.setdefault(self.denoisers[place], {})
            if shapes not in known:
                skeleton = meta_skeleton(self.denoisers[place])
                found = None if skeleton is None else count(skeleton, *arguments)
                if found is None:
                    name = type(self.denoisers[place]).__name__
                    raise UnsupportedTarget(
                        f"the operations of {name} cannot be counted, so its caches cannot be either"
                    )
                known[shapes] = found

    def time(self) -> float:
        """The current timestep, in the scheduler's units."""
        times = self.scheduler.timesteps
        return float(times[min(self.n, len(times) - 1)])

    def cost(self, call: CallRecord) -> tuple[int, int]:
        """Operations of a call: those that ran, and those of an uncached call.

        The first call of each denoiser with the same shapes is taken for uncached: nothing can stand in for it.
        """
        counts = _KNOWN[self.denoisers[call.place]][call.shapes]
        first = next(c for c in self.calls if (c.place, c.shapes) == (call.place, call.shapes))
        elided = 0.0
        for path, flops in own_counts(counts).items():
            if path in self._tapped[call.place] and first.rows[path]:
                elided += flops * (1 - call.rows[path] / first.rows[path])
        return round(counts[""] - elided), counts[""]

    def _step(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = inner(*args, **kwargs)
        self.n += 1
        self.branch = 0
        return out

    def _call(self, place: int) -> Callable[[Inner, tuple[Any, ...], dict[str, Any]], Any]:
        def wrap(inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            shapes = repr([(x.shape, x.dtype) for x in tensors])
            if (place, shapes) not in self._arguments:
                self._arguments[place, shapes] = to_meta((args, kwargs))
            self.rows = max(self.rows, len(tensors[0]))
            self._now = CallRecord(self.n, place, shapes)
            self.calls.append(self._now)
            for told in self.before:
                told()
            out = inner(*args, **kwargs)
            for told in self.after:
                told()
            self.image = Form.split(out)[0].ndim > 3
            self._now = None
            self.branch += 1
            return out

        return wrap

    def _module(self, path: str) -> Callable[[Inner, tuple[Any, ...], dict[str, Any]], Any]:
        def wrap(inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._now is not None:
                self._now.rows[path] += _rows(args, kwargs)
            return inner(*args, **kwargs)

        return wrap


def _rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    first = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
    return len(first) if isinstance(first, Tensor) and first.ndim else 1


def own_counts(counts: Counts) -> dict[str, int]:
    """Operations of each module without those of the modules inside it; the whole is left out."""
    own = {path: flops for path, flops in counts.items() if path}
    for path, flops in counts.items():
        parent = path.rpartition(".")[0]
        while parent and parent not in counts:
            parent = parent.rpartition(".")[0]
        if parent:
            own[parent] -= flops
    return {path: flops for path, flops in own.items() if flops > 0}


def _computing(model: nn.Module) -> set[str]:
    """Paths of the modules that are known to compute something themselves."""
    return {path for counts in _KNOWN.get(model, {}).values() for path in own_counts(counts)}
