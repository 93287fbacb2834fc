"""`metaworld-policy`: tasks in the place of prompts, episodes in the place of seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elision.bench.subject import Subject

MODEL = "metaworld-policy"
PIPELINE = "elision.zoo.metaworld_policy:PolicyPipeline"


def subject(name: str, pipe: Any, prompts: Sequence[Any] | None = None) -> Subject:
    """The policy with its tasks, or with these, and the worlds that they are done in."""
    from elision.bench.policy.subject import PolicySubject
    from elision.zoo.metaworld import TASKS, World, needed

    needed()
    policy = PolicySubject(name, pipe, list(prompts or TASKS), World, known=TASKS)
    pipe.set_progress_bar_config(disable=True)
    return policy.subject()
