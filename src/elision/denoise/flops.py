"""Analytic FLOPs of a denoiser, by module, from the shapes of its calls: counted on the meta device."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from elision.denoise.sites import Site

_NO_HOOK = object()
Counts = dict[str, int] | None
# what is known of every denoiser: its modules when it was counted, and FLOPs by the shapes of a call
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[str, dict[str, Counts]]] = weakref.WeakKeyDictionary()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Around(Protocol):
    """What must be around a call on the meta device for it to be the one that ran; equal ones are one."""

    def on(self, skeleton: nn.Module) -> AbstractContextManager[None]:
        """Enter for the call of this copy of the denoiser."""


class FlopBook:
    """Which shapes a denoiser was called with how often, and how often each site stood in; FLOPs on demand.

    Calls with some of the tokens are counted twice: `calls` and `cut` have the shapes of the full call that they stand
    for, `ran` those of what really ran. The denoiser is held weakly: once it is gone, FLOPs are unknown.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._numbers: dict[str, int] = {}
        self._keys: list[str] = []
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._around: list[Around | None] = []
        self._counts: dict[int, Counts] = {}
        self.calls: Counter[int] = Counter()
        self.cut: Counter[int] = Counter()
        self.ran: Counter[int] = Counter()
        self.stood_in: Counter[tuple[int, Site]] = Counter()

    def sign(self, args: tuple[Any, ...], kwargs: dict[str, Any], around: Around | None = None) -> int:
        """The number under which calls of these shapes are counted."""
        shapes = [(leaf.shape, leaf.dtype) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        key = repr((shapes, around))
        if key not in self._numbers:
            self._numbers[key] = len(self._arguments)
            self._arguments.append(to_meta((args, kwargs)))
            self._around.append(around)
            self._keys.append(key)
        return self._numbers[key]

    def clear(self) -> None:
        """Forget how often; shapes stay known."""
        for counter in (self.calls, self.cut, self.ran, self.stood_in):
            counter.clear()

    def totals(self) -> tuple[int, int] | None:
        """FLOPs computed and elided, None where the denoiser cannot run on the meta device."""
        numbers = [*self.calls, *self.ran]
        model, todo = self._model(), [n for n in numbers if n not in self._counts]
        if todo:
            known = {} if model is None else remembered(model)
            missing = [n for n in todo if self._keys[n] not in known]
            skeleton = None if model is None or not missing else meta_skeleton(model)
            for number in missing:
                known[self._keys[number]] = None if skeleton is None else self._count(skeleton, number)
            self._counts.update({n: known[self._keys[n]] for n in todo})
        counts = {n: mine for n in numbers if (mine := self._counts[n]) is not None}
        if len(counts) < len(set(numbers)):
            return None
        whole = sum(counts[n][""] * times for n, times in self.calls.items())
        elided = sum(counts[n][""] * times for n, times in self.cut.items())
        elided -= sum(counts[n][""] * times for n, times in self.ran.items())
        for (number, site), times in self.stood_in.items():
            elided += times * of_modules(counts[number], site.modules)
        return whole - elided, elided

    def _count(self, skeleton: nn.Module, number: int) -> Counts:
        around, (args, kwargs) = self._around[number], self._arguments[number]
        with nullcontext() if around is None else around.on(skeleton):
            return count(skeleton, args, kwargs)


def remembered(model: nn.Module) -> dict[str, Counts]:
    """FLOPs of a denoiser that were counted before, by the shapes of the call; none if its modules have changed."""
    shapes = (
        (name, m, [p.shape for p in m._parameters.values() if p is not None]) for name, m in model.named_modules()
    )
    modules = repr([(name, type(m), mine) for name, m, mine in shapes])
    if model not in _KNOWN or _KNOWN[model][0] != modules:
        _KNOWN[model] = modules, {}
    return _KNOWN[model][1]


def to_meta(tree: Any) -> Any:
    """The same arguments with every tensor replaced by an empty one of its shape and dtype on the meta device."""
    return tree_map(lambda leaf: leaf.detach().to("meta") if isinstance(leaf, Tensor) else leaf, tree)


def meta_skeleton(model: nn.Module) -> nn.Module | None:
    """A copy of the module tree on the meta device, without weights, hooks, taps or replaced forwards."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    for module in model.modules():  # offloading hooks hold whole sets of weights
        for name in ("_hf_hook", "_diffusers_hook", "_old_forward", "forward"):
            if name in module.__dict__:
                memo[id(module.__dict__[name])] = _NO_HOOK
    try:
        skeleton = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError):
        return None  # something in the tree cannot be copied; FLOPs are then unknown
    for module in skeleton.modules():
        for name in ("_hf_hook", "_diffusers_hook", "_old_forward", "forward"):
            module.__dict__.pop(name, None)
        for name in _HOOKS:
            module.__dict__[name].clear()
    return skeleton


def count(skeleton: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Counts:
    """FLOPs of one call by module path ("" is the whole), None if the call cannot run without data."""
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), torch.device("meta"), counter:
            skeleton(*args, **dict(kwargs))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None
    root = type(skeleton).__name__ + "."
    counts = {name: sum(per.values()) for name, per in counter.get_flop_counts().items()}
    by_path = {name.removeprefix(root): flops for name, flops in counts.items() if name.startswith(root)}
    return {"": counter.get_total_flops()} | by_path


def of_modules(counts: Mapping[str, int], paths: Iterable[str]) -> int:
    """FLOPs of the modules at `paths`; modules that compute nothing are absent from the counts."""
    return sum(counts.get(path, 0) for path in paths)
