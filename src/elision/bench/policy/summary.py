"""A finished comparison of methods on a policy: arms, the rows of its table, and its result file."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elision.bench import results, stats
from elision.bench.dllm import shares
from elision.bench.stats import Estimate
from elision.zoo.metaworld import Episode

if TYPE_CHECKING:
    from rich.table import Table

Kind = Literal["baseline", "method", "control", "fewer_steps"]


@dataclass
class PolicyArm:
    """One row of a comparison.

    Attributes:
        kind: the uncached policy, a method, a control, or plain sampling with fewer steps.
        label: text that names it.
        steps: denoising steps.
        episodes: of all tasks, in the order of tasks and seeds.
        errors: root mean square difference of actions to the uncached policy's, one per observation.
        seconds: of a chunk for one robot, one per round.
        flops: of the denoiser for a chunk, and
        share: the part of an uncached chunk's; None where they cannot be counted.
        bytes_peak: the most that the method held for one robot.
        equal_cost: the label of the arm of fewer steps, with DDIM, that costs at least as much.
        options: of its method.
    """

    kind: Kind
    label: str
    steps: int
    episodes: list[Episode] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    flops: float | None = None
    share: float | None = None
    bytes_peak: int = 0
    equal_cost: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def solved(self, task: str | None = None) -> list[float]:
        """1 or 0 for every episode, of one task or of all."""
        return [float(e.solved) for e in self.episodes if task in (None, e.task)]


@dataclass(frozen=True)
class PolicyRow:
    """The numbers of one arm, as tables and plots show them.

    Attributes:
        success: share of solved episodes of all tasks, and
        tasks: the same by task.
        lost: success minus the uncached policy's, paired by episode.
        lead: success minus that of as costly plain sampling with DDIM.
        control_steps: until the task is solved, mean over solved episodes; None where none is.
        error: of actions, mean over observations.
        hz: chunks per second for one robot, median over rounds; None without timing.
        control_hz: actions per second that follow from it.
        speedup: ratio of rates to the uncached policy's, paired by round.
        flops, share: of the denoiser for a chunk, and the part of an uncached chunk's.
        bytes_peak: the most that the method held for one robot.
        equal_cost: label of the arm that `lead` is over.
    """

    kind: str
    label: str
    success: Estimate
    tasks: dict[str, Estimate]
    lost: Estimate | None
    lead: Estimate | None
    control_steps: float | None
    error: Estimate
    hz: float | None
    control_hz: float | None
    speedup: Estimate | None
    flops: float | None
    share: float | None
    bytes_peak: int
    equal_cost: str


@dataclass
class PolicyComparison:
    """What `compare_policy` returns.

    Attributes:
        model: its name.
        tasks: names of the tasks.
        steps: denoising steps of the uncached policy.
        seeds: of the episodes of every task.
        chunk: actions that are executed per chunk.
        limit: control steps of an episode.
        spread: differences of two uncached samples from different noise, one per observation.
        arms: everything that ran, the uncached policy first.
        notes: what a careful user should know.
        environment: what it was read from; empty for a fresh one.
    """

    model: str
    tasks: list[str]
    steps: int
    seeds: list[int]
    chunk: int
    limit: int
    spread: list[float]
    arms: list[PolicyArm]
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict, compare=False)

    def rows(self) -> list[PolicyRow]:
        """One row per arm, in order."""
        return [self._row(arm) for arm in self.arms]

    def setting(self) -> dict[str, Any]:
        """What was asked for."""
        names = ("model", "tasks", "steps", "seeds", "chunk", "limit", "spread", "notes")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Setting and rows, for JSON."""
        return results.plain({**self.setting(), "rows": self.rows()})  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> Path:
        """Write a result file: the setting, one record per arm and per row."""
        records: list[dict[str, Any]] = [{"kind": "arm", "arm": dataclasses.asdict(arm)} for arm in self.arms]
        records += [{"kind": "row", "row": row} for row in self.rows()]
        return results.write(path, "compare-policy", self.setting(), records)

    @classmethod
    def load(cls, path: str | Path) -> PolicyComparison:
        """Read what `save` wrote."""
        head, records = results.read(path)
        found = [record["arm"] for record in records if record["kind"] == "arm"]
        arms = [PolicyArm(**{**arm, "episodes": [Episode(**e) for e in arm["episodes"]]}) for arm in found]
        return cls(**head["setting"], arms=arms, environment=head["environment"])

    def table(self, width: int | None = None) -> Table:
        """A rich table of the rows, with the columns that fit into `width`."""
        from elision.bench.policy.table import comparison_table

        return comparison_table(self, width)

    def _row(self, arm: PolicyArm) -> PolicyRow:
        plain, mine = self.arms[0], arm.solved()
        equal = next((other for other in self.arms if other.label == arm.equal_cost), None)
        done = [e.steps for e in arm.episodes if e.solved]
        hz = 1 / statistics.median(arm.seconds) if arm.seconds else None
        return PolicyRow(
            kind=arm.kind,
            label=arm.label,
            success=shares.share(mine),
            tasks={task: shares.share(arm.solved(task)) for task in self.tasks},
            lost=None if arm is plain else shares.lead(mine, plain.solved()),
            lead=None if equal is None else shares.lead(mine, equal.solved()),
            control_steps=statistics.fmean(done) if done else None,
            error=stats.mean(arm.errors),
            hz=hz,
            control_hz=None if hz is None else hz * self.chunk,
            speedup=stats.ratio(plain.seconds, arm.seconds) if arm.seconds else None,
            flops=arm.flops,
            share=arm.share,
            bytes_peak=arm.bytes_peak,
            equal_cost=arm.equal_cost,
        )
