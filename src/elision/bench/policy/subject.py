"""What policies are compared on: a pipeline that samples action chunks, its tasks, and their environments."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elision.errors import MissingDependency, OptionError, UnknownName, UnsupportedTarget
from elision.zoo.metaworld import Act, Episode, play

ZOO = ("metaworld-policy",)
Array = NDArray[Any]


class World(Protocol):
    """One environment of one task; the seed alone decides an episode."""

    task: str

    def reset(self, seed: int) -> Array:
        """Begin an episode; returns its first state."""

    def step(self, action: Array) -> tuple[Array, bool]:
        """Act; returns the next state and whether the task is solved."""


@dataclass(frozen=True)
class Seen:
    """One request to a policy: the last states of an episode.

    Attributes:
        task, seed, chunk: which, with `chunk` the number of the request in the episode.
        states: [2, D].
    """

    task: str
    seed: int
    chunk: int
    states: Array = field(compare=False, repr=False)


@dataclass
class PolicySubject:
    """A policy with everything a comparison needs to know about it.

    Attributes:
        name: how results call it.
        pipe: a diffusers pipeline; `pipe(states, task, steps, generators)` gives actions [B, n, A] of rows [B, 2, D].
        tasks: what it has learnt.
        world: makes an environment of a task.
        steps: denoising steps that it is usually sampled with.
        limit: control steps after which an episode has failed.
        together: episodes that run at a time.
    """

    name: str
    pipe: Any
    tasks: Sequence[str]
    world: Callable[[str], World]
    steps: int = 100
    limit: int = 160
    together: int = 50
    _worlds: dict[str, list[World]] = field(default_factory=dict, repr=False)

    def worlds(self, task: str, count: int) -> list[World]:
        """`count` environments of a task, kept for later."""
        held = self._worlds.setdefault(task, [])
        held += [self.world(task) for _ in range(count - len(held))]
        return held[:count]

    def act(self, steps: int, task: str, states: Array, seeds: Sequence[int], chunk: int) -> Array:
        """Actions [B, n, A] for rows of one task; the noise of a row depends on its seed and the chunk alone."""
        return self.pipe(states, task, steps, noise_of(seeds, chunk)).numpy()  # type: ignore[no-any-return]

    def episodes(
        self, steps: int, task: str, seeds: Sequence[int], told: Callable[[Seen], None] | None = None
    ) -> list[Episode]:
        """Let the pipeline, with whatever is applied to it, work on a task; `told` hears every request."""

        def act(states: Array, rows: Sequence[int], chunk: int) -> Array:
            if told is not None:
                for state, seed in zip(states, rows, strict=True):
                    told(Seen(task, seed, chunk, state))
            return self.act(steps, task, states, rows, chunk)

        decided: Act = act
        return play(decided, self.worlds(task, min(self.together, len(seeds))), seeds, self.limit)  # type: ignore[arg-type]

    def answer(self, steps: int, requests: Sequence[Seen]) -> Array:
        """Actions [N, n, A] for requests of any tasks in one call."""
        noise = [g for r in requests for g in noise_of([r.seed], r.chunk)]
        states = np.stack([r.states for r in requests])
        return self.pipe(states, [r.task for r in requests], steps, noise).numpy()  # type: ignore[no-any-return]

    @contextmanager
    def sampler(self, name: str) -> Iterator[None]:
        """Sample with "ddpm", the policy's own scheduler, or with "ddim" on the same noise levels."""
        if name == "ddpm":
            yield
            return
        from diffusers import DDIMScheduler

        own = self.pipe.scheduler
        self.pipe.scheduler = DDIMScheduler.from_config(own.config)
        try:
            yield
        finally:
            self.pipe.scheduler = own


def noise_of(seeds: Sequence[int], chunk: int) -> Any:
    """One generator per row."""
    return importlib.import_module("elision.zoo.metaworld_policy").noise_of(seeds, chunk)


def is_policy(model: Any) -> bool:
    """Whether `model` is a policy rather than something that draws; looks at names alone, nothing is loaded."""
    if not isinstance(model, str):
        return isinstance(model, PolicySubject) or type(model).__name__ == "PolicyPipeline"
    index = Path(model) / "model_index.json"
    return model in ZOO or (index.is_file() and json.loads(index.read_text()).get("_class_name") == "PolicyPipeline")


def load_policy(model: Any = "metaworld-policy", tasks: Sequence[str] = ()) -> PolicySubject:
    """A subject from a zoo name, a folder, a loaded pipeline, or a `PolicySubject`.

    Args:
        model: what to compare on.
        tasks: some of its tasks; by default all.
    """
    subject = model if isinstance(model, PolicySubject) else _load(model)
    for task in tasks:
        if task not in subject.tasks:
            raise UnknownName.of("task", task, subject.tasks)
    if len(set(tasks)) < len(tasks):
        raise OptionError(f"tasks={list(tasks)} names a task twice")
    if tasks:
        subject = PolicySubject(
            subject.name, subject.pipe, list(tasks), subject.world, subject.steps, subject.limit, subject.together
        )
    return subject


def _load(model: Any) -> PolicySubject:
    if not is_policy(model):
        raise UnsupportedTarget(f"{model!r} is no policy: pass one of {', '.join(ZOO)}, or a folder of that recipe")
    if importlib.util.find_spec("diffusers") is None:
        raise MissingDependency("diffusers is not installed: pip install 'elision[diffusers]'")
    from elision.zoo.metaworld import TASKS, World, needed

    needed()  # before anything is loaded
    name, pipe = type(model).__name__, model
    if isinstance(model, str):
        name = model if model in ZOO else Path(model).resolve().name
        folder = None if model in ZOO else model
        pipe = importlib.import_module("elision.zoo").load("metaworld-policy", folder)
    pipe.set_progress_bar_config(disable=True)
    return PolicySubject(name, pipe, TASKS, World)
