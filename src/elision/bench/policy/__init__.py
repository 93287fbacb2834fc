"""Comparisons and claims on robot policies: episodes in a simulator instead of images.

`elision.bench.compare_denoise` and `elision.bench.run_claims` come here with subjects of the kind "policy", whose
`pipe` is a `PolicySubject`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from elision.errors import OptionError

if TYPE_CHECKING:
    from elision.bench.policy.laboratory import PolicyLab
    from elision.bench.policy.summary import PolicyComparison
    from elision.bench.spec import Spec
    from elision.bench.subject import Subject

AUTO = ("bac", "bac:num_caches=5", "bac:union_blocks=0", "taylorseer:interval=4")


def compare(
    subject: Subject,
    specs: Sequence[Spec],
    *,
    steps: int | Sequence[int] | None,
    seeds: Sequence[int],
    controls: bool,
    progress: Callable[[int, int, str], None],
) -> PolicyComparison:
    """Compare methods on a policy, as `compare_denoise` is asked to."""
    from elision.bench.policy.comparing import compare_policy

    if subject.guidance is not None or subject.arguments:
        raise OptionError(f"{subject.name} is a policy: guidance and arguments of an image pipeline have no meaning")
    grid = [steps] if steps is None or isinstance(steps, int) else list(steps)
    if len(grid) != 1:
        raise OptionError(f"steps={grid} are {len(grid)} numbers of steps; a comparison on a policy takes one")
    return compare_policy(
        subject, specs, steps=grid[0], tasks=subject.prompts, episodes=seeds, controls=controls, progress=progress
    )


def lab(subject: Subject, seeds: Sequence[int], told: Callable[[str], None]) -> PolicyLab:
    """Where claims on a policy are tested."""
    from elision.bench.policy.laboratory import PolicyLab
    from elision.bench.policy.subject import load_policy

    return PolicyLab(load_policy(subject, subject.prompts), seeds, told)
