"""What policies are compared on: a pipeline that samples action chunks, its tasks, and their environments."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elision.bench.subject import Subject, load_subject
from elision.errors import OptionError, UnknownName, UnsupportedTarget
from elision.zoo.metaworld import Act, Episode, play

Array = NDArray[Any]
HELD_OUT = 900_000  # seeds from here on are of episodes that methods are fitted on


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
        tasks: what it is tried on.
        world: makes an environment of a task.
        steps: denoising steps that it is usually sampled with.
        limit: control steps after which an episode has failed.
        together: episodes that run at a time.
        known: what it has learnt; `tasks` must be among them.
    """

    name: str
    pipe: Any
    tasks: Sequence[str]
    world: Callable[[str], World]
    steps: int = 100
    limit: int = 160
    together: int = 50
    known: Sequence[str] = ()
    _worlds: dict[str, list[World]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Tasks are known and named once."""
        for task in self.tasks:
            if self.known and task not in self.known:
                raise UnknownName.of("task", task, self.known)
        if len(set(self.tasks)) < len(self.tasks):
            raise OptionError(f"tasks={list(self.tasks)} names a task twice")

    def subject(self) -> Subject:
        """As `elision.bench.compare_denoise` and `elision.bench.run_claims` take it."""
        return Subject(self.name, self, list(self.tasks), self.steps, kind="policy", grids=(self.steps,))

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

    def observations(self, number: int = 0) -> list[Seen]:
        """The first observation of one episode of every task, for methods to be fitted on; no experiment has them."""
        seed = HELD_OUT + number
        first = [(task, self.worlds(task, 1)[0].reset(seed)) for task in self.tasks]
        return [Seen(task, seed, 0, np.stack([state, state])) for task, state in first]

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


def load_policy(model: Any = "metaworld-policy", tasks: Sequence[str] = ()) -> PolicySubject:
    """A policy from a `PolicySubject`, a subject that holds one, or whatever `load_subject` loads one from.

    Args:
        model: what to compare on.
        tasks: some of its tasks; by default those of the subject.
    """
    held = model if isinstance(model, PolicySubject) else load_subject(model).pipe
    if not isinstance(held, PolicySubject):
        raise UnsupportedTarget(f"{model!r} is no policy: pass 'metaworld-policy', or a folder of that recipe")
    return replace(held, tasks=list(tasks or held.tasks), known=held.known or tuple(held.tasks))
