"""Taps: the only way a target is touched.

A tap wraps one call of one object, never a class or a global. Modules are tapped through the instance attribute
`_compiled_call_impl`, which `nn.Module.__call__` prefers when it is set: outside forward, hooks and offloading, dropped
by `deepcopy`, and gone without a trace after removal. Methods of other objects are tapped by an instance attribute that
a `deepcopy` of its owner turns back into the plain method. Several taps on one call form a chain; they can be removed
in any order, and the last one to go restores the instance `__dict__`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

Inner = Callable[..., Any]
Wrap = Callable[[Inner, tuple[Any, ...], dict[str, Any]], Any]
_MISSING = object()


class _Chain:
    """The callable that stands in an instance `__dict__` and runs the wraps of its taps, outermost first."""

    def __init__(self, owner: Any, attribute: str, base: Inner) -> None:
        self.owner = owner
        self.attribute = attribute
        self.previous = owner.__dict__.get(attribute, _MISSING)
        self.base = base
        self.taps: list[Tap] = []
        self.call: Inner = base

    def rebuild(self) -> None:
        call = self.base
        for tap in reversed(self.taps):
            call = functools.partial(_enter, tap.wrap, call)
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    @property
    def in_place(self) -> bool:
        return self.owner.__dict__.get(self.attribute) is self

    def restore(self) -> None:
        """Leave the owner as it was; where someone wrapped us later, stay behind as a pass-through."""
        if not self.in_place:
            return
        if self.previous is _MISSING:
            del self.owner.__dict__[self.attribute]
        else:
            self.owner.__dict__[self.attribute] = self.previous

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the plain method."""
        return getattr, (self.owner, self.attribute)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        clone = memo.get(id(self.owner))
        method = getattr(type(self.owner), self.attribute)
        return types.MethodType(method, self.owner if clone is None else clone)


def _enter(wrap: Wrap, inner: Inner, /, *args: Any, **kwargs: Any) -> Any:
    return wrap(inner, args, kwargs)


class Tap:
    """One wrap on one call of one object, until `remove()`."""

    def __init__(self, chain: _Chain, wrap: Wrap) -> None:
        self._chain = chain
        self.wrap = wrap
        chain.taps.append(self)
        chain.rebuild()

    @property
    def owner(self) -> Any:
        """The object that is tapped."""
        return self._chain.owner

    @property
    def in_place(self) -> bool:
        """Whether calls still reach this tap: false once something replaced it, for instance `module.compile()`."""
        return self._chain.in_place and self in self._chain.taps

    def swap_base(self, make: Callable[[Inner], Inner]) -> None:
        """Replace what the chain calls in the end, for instance by its compiled form; undone by the last removal."""
        self._chain.base = make(self._chain.base)
        self._chain.rebuild()

    def remove(self) -> None:
        """Take this wrap out; removing twice is harmless."""
        if self not in self._chain.taps:
            return
        self._chain.taps.remove(self)
        self._chain.rebuild()
        if not self._chain.taps:
            self._chain.restore()


def tap_call(module: nn.Module, wrap: Wrap) -> Tap:
    """Wrap every `module(...)`; `wrap(inner, args, kwargs)` decides whether and how `inner` runs."""
    current = module.__dict__.get("_compiled_call_impl")
    if isinstance(current, _Chain) and current.owner is module:
        return Tap(current, wrap)
    chain = _Chain(module, "_compiled_call_impl", module._call_impl if current is None else current)
    tap = Tap(chain, wrap)
    module.__dict__["_compiled_call_impl"] = chain
    return tap


def tap_method(owner: Any, name: str, wrap: Wrap) -> Tap:
    """Wrap the method `name` of the one object `owner`; its signature stays visible to `inspect`."""
    current = owner.__dict__.get(name)
    if isinstance(current, _Chain) and current.owner is owner:
        return Tap(current, wrap)
    method = getattr(owner, name)
    chain = _Chain(owner, name, method)
    functools.update_wrapper(chain, method, updated=())
    tap = Tap(chain, wrap)
    owner.__dict__[name] = chain
    return tap


def is_compiled(module: nn.Module) -> bool:
    """Whether `module(...)` enters a compiled region of its own (taps inside one are never reached)."""
    implementation = module.__dict__.get("_compiled_call_impl")
    if isinstance(implementation, _Chain):
        compiled = implementation.previous not in (_MISSING, None) or implementation.base != module._call_impl
        return bool(compiled)
    return implementation is not None or "_orig_mod" in module._modules
