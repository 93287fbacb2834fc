"""The report of a denoise session: which steps were computed, which stood in, why, and at what cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from elision.session import Report

State = Literal["computed", "reused", "predicted", "mixed"]


@dataclass
class Tally:
    """What happened at the sites of one group in one step; `partial` counts calls with some of the tokens."""

    computed: int = 0
    reused: int = 0
    predicted: int = 0
    partial: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def stood_in(self) -> int:
        """Outputs that were not computed."""
        return self.reused + self.predicted

    @property
    def state(self) -> State:
        """One word for the step: mixed if some sites, or some tokens, were computed and some not."""
        if self.partial or (self.computed and self.stood_in):
            return "mixed"
        if self.predicted:
            return "predicted"
        return "reused" if self.reused else "computed"


@dataclass
class StepRecord:
    """One step of a run; `groups` maps the method's name to its tally."""

    n: int
    t: float
    sigma: float | None
    groups: dict[str, Tally] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """One word for the step over all groups: computed only if everything was."""
        states = {tally.state for tally in self.groups.values()} or {"computed"}
        return states.pop() if len(states) == 1 else "mixed"


@dataclass
class RunRecord:
    """One pass through the timesteps; `extra` is what a method has to show of it, as plain data by its name."""

    number: int
    total: int | None
    steps: list[StepRecord] = field(default_factory=list)
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)

    def states(self) -> list[State]:
        """The state of every step in order."""
        return [step.state for step in self.steps]

    def count(self, state: State) -> int:
        """Steps in this state."""
        return sum(step.state == state for step in self.steps)


@dataclass(frozen=True)
class ShadowError:
    """Relative error (2-norm) of a stand-in against the true value, in shadow mode."""

    run: int
    n: int
    branch: str
    site: str
    error: float


@dataclass
class DenoiseReport(Report):
    """What a denoise session did.

    Attributes:
        sites: number of tapped sites per group.
        runs: the latest runs, oldest first (at most 64 are kept in detail).
        run_count: how many runs there were.
        steps_computed: steps in which every site was computed, over all runs, and
        steps_reused: in which every site was reused,
        steps_predicted: was predicted,
        steps_mixed: were both.
        calls: calls of the denoiser.
        calls_elided: calls in which the denoiser did not run at all.
        outputs_computed: outputs of sites that were computed, and
        outputs_stood_in: that were not.
        flops_computed: floating point operations that ran, None where the target cannot be counted, and
        flops_elided: that a run without the method would have added.
        shadow: errors of the stand-ins, in shadow mode.
    """

    sites: dict[str, int] = field(default_factory=dict)
    runs: list[RunRecord] = field(default_factory=list)
    run_count: int = 0
    steps_computed: int = 0
    steps_reused: int = 0
    steps_predicted: int = 0
    steps_mixed: int = 0
    calls: int = 0
    calls_elided: int = 0
    outputs_computed: int = 0
    outputs_stood_in: int = 0
    flops_computed: int | None = None
    flops_elided: int | None = None
    shadow: list[ShadowError] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """All steps of all runs."""
        return self.steps_computed + self.steps_reused + self.steps_predicted + self.steps_mixed

    @property
    def last(self) -> RunRecord | None:
        """The latest run."""
        return self.runs[-1] if self.runs else None

    def reasons(self) -> dict[str, Counter[str]]:
        """How often each reason was given, per group, over the runs kept in detail."""
        out: dict[str, Counter[str]] = {}
        for run in self.runs:
            for step in run.steps:
                for name, tally in step.groups.items():
                    out.setdefault(name, Counter()).update(tally.reasons)
        return out

    def shadow_by_step(self) -> dict[int, float]:
        """Mean relative error of the stand-ins at every step that has any."""
        sums: dict[int, list[float]] = {}
        for row in self.shadow:
            sums.setdefault(row.n, []).append(row.error)
        return {n: sum(errors) / len(errors) for n, errors in sorted(sums.items())}

    def strip(self, run: RunRecord | None = None) -> str:
        """One letter per step of a run (the latest): C computed, r reused, p predicted, m mixed."""
        letters = {"computed": "C", "reused": "r", "predicted": "p", "mixed": "m"}
        run = run or self.last
        return "".join(letters[state] for state in run.states()) if run else ""

    def __str__(self) -> str:
        """A few lines for people."""
        counts = [f"{self.steps_computed} of {self.steps} steps computed"]
        counts += [
            f"{n} {word}"
            for n, word in (
                (self.steps_reused, "reused"),
                (self.steps_predicted, "predicted"),
                (self.steps_mixed, "mixed"),
            )
            if n
        ]
        lines = [f"{' + '.join(self.methods)} on {self.target}: {', '.join(counts)}"]
        lines[0] += f", in {self.run_count} runs" if self.run_count != 1 else ""
        if self.last:
            lines.append(f"  last run  {self.strip()}   (C computed, r reused, p predicted, m mixed)")
        for name, reasons in self.reasons().items():
            lines.append(f"  {name}: " + ", ".join(f"{why} {n}" for why, n in reasons.most_common()))
        lines.append(f"  outputs   {self.outputs_computed} computed, {self.outputs_stood_in} stood in for")
        if self.flops_computed is not None and self.flops_elided is not None:
            whole = self.flops_computed + self.flops_elided
            share = self.flops_elided / whole if whole else 0.0
            lines.append(
                f"  FLOPs     {self.flops_computed:.3g} computed, {self.flops_elided:.3g} elided ({share:.0%})"
            )
        s = self.seconds
        lines.append(
            f"  seconds   {s.computing:.2f} computing, {s.standing_in:.3f} standing in, {s.deciding:.3f} deciding"
        )
        lines.append(f"  bytes     {self.bytes_held:,} held, {self.bytes_peak:,} at the peak")
        if self.shadow:
            errors = [row.error for row in self.shadow]
            lines.append(f"  shadow    mean relative error {sum(errors) / len(errors):.3g}, worst {max(errors):.3g}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
