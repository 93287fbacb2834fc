"""`elision reproduce`: run the claims of methods and put paper, ours and verdict side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elision.bench import claims, results
from elision.bench.claims import Finding
from elision.bench.lab import Lab
from elision.bench.subject import load_subject
from elision.errors import OptionError, UnknownName

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {"holds": "green", "does not hold": "red", "not testable here": "yellow"}


def _silent(done: int, total: int, what: str) -> None:
    del done, total, what


@dataclass
class Reproduction:
    """What `run_claims` returns."""

    names: list[str]
    model: str
    steps: list[int]
    seeds: list[int]
    images: int
    findings: list[Finding] = field(default_factory=list)

    def setting(self) -> dict[str, Any]:
        """What was asked for."""
        return {name: getattr(self, name) for name in ("names", "model", "steps", "seeds", "images")}

    def to_dict(self) -> dict[str, Any]:
        """Setting and findings, for JSON."""
        return results.plain({**self.setting(), "findings": self.findings})  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> Path:
        """Write a result file."""
        records = [{"kind": "finding", **results.plain(finding)} for finding in self.findings]
        return results.write(path, "reproduce", self.setting(), records)

    def verdicts(self) -> Counter[str]:
        """How many findings have each verdict."""
        return Counter(finding.verdict for finding in self.findings)

    def table(self) -> Table:
        """A rich table: claim, paper, ours with its interval, verdict."""
        from rich.table import Table

        counts = self.verdicts()
        table = Table(
            title=f"claims on {self.model}, {self.images} images per run, {len(self.seeds)} seeds",
            caption=", ".join(f"{counts[verdict]} {verdict}" for verdict in _STYLES if counts[verdict])
            + " · intervals are 95 % over seeds",
            title_style="bold",
            caption_style="dim",
            show_lines=False,
        )
        for name in ("claim", "paper", "T", "setting", "ours", "verdict"):
            table.add_column(name, justify="right" if name == "T" else "left", no_wrap=name in ("T", "verdict"))
        last = ""
        for f in self.findings:
            new = f.claim != last
            if new and last:
                table.add_section()
            last = f.claim
            ours = "–" if f.ours is None else f.ours.interval(".3g")
            table.add_row(
                f"[bold]{f.claim}[/]\n{f.statement} [dim]({f.metric}; against {f.baseline})[/]" if new else "",
                f.paper if new else "",
                "" if f.steps is None else str(f.steps),
                f.setting,
                ours if f.ours is not None else f.why,
                f"[{_STYLES[f.verdict]}]{f.verdict}[/]",
            )
        return table


def run_claims(
    names: Sequence[str],
    *,
    model: Any = "garments-flux",
    steps: Sequence[int] = (28, 50),
    seeds: int | Sequence[int] = 6,
    progress: Callable[[int, int, str], None] = _silent,
) -> Reproduction:
    """Test the claims of methods on one model.

    Args:
        names: methods, or `all`.
        model: a zoo name, a hub id, a local path, a loaded pipeline or a `Subject`.
        steps: numbers of steps to test at.
        seeds: how many, or which; at least two, or there is no interval to judge by.
        progress: told how many of how many experiments are done, and what runs next.
    """
    known = claims.claims()
    chosen: list[str] = []
    for name in names:
        key = name.replace("-", "_")
        if name != "all" and key not in known:
            raise UnknownName.of("method with claims", name, [*known, "all"])
        chosen += [n for n in (known if name == "all" else [key]) if n not in chosen]
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if len(numbers) < 2:
        raise OptionError(f"{len(numbers)} seed gives no confidence interval to judge by; give at least 2")
    if not steps or min(steps) < 2:
        raise OptionError(f"steps={list(steps)} is out of range; each must be at least 2")
    subject = load_subject(model)
    tests = [(claim, total) for name in chosen for claim in known[name] for total in _grids(claim, steps)]
    place = [0]
    lab = Lab(subject, numbers, lambda what: progress(place[0], len(tests), what))
    lab.warm_up(steps[0])
    out = Reproduction(chosen, subject.name, list(steps), numbers, len(subject.prompts))
    for place[0], (claim, total) in enumerate(tests):
        progress(place[0], len(tests), claim.key)
        out.findings += claims.examine(claim, lab, total)
    return out


def _grids(claim: claims.Claim, steps: Sequence[int]) -> Sequence[int]:
    return steps[:1] if claim.once else steps
