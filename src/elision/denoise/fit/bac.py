"""BAC's offline part: how similar the outputs of a branch are from step to step, and how much they move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elision.denoise.fit._record import record
from elision.denoise.policy import Host
from elision.denoise.sites import Call, Site
from elision.denoise.steps import Step
from elision.errors import OptionError
from elision.hooks.diffusers import inspect_target, unwrap
from elision.profile import Profile, fingerprint

if TYPE_CHECKING:
    from elision.denoise.methods.bac import BAC


def similarity_matrix(features: Tensor, metric: str) -> Tensor:
    """Similarity (cosine) or distance of every pair of steps.

    Args:
        features: [K, D], the flattened outputs of one branch for one sample.
        metric: "cosine", "mse" (mean square), "l1" or "l2" (norms of the difference), "wasserstein" (distance of the
            cumulative sums of the absolute values, each step's scaled to sum 1).

    Returns:
        [K, K] in float32.
    """
    x = features.float()
    if metric == "cosine":
        unit = torch.nn.functional.normalize(x, dim=1)
        return unit @ unit.T
    if metric == "wasserstein":
        mass = x.abs()
        x = (mass / (mass.sum(1, keepdim=True) + 1e-8)).cumsum(1)
    if metric in ("l1", "wasserstein"):
        return torch.cdist(x, x, p=1)
    norms = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return norms.square() / x.shape[1] if metric == "mse" else norms


def step_error(features: Tensor) -> float:
    """Mean over pairs of steps of the mean absolute difference of their outputs; `features` [K, D]."""
    k, width = features.shape
    pairs = k * (k - 1) / 2
    x = features.float()
    return float(torch.cdist(x, x, p=1).triu(1).sum() / (pairs * width)) if pairs else 0.0


class _Features:
    """The outputs of every branch of the leading guidance branch, step by step, one run at a time."""

    def __init__(self, subsample: int) -> None:
        self.subsample = subsample
        self.kept: dict[str, list[Tensor]] = {}
        self.sizes: dict[str, int] = {}
        self._steps: dict[str, list[int]] = {}

    def seen(self, host: Host, step: Step, site: Site, call: Call, out: Tensor) -> None:
        if not step.leads:
            return
        rows = out if step.cond is None else out[step.cond]
        flat = rows.detach().flatten(1)
        self.sizes[site.key] = flat.shape[1]
        self.kept.setdefault(site.key, []).append(flat[:, :: self.subsample].float().cpu())
        self._steps.setdefault(site.key, []).append(step.n)

    def runs(self) -> dict[str, list[Tensor]]:
        """Per branch: one [K, D] for every sample of every run."""
        found: dict[str, list[Tensor]] = {}
        for key, steps in self._steps.items():
            cuts = [0, *(i for i, (a, b) in enumerate(pairwise(steps), 1) if b <= a), len(steps)]
            for start, stop in pairwise(cuts):
                found.setdefault(key, []).extend(torch.stack(self.kept[key][start:stop], dim=1))
        return found


def measure(method: BAC, target: Any, calls: Sequence[Any], *, branches: Sequence[str] = ()) -> Profile:
    """Run `calls` uncached and make the profile; similarity and error are averaged over samples."""
    found = inspect_target(target)
    if len(found.denoisers) > 1:
        raise OptionError(f"bac: {found.name} has {len(found.denoisers)} denoisers: fit and apply each by itself")
    features = _Features(method.subsample)
    record(target, "branch", calls, features.seen, branches=branches)
    runs = features.runs()
    lengths = {len(x) for several in runs.values() for x in several}
    if len(lengths) != 1:
        raise OptionError(f"bac: the calls ran for {sorted(lengths)} steps: a profile is for one number of steps")
    (k,) = lengths
    similarity = [
        torch.stack([similarity_matrix(x, method.metric) for x in several]).mean(0) for several in runs.values()
    ]
    error = torch.tensor([sum(map(step_error, several)) / len(several) for several in runs.values()])
    sizes = torch.tensor([features.sizes[key] for key in runs])
    facts = {
        "sites": list(runs),
        "metric": method.metric,
        "steps": k,
        "samples": len(next(iter(runs.values()))),
    }
    made_for = fingerprint("bac", unwrap(found.denoisers[0]), found.scheduler, k)
    tensors = {"similarity": torch.stack(similarity), "error_mean": error, "error_norm": error * sizes}
    return Profile(made_for, tensors, facts)


def listed(model: nn.Module, schedules: Mapping[str, Sequence[int]], steps: int, scheduler: Any = None) -> Profile:
    """A profile that holds given update steps, for schedules found elsewhere; they are used as they are.

    A branch without steps is always computed; one whose first step comes late is computed until then.

    Args:
        model: the denoiser.
        schedules: update steps by site key, as in `transformer_blocks.0.attn`.
        steps: of the runs they are for.
        scheduler: the pipeline's.
    """
    facts = {"sites": list(schedules), "steps": steps, "listed": {key: list(mine) for key, mine in schedules.items()}}
    return Profile(fingerprint("bac", model, scheduler, steps), {}, facts)
