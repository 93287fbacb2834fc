"""A finished comparison of KV methods: arms, the rows of its table, and its result file."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elision.bench import results, stats
from elision.bench.kv.measure import Kept, Outcome
from elision.bench.kv.timing import Times
from elision.bench.stats import Estimate

if TYPE_CHECKING:
    from rich.table import Table

    from elision.bench.spec import Spec

Kind = Literal["full", "method", "control", "cache"]


@dataclass(frozen=True)
class Sample:
    """One prompt as text, token by token, with what became of every token."""

    task: str
    tokens: list[str]
    where: tuple[int, int] | None
    answer: str
    held: list[float]
    packed: list[float]

    @classmethod
    def read(cls, record: dict[str, Any]) -> Sample:
        """From a result file."""
        where = record["where"]
        return cls(**{**record, "where": None if where is None else (where[0], where[1])})


@dataclass
class KVArm:
    """One row of a comparison.

    Attributes:
        kind: the full cache, a method, a control, or another cache of transformers.
        label: text that names it.
        outcomes: one per prompt, in the order of the full cache's.
        times: of the prompt and of decoding.
        why: for a row that could not be measured, the reason.
        notes: what a careful user should know.
        sample: what it kept of one prompt.
        spec: the method; None for caches and for arms that were read from a file.
    """

    kind: Kind
    label: str
    outcomes: list[Outcome] = field(default_factory=list)
    times: Times | None = None
    why: str = ""
    notes: list[str] = field(default_factory=list)
    sample: Sample | None = field(default=None, repr=False)
    spec: Spec | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The method without its options."""
        return self.label.partition(":")[0]

    def of(self, task: str) -> list[Outcome]:
        """The outcomes on one task."""
        return [o for o in self.outcomes if o.task == task]


@dataclass(frozen=True)
class KVRow:
    """The numbers of one arm, as tables and plots show them.

    Attributes:
        scores: by task, the share of right answers, or the perplexity where there is no right one.
        nll: of all answers' tokens, minus that over the full cache, nats per token, paired by prompt.
        kl, agree: divergence from the full cache's predictions, and share of equal likeliest tokens.
        share: bytes held as a share of the full cache's.
        prefill, decode: seconds of the prompt, milliseconds per token; medians.
        prefill_ratio, decode_ratio: as multiples of the full cache's, paired by round.
    """

    kind: str
    label: str
    why: str
    scores: dict[str, Estimate]
    nll: Estimate | None = None
    kl: Estimate | None = None
    agree: Estimate | None = None
    share: Estimate | None = None
    bytes_held: float | None = None
    bytes_peak: float | None = None
    prefill: float | None = None
    decode: float | None = None
    prefill_ratio: Estimate | None = None
    decode_ratio: Estimate | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class KVComparison:
    """What `compare_kv` returns.

    Attributes:
        model: its name.
        tasks: names of the tasks.
        length: tokens of a prompt.
        seeds: a prompt per task and seed.
        arms: everything that ran, the full cache first.
        notes: what is missing and why.
        environment: what it was read from; empty for a fresh one.
    """

    model: str
    tasks: list[str]
    length: int
    seeds: list[int]
    arms: list[KVArm]
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def full(self) -> KVArm:
        """The arm of the full cache."""
        return next(arm for arm in self.arms if arm.kind == "full")

    def rows(self) -> list[KVRow]:
        """One row per arm, in order."""
        return [_row(arm, self.full, self.tasks) for arm in self.arms]

    def setting(self) -> dict[str, Any]:
        """What was asked for."""
        return {name: getattr(self, name) for name in ("model", "tasks", "length", "seeds", "notes")}

    def to_dict(self) -> dict[str, Any]:
        """Setting and rows, for JSON."""
        return results.plain({**self.setting(), "rows": self.rows()})  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> Path:
        """Write a result file: the setting, one record per arm and outcome, one per row."""
        records: list[dict[str, Any]] = []
        for arm in self.arms:
            facts = {name: getattr(arm, name) for name in ("label", "times", "why", "notes", "sample")}
            records.append({"kind": "arm", "arm": arm.kind, **facts, "options": arm.spec.options if arm.spec else {}})
            records += [{"kind": "outcome", "arm": arm.label, **dataclasses.asdict(o)} for o in arm.outcomes]
        records += [{"kind": "row", "row": row} for row in self.rows()]
        return results.write(path, "compare-kv", self.setting(), records)

    @classmethod
    def load(cls, path: str | Path) -> KVComparison:
        """Read what `save` wrote."""
        head, records = results.read(path)
        arms: list[KVArm] = []
        for record in records:
            if record["kind"] == "arm":
                times = None if record["times"] is None else Times(**record["times"])
                sample = None if record["sample"] is None else Sample.read(record["sample"])
                arms.append(KVArm(record["arm"], record["label"], [], times, record["why"], record["notes"], sample))
            elif record["kind"] == "outcome":
                arms[-1].outcomes.append(Outcome(**{k: v for k, v in record.items() if k not in ("kind", "arm")}))
        return cls(**head["setting"], arms=arms, environment=head["environment"])

    def table(self, width: int | None = None) -> Table:
        """A rich table of the rows, with the columns that fit into `width`."""
        from elision.bench.kv.table import comparison_table

        return comparison_table(self, width)


def perplexity(outcomes: Sequence[Outcome]) -> Estimate:
    """Perplexity with the interval of the mean log-likelihood over prompts."""
    nll = stats.mean([o.nll for o in outcomes])
    low, high = (None if end is None else math.exp(end) for end in (nll.low, nll.high))
    return Estimate(math.exp(nll.mean), low, high, nll.n)


def score(outcomes: Sequence[Outcome]) -> Estimate:
    """Share of right answers, or perplexity where there is no right one."""
    graded = [o.exact for o in outcomes if o.exact is not None]
    return stats.mean(graded) if graded else perplexity(outcomes)


def _row(arm: KVArm, full: KVArm, tasks: Sequence[str]) -> KVRow:
    if not arm.outcomes:
        return KVRow(arm.kind, arm.label, arm.why, {})
    outcomes = arm.outcomes
    timed = arm.times is not None and full.times is not None and arm.times.prefill
    return KVRow(
        kind=arm.kind,
        label=arm.label,
        why=arm.why,
        scores={task: score(arm.of(task)) for task in tasks if arm.of(task)},
        nll=stats.difference([o.nll for o in outcomes], [o.nll for o in full.outcomes]),
        kl=stats.mean([o.kl for o in outcomes]),
        agree=stats.mean([o.agree for o in outcomes]),
        share=stats.mean([o.share for o in outcomes]),
        bytes_held=statistics.fmean(o.bytes_held for o in outcomes),
        bytes_peak=max(o.bytes_peak for o in outcomes),
        prefill=statistics.median(arm.times.prefill) if timed and arm.times else None,
        decode=statistics.median(arm.times.decode) * 1000 if timed and arm.times else None,
        prefill_ratio=arm.times.prefill_ratio(full.times) if timed and arm.times and full.times else None,
        decode_ratio=arm.times.decode_ratio(full.times) if timed and arm.times and full.times else None,
        notes=sorted(set(arm.notes)),
    )


def sample_of(subject: Any, prompt: Any, kept: Kept) -> Sample:
    """The text of a prompt, token by token, with where its tokens are."""
    ids = prompt.turns[0].ids
    tokens = [subject.decode([token]) for token in ids]
    return Sample(prompt.task, tokens, prompt.where, subject.decode(prompt.turns[0].answer), kept.held, kept.packed)
