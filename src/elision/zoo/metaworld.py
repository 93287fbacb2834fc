"""Meta-World tasks for the policies of the zoo: environments, scripted demonstrations, episodes that run in step.

Needs the packages `metaworld` and `mujoco` (extra `policy`); nothing is rendered, so no display is needed.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elision.errors import ElisionError, MissingDependency, OptionError

TASKS = ("button-press-topdown-v3", "door-open-v3", "push-v3", "pick-place-v3")
STATE, ACTION = 14, 4  # hand 3, gripper 1, object 3 + 4, goal 3; hand motion 3, grip 1
LIMIT = 160  # steps of an episode; the scripted experts need 45 to 115
Array = NDArray[Any]


def needed() -> None:
    """Refuse where Meta-World or MuJoCo is missing."""
    missing = [name for name in ("metaworld", "mujoco") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"{' and '.join(missing)} not installed, and the tasks of metaworld-policy run there: "
            "pip install 'elision[policy]'"
        )


def _packages() -> tuple[Any, Any]:
    needed()
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    from metaworld.policies import ENV_POLICY_MAP

    return ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE, ENV_POLICY_MAP


def task_number(task: str) -> int:
    """Place of a task among `TASKS`."""
    if task not in TASKS:
        raise OptionError(f"{task!r} is no task of this policy; tasks: {', '.join(TASKS)}")
    return TASKS.index(task)


def state_of(observation: Array) -> Array:
    """The state [14] that a policy sees, out of Meta-World's observation [39]: no earlier frame, no second object."""
    return np.concatenate([observation[:11], observation[36:39]]).astype(np.float32)


class World:
    """One environment of one task. `reset(seed)` alone decides the whole episode."""

    def __init__(self, task: str) -> None:
        environments, experts = _packages()
        task_number(task)
        self.task = task
        self.env = environments[f"{task}-goal-observable"](seed=0)
        self.env._freeze_rand_vec = False  # a new place of object and goal at every reset,
        self.env.seeded_rand_vec = True  # from the environment's own generator
        self._expert = experts[task]()
        self.observation: Array = np.zeros(39)

    def reset(self, seed: int) -> Array:
        """Begin the episode of a seed; returns its first state [14]."""
        self.env.seed(seed)
        self.observation, _ = self.env.reset()
        return state_of(self.observation)

    def step(self, action: Array) -> tuple[Array, bool]:
        """Act for one control step; returns the next state [14] and whether the task is solved now."""
        self.observation, _, _, _, info = self.env.step(np.clip(action, -1, 1).astype(np.float32))
        return state_of(self.observation), bool(info["success"] > 0)

    def expert(self) -> Array:
        """What the scripted expert does at the present observation, [4] in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that its gain saturates, which is meant
            wanted: Array = np.asarray(self._expert.get_action(self.observation), np.float32)
            return wanted.clip(-1, 1)


@dataclass(frozen=True)
class Demonstration:
    """One episode of an expert.

    Attributes:
        task: its number.
        states: [T, 14].
        actions: [T, 4], what the expert wanted at each state (the executed action may have been disturbed).
    """

    task: int
    states: Array
    actions: Array


def demonstrate(world: World, seed: int, rng: np.random.Generator, tail: int = 12) -> Demonstration | None:
    """One episode of the expert, disturbed by noise of a random strength; None where the expert fails.

    The noise moves the hand off the expert's path and the recorded actions lead back, so that a policy learns to
    recover. It is correlated over a few steps, or it would average out.
    """
    state, states, actions = world.reset(seed), [], []
    strength, drift = float(rng.choice([0.0, 0.3, 0.6, 1.0])), np.zeros(3)
    left = tail
    for _ in range(LIMIT + tail):
        wanted = world.expert()
        states.append(state)
        actions.append(wanted)
        drift = 0.8 * drift + 0.6 * strength * rng.standard_normal(3) * (rng.random() < 0.5)
        state, solved = world.step(wanted + np.append(drift, 0.0))
        if solved or left < tail:
            left -= 1
            if left == 0:
                return Demonstration(TASKS.index(world.task), np.stack(states), np.stack(actions))
    return None


def demonstrations(count: int, tasks: Sequence[str] = TASKS, seed: int = 0) -> list[Demonstration]:
    """`count` successful demonstrations of each task; episodes of a seed of their own, far from those of tests."""
    found = []
    for task in tasks:
        world, rng, episode, kept = World(task), np.random.default_rng([seed, task_number(task)]), 0, 0
        while kept < count:
            if episode > 3 * count + 20:
                raise ElisionError(f"the expert of {task} solved {kept} of {episode} episodes: too few to learn from")
            shown = demonstrate(world, 1_000_000 + 100_000 * seed + episode, rng)
            episode += 1
            if shown is not None:
                found.append(shown)
                kept += 1
    return found


@dataclass(frozen=True)
class Episode:
    """One episode of a policy.

    Attributes:
        task, seed: which.
        solved: whether the task was solved at some step.
        steps: control steps until then, or all.
        chunks: how often the policy was asked.
    """

    task: str
    seed: int
    solved: bool
    steps: int
    chunks: int


# states [B, 2, 14], seeds of the B episodes, number of the chunk -> actions [B, n, 4]
Act = Callable[[Array, Sequence[int], int], Array]


def play(act: Act, worlds: Sequence[World], seeds: Sequence[int], limit: int = LIMIT) -> list[Episode]:
    """Episodes of one task, as many at a time as there are worlds; those that run together share the policy's calls.

    Args:
        act: the policy.
        worlds: environments of one task.
        seeds: of the episodes.
        limit: steps after which an episode has failed.
    """
    played: list[Episode] = []
    for start in range(0, len(seeds), len(worlds)):
        played += _together(act, worlds, seeds[start : start + len(worlds)], limit)
    return played


def _together(act: Act, worlds: Sequence[World], seeds: Sequence[int], limit: int) -> list[Episode]:
    """One episode per seed, in step; whoever is done leaves."""
    first = [world.reset(seed) for world, seed in zip(worlds, seeds, strict=False)]
    seen = [np.stack([state, state]) for state in first]
    done: dict[int, Episode] = {}
    chunk = steps = 0
    while steps < limit and len(done) < len(seeds):
        alive = [i for i in range(len(seeds)) if i not in done]
        actions = act(np.stack([seen[i] for i in alive]), [seeds[i] for i in alive], chunk)
        chunk += 1
        for i, mine in zip(alive, actions, strict=True):
            for n, action in enumerate(mine[: limit - steps], 1):
                state, solved = worlds[i].step(action)
                seen[i] = np.stack([seen[i][1], state])
                if solved:
                    done[i] = Episode(worlds[i].task, seeds[i], True, steps + n, chunk)
                    break
        steps += actions.shape[1]
    lost = [Episode(w.task, s, False, limit, chunk) for w, s in zip(worlds, seeds, strict=False)]
    return [done.get(i, lost[i]) for i in range(len(seeds))]
