"""A finished comparison of methods for masked-diffusion models: arms, the rows of its tables, and its result file."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elision.bench import results, stats
from elision.bench.dllm import shares
from elision.bench.dllm.measure import Outcome
from elision.bench.stats import Estimate
from elision.dllm.report import DllmRun

if TYPE_CHECKING:
    from rich.table import Table

Kind = Literal["baseline", "method", "control", "fewer_steps"]
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Strip:
    """What every call of one run computed.

    Attributes:
        task, length: the question.
        prompt: its positions; those after it are generated.
        layers: of the model.
        calls: one text per call, a letter per position: how many layers the position went through, in base 36 (where
            there are more than 35 layers, scaled to that).
        stale: by layer, relative error of the keys and values held, mean over calls; empty where nothing is held.
        drift: by layer, relative change of the true keys and values of decided tokens from call to call, mean over
            calls; only of the uncached run, empty for others.
    """

    task: str
    length: int
    prompt: int
    layers: int
    calls: list[str]
    stale: list[float]
    drift: list[float]

    @classmethod
    def of(cls, task: str, length: int, run: DllmRun, drift: Sequence[float] = ()) -> Strip:
        """From the record of a shadow run of one question."""
        scale = min(1.0, (len(_DIGITS) - 1) / run.layers)
        computed = (run.computed()[:, 0] * scale).round().long().tolist()
        assert run.stale is not None
        stale = run.stale.mean(dim=0).tolist()
        return cls(
            task,
            length,
            run.prompt,
            run.layers,
            ["".join(_DIGITS[n] for n in row) for row in computed],
            stale if any(stale) else [],
            list(drift),
        )

    def shares(self) -> list[list[float]]:
        """[calls, N] share of the layers that every position went through."""
        most = min(self.layers, len(_DIGITS) - 1)
        return [[_DIGITS.index(letter) / most for letter in row] for row in self.calls]


@dataclass
class DllmArm:
    """One row of a comparison.

    Attributes:
        kind: the uncached run, a method, a control, or plain decoding with fewer calls.
        label: text that names it.
        outcomes: one per question.
        equal_cost: by length, the label of the arm of fewer calls that costs at least as much.
        options: of its method.
        strip: what it computed of one question.
    """

    kind: Kind
    label: str
    outcomes: list[Outcome] = field(default_factory=list)
    equal_cost: dict[int, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    strip: Strip | None = field(default=None, repr=False)

    def at(self, length: int) -> list[Outcome]:
        """The outcomes at one length, in the order of the questions."""
        return [o for o in self.outcomes if o.length == length]


@dataclass(frozen=True)
class DllmRow:
    """The numbers of one arm at one length, as tables and plots show them.

    Attributes:
        exact: share of right answers, and
        tasks: the same by task; None and empty where there is no right one.
        right: share of right characters in their place.
        agree: share of generated tokens that are the uncached run's.
        speed: tokens per second, all questions together; one question is generated at a time.
        speedup: ratio of tokens per second to the uncached run's, paired by question.
        calls, full_calls: of the model, mean over questions.
        token_layers, flops: means over questions, and
        layers_ratio, flops_ratio: the uncached run's, divided by them.
        bytes_peak: the most that was held.
        lead: share of right answers minus that of fewer calls at equal cost, paired by question.
        equal_cost: the label of that arm.
    """

    length: int
    kind: str
    label: str
    exact: Estimate | None
    tasks: dict[str, Estimate]
    right: Estimate | None
    agree: Estimate
    speed: float
    speedup: Estimate
    calls: float
    full_calls: float
    token_layers: float
    layers_ratio: float
    flops: float
    flops_ratio: float
    bytes_peak: int
    lead: Estimate | None
    equal_cost: str


@dataclass
class DllmComparison:
    """What `compare_dllm` returns.

    Attributes:
        model: its name.
        tasks: names of the tasks.
        lengths: of prompt and answer together, at most.
        seeds: by length, a question per task and seed.
        arms: everything that ran, the uncached run first.
        notes: what a careful user should know.
        environment: what it was read from; empty for a fresh one.
    """

    model: str
    tasks: list[str]
    lengths: list[int]
    seeds: dict[int, list[int]]
    arms: list[DllmArm]
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict, compare=False)

    def rows(self, length: int | None = None) -> list[DllmRow]:
        """One row per arm, in order, for one length or for all."""
        return [
            _row(self, arm, n) for n in (self.lengths if length is None else [length]) for arm in self.arms if arm.at(n)
        ]

    def setting(self) -> dict[str, Any]:
        """What was asked for."""
        return {name: getattr(self, name) for name in ("model", "tasks", "lengths", "seeds", "notes")}

    def to_dict(self) -> dict[str, Any]:
        """Setting and rows, for JSON."""
        return results.plain({**self.setting(), "rows": self.rows()})  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> Path:
        """Write a result file: the setting, one record per arm and outcome, one per row."""
        records: list[dict[str, Any]] = []
        for arm in self.arms:
            facts = {name: getattr(arm, name) for name in ("label", "equal_cost", "options", "strip")}
            records.append({"kind": "arm", "arm": arm.kind, **facts})
            records += [{"kind": "outcome", "arm": arm.label, **dataclasses.asdict(o)} for o in arm.outcomes]
        records += [{"kind": "row", "row": row} for row in self.rows()]
        return results.write(path, "compare-dllm", self.setting(), records)

    @classmethod
    def load(cls, path: str | Path) -> DllmComparison:
        """Read what `save` wrote."""
        head, records = results.read(path)
        arms: list[DllmArm] = []
        for record in records:
            if record["kind"] == "arm":
                strip = None if record["strip"] is None else Strip(**record["strip"])
                equal = {int(n): label for n, label in record["equal_cost"].items()}
                arms.append(DllmArm(record["arm"], record["label"], [], equal, record["options"], strip))
            elif record["kind"] == "outcome":
                arms[-1].outcomes.append(Outcome(**{k: v for k, v in record.items() if k not in ("kind", "arm")}))
        setting = {**head["setting"], "seeds": {int(n): seeds for n, seeds in head["setting"]["seeds"].items()}}
        return cls(**setting, arms=arms, environment=head["environment"])

    def table(self, length: int | None = None, width: int | None = None) -> Table:
        """A rich table of the rows at one length (the first), with the columns that fit into `width`."""
        from elision.bench.dllm.table import comparison_table

        return comparison_table(self, self.lengths[0] if length is None else length, width)


def _exact(outcomes: Sequence[Outcome]) -> list[float]:
    return [o.exact for o in outcomes if o.exact is not None]


def _row(comparison: DllmComparison, arm: DllmArm, length: int) -> DllmRow:
    mine, plain = arm.at(length), comparison.arms[0].at(length)
    label = arm.equal_cost.get(length, "")
    equal = next((other.at(length) for other in comparison.arms if other.label == label), [])
    exact, right = _exact(mine), [o.right for o in mine if o.right is not None]
    layers, flops = statistics.fmean(o.token_layers for o in mine), statistics.fmean(o.flops for o in mine)
    return DllmRow(
        length=length,
        kind=arm.kind,
        label=arm.label,
        exact=shares.share(exact) if exact else None,
        tasks={t: shares.share(_exact([o for o in mine if o.task == t])) for t in comparison.tasks} if exact else {},
        right=stats.mean(right) if right else None,
        agree=stats.mean([o.agree for o in mine if o.agree is not None]),
        speed=sum(o.tokens for o in mine) / sum(o.seconds for o in mine),
        speedup=stats.ratio([o.speed for o in mine], [o.speed for o in plain]),
        calls=statistics.fmean(o.calls for o in mine),
        full_calls=statistics.fmean(o.full_calls for o in mine),
        token_layers=layers,
        layers_ratio=statistics.fmean(o.token_layers for o in plain) / layers,
        flops=flops,
        flops_ratio=statistics.fmean(o.flops for o in plain) / flops,
        bytes_peak=max(o.bytes_peak for o in mine),
        lead=shares.lead(exact, _exact(equal)) if equal and exact else None,
        equal_cost=label,
    )
