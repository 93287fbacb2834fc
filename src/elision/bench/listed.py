"""A method for experiments: compute exactly the steps of a list, and let one kind of stand-in fill the others.

It separates the two questions that a published method answers together (*when* to compute, and *what stands in*), so
that a claim about one can be tested with the other held fixed. It is not in the registry: apply it as an object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from elision.denoise.policy import Claims, DenoiseMethod, Group, Host, Plan, Predictor
from elision.denoise.predictors import Residual, Reuse
from elision.denoise.schedules import Steps
from elision.errors import OptionError
from elision.method import option
from elision.profile import Profile


@dataclass(frozen=True)
class Listed(DenoiseMethod):
    """Compute the steps in `computed`; elsewhere reuse the denoiser's residual or its output as it was."""

    name: ClassVar[str] = "listed"
    description: ClassVar[str] = "experiment: compute exactly these steps"
    control: ClassVar[bool] = True

    computed: tuple[int, ...] = option((0,), "steps that are computed, counted from 0")
    keep: Literal["residual", "output", "first"] = option(
        "residual",
        "output minus input, the output itself, or the first residual of the run for ever",
        choices=("residual", "output", "first"),
    )

    def __post_init__(self) -> None:
        """The first step has nothing to stand in for it."""
        super().__post_init__()
        if 0 not in self.computed:
            raise OptionError("listed: step 0 must be computed, nothing can stand in for it")

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """One list at the denoiser itself."""
        sites = host.site("model", self.name)
        group = Group(self.name, sites, lambda: Steps(self.computed), self._predictor)
        return Plan([group], Claims(frozenset(sites)))

    def _predictor(self) -> Predictor:
        if self.keep == "output":
            return Reuse()
        return Residual(Reuse(first=self.keep == "first"))


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` steps of `total`, the first among them, as evenly as whole numbers allow."""
    if not 1 <= count <= total:
        raise OptionError(f"{count} computed steps do not fit into a run of {total}")
    return tuple(i * total // count for i in range(count))
