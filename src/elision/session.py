"""What `apply` returns: a handle that reports, resets and undoes, and the numbers it reports."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from elision.errors import Closed, Conflict
from elision.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from elision.hooks.taps import Tap

_held: weakref.WeakKeyDictionary[Any, weakref.ref[Applied]] = weakref.WeakKeyDictionary()


@dataclass
class Seconds:
    """Host seconds inside the tapped target, by what they were spent on."""

    deciding: float = 0.0
    standing_in: float = 0.0
    computing: float = 0.0

    @property
    def total(self) -> float:
        """All three together."""
        return self.deciding + self.standing_in + self.computing


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes really held by `tensors`: whole storages (a view keeps all of its storage alive), each counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


@dataclass
class Report:
    """What a method did since `apply` or `reset()`; families extend it.

    Attributes:
        methods: the methods with their options, as text.
        target: class name of what they were applied to.
        bytes_held: bytes of the tensors that the session keeps alive now.
        bytes_peak: the most it kept alive at any time.
        seconds: host seconds by account.
        notes: everything a careful user should know, in sentences.
    """

    methods: list[str]
    target: str
    bytes_held: int = 0
    bytes_peak: int = 0
    seconds: Seconds = field(default_factory=Seconds)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, for JSON."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return plain


def _plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, sequences as lists (`asdict` breaks counters: it counts their items)."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


class Applied(ABC):
    """Methods at work on a target, until `remove()`; usable as a context manager.

    Nothing is patched on a class or a global. `remove()` puts the target back exactly, in any order with respect to
    others, and is safe to call twice; the report stays readable afterwards, everything else raises `Closed`.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = tuple(methods)
        self._taps: list[Tap] = []
        self._owned: list[Any] = []
        self._closed = False
        self._broke_off = False

    @abstractmethod
    def report(self) -> Report:
        """What happened so far."""

    @abstractmethod
    def _clear(self) -> None:
        """Forget the state of the current run and all counters."""

    @abstractmethod
    def _leave(self) -> None:
        """Look at the taps a last time, before `remove` takes them off; must not raise."""

    @abstractmethod
    def _finish(self) -> None:
        """Close the books of the current run and free its tensors; called once, by `remove`."""

    def reset(self) -> None:
        """Forget everything: the state of the current run and the report so far."""
        self._open("reset()")
        self._clear()

    def remove(self) -> None:
        """Undo `apply` exactly. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._leave()
        for tap in reversed(self._taps):
            tap.remove()
        for owner in self._owned:
            _held.pop(owner, None)
        self._finish()
        self._taps.clear()  # a report that is kept must not keep the target alive
        self._owned.clear()

    def _own(self, owner: Any) -> None:
        """Claim `owner` for this session alone."""
        other = _held.get(owner)
        holder = None if other is None else other()
        if holder is not None:
            names = ", ".join(m.name for m in holder.methods)
            raise Conflict(
                f"{type(owner).__name__} already has {names} applied: call remove() on that one first, "
                "or apply both together as a list of option objects"
            )
        _held[owner] = weakref.ref(self)
        self._owned.append(owner)

    def _open(self, what: str) -> None:
        if self._closed:
            raise Closed(f"{what} after remove(): call elision.apply again (the report stays readable)")

    def __enter__(self) -> Self:
        self._open("entering")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._broke_off = error is not None
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._closed else "applied"
        return f"<{', '.join(m.name for m in self.methods)} {state} at {hex(id(self))}>"
