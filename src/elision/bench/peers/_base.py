"""What a cache of another library is to the harness: options, and a way on and off."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from elision.errors import UnsupportedTarget
from elision.method import Method
from elision.session import Applied

Kept = Callable[[], Iterable[Tensor]]


@dataclass
class Stage:
    """Where a cache is put on, and what it may ask.

    Attributes:
        denoisers: of the pipeline.
        steps: of the run.
        calls: of each denoiser in a step: 2 where the guidance branches are called in turn.
        batched: whether one call holds both guidance branches.
        image: whether the prediction has the axes of an image or video, not those of tokens.
        time: the current timestep, in the scheduler's units.
        branch: which call of the step this is, counted from 0.
        before_call: called before every call of a denoiser; a cache may add to it.
        sample: an uncached run from noise that no comparison uses, for calibration.
        memory: what caches learned about this pipeline, for later runs.
        notes: a cache adds what the reader of its row should know.
    """

    denoisers: Sequence[nn.Module]
    steps: int
    calls: int
    batched: bool
    image: bool
    time: Callable[[], float]
    branch: Callable[[], int]
    sample: Callable[[], None]
    memory: dict[Any, Any]
    before_call: list[Callable[[], None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Peer(Method):
    """One cache of another library; its fields are those options of its that matter.

    Attributes:
        kind: what its stand-ins are.
    """

    family: ClassVar[str] = "denoise"
    control: ClassVar[bool] = True
    kind: ClassVar[Literal["reused", "predicted"]] = "reused"

    def prepare(self, stage: Stage) -> None:
        """Learn what the cache needs from uncached runs, before anything is counted."""

    @abstractmethod
    def on(self, stage: Stage) -> AbstractContextManager[Kept]:
        """Put the cache on for the length of the context; gives a function that lists the tensors it keeps."""

    @classmethod
    def attach(cls, target: Any, methods: Sequence[Method], **settings: Any) -> Applied:
        """Refused: it is no method of this library."""
        del target, methods, settings
        raise UnsupportedTarget(f"{cls.name} belongs to another library: only comparisons run it")


def tensors_in(thing: Any, depth: int = 6) -> Iterable[Tensor]:
    """Every tensor that can be reached from a state object through containers and attributes."""
    if isinstance(thing, Tensor):
        yield thing
    elif depth and not isinstance(thing, (str, bytes, int, float, nn.Module, type)):
        if isinstance(thing, dict):
            inner: Iterable[Any] = thing.values()
        elif isinstance(thing, (list, tuple, set)):
            inner = thing
        else:
            inner = getattr(thing, "__dict__", {}).values()
        for entry in inner:
            yield from tensors_in(entry, depth - 1)
