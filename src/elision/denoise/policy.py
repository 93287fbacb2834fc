"""What a denoise method answers: *when* (`Schedule`), *how* (`Predictor`), and the plan that joins them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from elision.denoise.sites import Call, Level, Site
from elision.denoise.steps import Step
from elision.method import Method

if TYPE_CHECKING:
    from elision.denoise.adapters import Adapter
    from elision.denoise.control import Control
    from elision.profile import Profile
    from elision.session import Applied


class Decision(NamedTuple):
    """What to do at a call, and why."""

    stand_in: bool
    reason: str


COMPUTE, STAND_IN = Decision(False, "scheduled"), Decision(True, "scheduled")


class Schedule(ABC):
    """When to compute. One object serves all sites of a group for the length of a run.

    `scope` says how often `decide` runs: once per "step" for all branches and sites, once per "branch", or for every
    "site". `listens` says whether `update` wants to see the calls.
    """

    scope: ClassVar[Literal["step", "branch", "site"]] = "step"
    listens: ClassVar[bool] = False

    @abstractmethod
    def decide(self, step: Step, site: Site, call: Call) -> Decision:
        """Compute or stand in at this call. `call.x` belongs to the first call of the scope."""

    def update(  # noqa: B027 (listening is optional)
        self, step: Step, site: Site, call: Call, out: Any, computed: bool
    ) -> None:
        """Learn from a call that was computed or stood in; only called where `listens`."""

    def tensors(self) -> Iterable[Tensor]:
        """Tensors kept between calls, for the byte count."""
        return ()

    def complaint(self, total: int) -> str | None:
        """Why this schedule makes no sense on `total` steps, if so; reported as a warning."""
        return None

    def numbers(self) -> str:
        """The numbers behind the decisions of this run, for the warning that nothing was elided."""
        return ""

    def notes(self) -> Iterable[str]:
        """What happened in this run that the report should say."""
        return ()

    def extra(self) -> dict[str, Any]:
        """What there is to show of this run, as plain data (a mask, a table of decisions), for the report."""
        return {}


class Predictor(ABC):
    """How to stand in. The session makes one per site, branch and stream for the length of a run."""

    kind: ClassVar[Literal["reused", "predicted"]] = "reused"

    @abstractmethod
    def ready(self, step: Step) -> bool:
        """Whether there is enough history; False forces a computation."""

    @abstractmethod
    def observe(self, step: Step, x: Tensor, call: Call, out: Tensor, computed: bool) -> None:
        """Learn from an output; `computed` is False for the predictor's own stand-ins.

        Args:
            step: where the call stands.
            x: the tensor that goes in at this stream.
            call: the whole call.
            out: the tensor that came out of this stream.
            computed: whether the module really ran.
        """

    @abstractmethod
    def predict(self, step: Step, x: Tensor, call: Call) -> Tensor:
        """The stand-in for the output of this call."""

    def tensors(self) -> Iterable[Tensor]:
        """Tensors kept between calls, for the byte count."""
        return ()


@dataclass(frozen=True)
class Group:
    """Sites that share one schedule and one kind of predictor.

    Without a `predictor` the schedule must be one itself: a single object then decides and stands in for all sites and
    branches of the group, and tells them apart by what it is handed.
    """

    name: str
    sites: Sequence[Site]
    schedule: Callable[[], Schedule]
    predictor: Callable[[], Predictor] | None = None


@dataclass(frozen=True)
class Claims:
    """What a method decides and needs, for the legality of compositions.

    Attributes:
        decides: the sites whose value it may replace.
        controls: what of the sampler it holds ("dt", "time", "tokens").
        needs_total: whether it must know the number of steps.
        needs_every_step: whether it must see every step computed or stood in by itself.
        tolerates_gaps: whether it works when something further out skips it at some steps.
    """

    decides: frozenset[Site]
    controls: frozenset[str] = frozenset()
    needs_total: bool = False
    needs_every_step: bool = False
    tolerates_gaps: bool = False


@dataclass(frozen=True)
class Plan:
    """What a method file returns and the engine installs.

    Attributes:
        groups: sites with their schedule and predictor.
        claims: what is decided and held; `claims.controls` says which questions `control` is asked.
        notes: for the report.
        control: makes the control of the sampler for one run, from that run's schedules in the order of `groups`, so
            that deciding and steering can share what they know.
    """

    groups: Sequence[Group]
    claims: Claims
    notes: Sequence[str] = field(default_factory=tuple)
    control: Callable[[Sequence[Schedule]], Control] | None = None


@dataclass(frozen=True)
class Host:
    """One denoiser as methods see it: the module, its adapter, its scheduler if there is a pipeline."""

    model: nn.Module
    adapter: Adapter
    scheduler: Any = None

    def site(self, level: Level, method: str) -> list[Site]:
        """The sites of one level; raises `UnsupportedTarget` naming the method where the class has none."""
        return self.adapter.sites(self.model, level, method)


class DenoiseMethod(Method):
    """A method of the denoise family: options, and the plan they make for a denoiser."""

    family: ClassVar[str] = "denoise"
    levels: ClassVar[tuple[Level, ...]] = ("model",)

    @abstractmethod
    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """Name the sites, the schedule and the predictor for this denoiser."""

    @classmethod
    def attach(cls, target: Any, methods: Sequence[Method], **settings: Any) -> Applied:
        """Install on a diffusers pipeline or on its denoiser."""
        from elision.denoise.engine import attach  # the engine imports this module

        return attach(target, methods, **settings)

    @classmethod
    def targets(cls) -> tuple[str, ...]:
        """The denoiser classes that have a site of the levels the method works on."""
        from elision.denoise.adapters import supported

        return supported(cls.levels)
