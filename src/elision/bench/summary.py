"""A finished comparison: arms, the rows of its table, and its result file."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from elision.bench import metrics, results, stats
from elision.bench.measure import Sample
from elision.bench.stats import Estimate

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from elision.bench.spec import Spec

Kind = Literal["baseline", "method", "control", "fewer_steps"]


@dataclass
class Arm:
    """One row of a comparison: what ran, and a sample per seed.

    Attributes:
        kind: baseline, method, control, or plain sampling with fewer steps.
        label: text that names it.
        steps: steps of the run it is compared with.
        samples: one per seed, in the order of the seeds.
        equal_cost: label of the fewer-steps arm that computes as many steps.
        distance: Fréchet feature distance to the uncached samples, and
        distance_real: to real images.
        images: the first images of the first seed, of videos all frames of the first few, and
        regions: [B, h, w] bool, where the method saw something to edit in them; neither is written to result files.
        spec: the method; None for plain sampling and for arms that were read from a file.
    """

    kind: Kind
    label: str
    steps: int
    samples: list[Sample] = field(default_factory=list)
    equal_cost: str = ""
    distance: Estimate | None = None
    distance_real: Estimate | None = None
    images: Tensor | None = field(default=None, repr=False, compare=False)
    spec: Spec | None = field(default=None, repr=False, compare=False)
    regions: Tensor | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def measure(mine: Sequence[metrics.Array], reference: Sequence[metrics.Array]) -> Estimate:
        """Fréchet distance of the pooled features; a single reference block is common to all seeds."""

        def whole(chosen: Sequence[int]) -> float:
            other = reference if len(reference) != len(mine) else [reference[i] for i in chosen]
            return metrics.frechet(np.concatenate([mine[i] for i in chosen]), np.concatenate(other))

        return stats.jackknife(whole, len(mine))

    def per_seed(self, what: str) -> list[float]:
        """The per-seed values of a number; lists (one entry per image) are averaged."""
        values = [getattr(s, what) for s in self.samples]
        return [float(np.mean(v)) if isinstance(v, list) else float(v) for v in values if v is not None and v != []]

    def scores(self, name: str) -> list[float]:
        """The per-seed means of a score."""
        return [float(np.mean(s.scores[name])) for s in self.samples]


@dataclass(frozen=True)
class Row:
    """The numbers of one arm, as tables and plots show them."""

    kind: Kind
    label: str
    steps: int
    seconds: float
    speedup: Estimate
    steps_computed: float
    calls: float | None
    flops: float | None
    flops_ratio: float | None
    bytes_peak: int
    psnr: Estimate
    ssim: Estimate
    lpips: Estimate | None
    scores: dict[str, Estimate]
    distance: Estimate | None
    distance_real: Estimate | None
    psnr_gain: Estimate | None
    equal_cost: str
    notes: list[str]


@dataclass
class Comparison:
    """What `compare_denoise` returns.

    Attributes:
        model: name of the model.
        prompts: one per image of a run.
        guidance: guidance scale, None for the pipeline's default.
        steps: the numbers of steps.
        seeds: of the noise.
        arms: everything that ran, for every number of steps the baseline first.
        notes: what is missing and why.
        environment: what it was read from; empty for a fresh one.
        kind: what a sample is: image, video, edit.
        frames: of a video, 1 for others.
        references: [B, C, H, W], what is shown beside the prompts: the images to edit, and
        masks: [B, H, W] bool, the true regions; neither is written to result files.
    """

    model: str
    prompts: list[str]
    guidance: float | None
    steps: list[int]
    seeds: list[int]
    arms: list[Arm]
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict, compare=False)
    kind: str = "image"
    frames: int = 1
    references: Tensor | None = field(default=None, repr=False, compare=False)
    masks: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def samples(self) -> str:
        """How many of what every arm drew: `40 images`."""
        count = len(self.prompts) * len(self.seeds)
        return f"{count} {self.kind}{'s' if count != 1 else ''}"

    def at(self, steps: int) -> list[Arm]:
        """The arms at one number of steps."""
        return [arm for arm in self.arms if arm.steps == steps]

    def rows(self) -> list[Row]:
        """One row per arm, in order."""
        return [_row(arm, self.at(arm.steps)) for arm in self.arms]

    def setting(self) -> dict[str, Any]:
        """What was asked for."""
        names = ("model", "prompts", "guidance", "steps", "seeds", "notes", "kind", "frames")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Setting and rows, for JSON."""
        return results.plain({**self.setting(), "rows": self.rows()})  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> Path:
        """Write a result file: the setting, one record per sample, one per row."""
        records: list[dict[str, Any]] = []
        for arm in self.arms:
            entry = {
                "kind": "arm",
                "arm": arm.kind,
                **{name: getattr(arm, name) for name in ("label", "steps", "equal_cost", "distance", "distance_real")},
                "options": arm.spec.options if arm.spec else {},
            }
            records.append(entry)
            records += [{"kind": "sample", "arm": arm.label, **dataclasses.asdict(sample)} for sample in arm.samples]
        records += [{"kind": "row", "row": row} for row in self.rows()]
        return results.write(path, "compare", self.setting(), records)

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read what `save` wrote; images are not in the file."""
        head, records = results.read(path)
        arms: list[Arm] = []
        for record in records:
            if record["kind"] == "arm":
                arms.append(
                    Arm(
                        record["arm"],
                        record["label"],
                        record["steps"],
                        equal_cost=record["equal_cost"],
                        distance=_estimate(record["distance"]),
                        distance_real=_estimate(record["distance_real"]),
                    )
                )
            elif record["kind"] == "sample":
                arms[-1].samples.append(Sample(**{k: v for k, v in record.items() if k not in ("kind", "arm")}))
        return cls(**head["setting"], arms=arms, environment=head["environment"])

    def table(self, steps: int | None = None, width: int | None = None) -> Table:
        """A rich table of the rows at one number of steps (the first), with the columns that fit into `width`."""
        from elision.bench.table import comparison_table

        return comparison_table(self, self.steps[0] if steps is None else steps, width)


def _estimate(record: Mapping[str, Any] | None) -> Estimate | None:
    return None if record is None else Estimate(**record)


def _row(arm: Arm, arms: Sequence[Arm]) -> Row:
    baseline = next(other for other in arms if other.kind == "baseline")
    equal = next((other for other in arms if other.label == arm.equal_cost), None)
    whole, mine = baseline.per_seed("flops"), arm.per_seed("flops")
    calls = arm.per_seed("calls")

    def optional(what: str) -> Estimate | None:
        values = arm.per_seed(what)
        return stats.mean(values) if values else None

    return Row(
        kind=arm.kind,
        label=arm.label,
        steps=arm.steps,
        seconds=statistics.median(arm.per_seed("seconds")),
        speedup=stats.ratio(baseline.per_seed("seconds"), arm.per_seed("seconds")),
        steps_computed=statistics.fmean(arm.per_seed("steps_computed")),
        calls=statistics.fmean(calls) if calls else None,
        flops=statistics.fmean(mine) if mine else None,
        flops_ratio=sum(whole) / sum(mine) if mine and whole and sum(mine) else None,
        bytes_peak=max(s.bytes_peak for s in arm.samples),
        psnr=stats.mean(arm.per_seed("psnr")),
        ssim=stats.mean(arm.per_seed("ssim")),
        lpips=optional("lpips"),
        scores={name: stats.mean(arm.scores(name)) for name in arm.samples[0].scores},
        distance=arm.distance,
        distance_real=arm.distance_real,
        psnr_gain=None if equal is None else stats.difference(arm.per_seed("psnr"), equal.per_seed("psnr")),
        equal_cost=arm.equal_cost,
        notes=sorted({note for s in arm.samples for note in s.notes}),
    )
