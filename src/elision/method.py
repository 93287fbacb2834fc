"""What a method is: a frozen dataclass of options that knows its paper, and the registry that knows them all."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from elision.errors import OptionError, UnknownName

if TYPE_CHECKING:
    from elision.profile import Profile
    from elision.session import Applied

FAMILIES = ("denoise", "kv", "dllm")


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    venue: str
    url: str


def option(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A field of an options dataclass: its default, what it means, and the range it must lie in."""
    return field(default=default, metadata={"doc": doc, "ge": ge, "gt": gt, "le": le, "choices": choices})


@dataclass(frozen=True)
class Method(ABC):
    """Options of one published method; engines ask it what to do.

    Subclasses are frozen dataclasses whose fields are made by `option`, so that ranges are checked and documented in
    one place. `description` is one line for tables.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    description: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    needs_profile: ClassVar[bool] = False
    control: ClassVar[bool] = False  # a baseline or negative control rather than a proposal

    def __post_init__(self) -> None:
        """Check every option against its range; subclasses extend this with rules between options."""
        for f in dataclasses.fields(self):
            _check(self, f)

    @property
    def wants_profile(self) -> bool:
        """Whether a profile is needed with these options; some methods can be told by hand what a profile says."""
        return self.needs_profile

    @classmethod
    @abstractmethod
    def attach(cls, target: Any, methods: Sequence[Method], **settings: Any) -> Applied:
        """Install `methods`, all of this family, on `target`."""

    def fit(self, target: Any, calls: Sequence[Any], **settings: Any) -> Profile:
        """Run the offline part of the method; most have none. `settings` are those of `elision.fit`, where given."""
        raise OptionError(f"{self.name} has no offline part: apply it directly, without a profile")

    @classmethod
    def options(cls) -> Mapping[str, dataclasses.Field[Any]]:
        """The option fields by name."""
        return {f.name: f for f in dataclasses.fields(cls)}

    @classmethod
    def targets(cls) -> tuple[str, ...]:
        """What the method can be applied to, in words or class names."""
        return ()


def _check(method: Method, f: dataclasses.Field[Any]) -> None:
    value, limits = getattr(method, f.name), f.metadata
    choices = limits.get("choices")
    if choices is not None:
        if value not in choices:
            raise OptionError(f"{method.name}: {f.name}={value!r} is not one of {', '.join(map(repr, choices))}")
        return
    if f.type == "bool" and not isinstance(value, bool):
        raise OptionError(f"{method.name}: {f.name}={value!r} is neither True nor False")
    bounds = {key: limits.get(key) for key in ("ge", "gt", "le")}
    if all(bound is None for bound in bounds.values()) or (value is None and "None" in str(f.type)):
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise OptionError(f"{method.name}: {f.name}={value!r} is not a number")
    if f.type in ("int", "int | None") and not isinstance(value, Integral):
        raise OptionError(f"{method.name}: {f.name}={value!r} is not a whole number")
    low_ok = (bounds["ge"] is None or value >= bounds["ge"]) and (bounds["gt"] is None or value > bounds["gt"])
    if not (low_ok and (bounds["le"] is None or value <= bounds["le"])):
        raise OptionError(f"{method.name}: {f.name}={value!r} is out of range; it must be {describe_range(f)}")


def describe_range(f: dataclasses.Field[Any]) -> str:
    """The range of an option in words, empty if it has none."""
    words = {"ge": "at least", "gt": "above", "le": "at most"}
    if f.type == "bool" and f.metadata.get("choices") is None:
        return "True or False"
    if f.metadata.get("choices") is not None:
        return "one of " + ", ".join(map(repr, f.metadata["choices"]))
    return " and ".join(f"{words[k]} {f.metadata[k]:g}" for k in words if f.metadata.get(k) is not None)


@dataclass(frozen=True)
class MethodInfo:
    """A row of `elision.methods()`."""

    name: str
    family: str
    description: str
    paper: Paper | None
    needs_profile: bool
    control: bool
    targets: tuple[str, ...]


_registry: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator that enrols a method under its name; everything else follows from the registry."""
    taken = _registry.get(cls.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise OptionError(f"method name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}")
    _registry[cls.name] = cls
    return cls


@functools.cache
def _load() -> None:
    for family in FAMILIES:
        package = importlib.import_module(f"elision.{family}.methods")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in entry_points(group="elision.methods"):
        entry.load()


def registry() -> Mapping[str, type[Method]]:
    """Every method by name; imports the families on the first call."""
    _load()
    return dict(sorted(_registry.items()))


def find(name: str) -> type[Method]:
    """The method class called `name` (dashes and underscores are the same)."""
    known = registry()
    key = str(name).replace("-", "_")
    if key not in known:
        raise UnknownName.of("method", name, known)
    return known[key]


def create(name: str, **options: Any) -> Method:
    """The method called `name` with its options; unknown ones raise with the nearest name."""
    cls = find(name)
    for key in options:
        if key not in cls.options():
            raise UnknownName.of(f"option of {cls.name}", key, cls.options())
    return cls(**options)


def info(cls: type[Method]) -> MethodInfo:
    """The table row of a method class."""
    return MethodInfo(
        cls.name, cls.family, cls.description, cls.paper, cls.needs_profile, cls.control, tuple(cls.targets())
    )
