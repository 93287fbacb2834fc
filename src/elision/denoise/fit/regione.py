"""RegionE's offline part: how the norm of the guided velocity changes from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elision.denoise.fit._record import record
from elision.denoise.policy import Host
from elision.denoise.sites import Call, Site
from elision.denoise.steps import Step
from elision.errors import ProfileError
from elision.hooks.diffusers import unwrap
from elision.profile import Profile, fingerprint

if TYPE_CHECKING:
    from elision.denoise.methods.regione import RegionE


class _Norms:
    """Norms of the velocities of every run: [B] of whole ones, or [B, L] of tokens."""

    def __init__(self, tokens: bool) -> None:
        self.tokens = tokens
        self.runs: dict[int, list[Tensor]] = {}
        self.sigmas: dict[int, list[float]] = {}

    def seen(self, host: Host, step: Step, site: Site, call: Call, out: Tensor) -> None:
        """One guided velocity."""
        flat = out.float() if self.tokens else out.float().flatten(1)
        self.runs.setdefault(step.run, []).append(torch.linalg.vector_norm(flat, dim=-1).cpu())
        begin = step.i - step.n
        self.sigmas[step.run] = list(call.sigmas[begin:])

    def ratios(self) -> Tensor:
        """|v_n| / |v_(n-1)| / (1 - (s_(n-1) - s_n)) of every image [images, T - 1]."""
        rows: list[Tensor] = []
        for run, norms in self.runs.items():
            sigmas = torch.tensor(self.sigmas[run][: len(norms)], dtype=torch.float64)
            all_norms = torch.stack(norms).double()  # [T, B] or [T, B, L]
            ratio = all_norms[1:] / all_norms[:-1].clamp_min(1e-12)
            ratio = ratio.mean(-1) if self.tokens else ratio
            rows.append((ratio / (1 - (sigmas[:-1] - sigmas[1:]))[:, None]).T)
        return torch.cat(rows)


def calibrate(
    method: RegionE, target: Any, calls: Sequence[Any], steps: Any = None, branches: Sequence[str] = ()
) -> Profile:
    """Gammas, the mean ratio of every transition over the images of all calls.

    Args:
        method: how norms are taken.
        target: a pipeline; a bare denoiser has no scheduler to see the guided velocity at.
        calls: as `elision.fit` takes them; all with the same number of steps.
        steps: unused, a pipeline knows.
        branches: the guidance branches in the order of their calls, where the pipeline does not name them.
    """
    norms = _Norms(method.norm == "token")
    found = record(target, "guided", calls, norms.seen, branches=branches)
    lengths = sorted({len(run) for run in norms.runs.values()})
    if len(lengths) != 1 or lengths[0] < 2:
        raise ProfileError(
            f"regione fits on runs of one number of steps, at least 2; the calls had {lengths or 'none'}: "
            "give all of them the same num_inference_steps"
        )
    ratios = norms.ratios()
    tensors = {"gammas": ratios.mean(0).float(), "spread": ratios.std(0, correction=0).float()}
    tensors["sigmas"] = torch.tensor(next(iter(norms.sigmas.values())))
    facts = {"steps": lengths[0], "images": len(ratios), "norm": method.norm}
    return Profile(fingerprint("regione", unwrap(found.denoisers[0]), found.scheduler, None), tensors, facts)
