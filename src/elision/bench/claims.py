"""Claims: what a paper says of its method, as an experiment whose verdict follows from the numbers.

A claim is a generator of measurements, enrolled by the decorator `claim` in a file of `elision.bench.experiments`:

    @claim("stale/uniform", "Reusing the first output for ever loses to renewing it", paper="a negative control",
           metric="PSNR difference, dB", direction="below", baseline="uniform, same steps computed")
    def stale_loses(lab, steps):
        yield Measured("N = 3", lab.gain(Stale(interval=3), Uniform(interval=3, site="model"), steps))

It holds where the whole confidence interval lies on the claimed side. An interval that contains the bound shows no
difference, and then the claim does not hold here.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from elision.bench.stats import Estimate
from elision.errors import OptionError, UnsupportedTarget
from elision.method import find

Direction = Literal["above", "below", "at most", "equal"]
Verdict = Literal["holds", "does not hold", "not testable here"]


@dataclass(frozen=True)
class Measured:
    """One number of an experiment.

    Attributes:
        setting: what it was measured at, as in "N = 4".
        value: the number; None if it cannot be measured here.
        why: the reason for that, or a remark on the number.
    """

    setting: str
    value: Estimate | None
    why: str = ""


# called with the laboratory of the method's family, and a number of steps (denoise) or a length in tokens (kv)
Measure = Callable[[Any, int], Iterable[Measured]]


@dataclass(frozen=True)
class Claim:
    """One statement about one method, and the experiment that tests it.

    Attributes:
        key: `method/name`.
        statement: what is claimed.
        paper: the published figure, or where the statement comes from.
        metric: what the number is.
        direction: on which side of `bound` the number must lie: "above" and "below" ask it of the whole interval,
            "at most" of the mean, "equal" of the mean within `tolerance` (relative).
        baseline: what the method is compared with.
        measure: the experiment, called with the lab of the method's family and a number of steps, or for methods on
            K/V caches a length in tokens.
        bound: the number without an effect.
        tolerance: for "equal".
        once: whether the number of steps makes no difference.
        model: the zoo model that the experiment is written for; empty for the usual one of the family.
    """

    key: str
    statement: str
    paper: str
    metric: str
    direction: Direction
    baseline: str
    measure: Measure
    bound: float = 0.0
    tolerance: float = 0.0
    once: bool = False
    model: str = ""

    @property
    def method(self) -> str:
        """The method that the claim is about."""
        return self.key.partition("/")[0]

    @property
    def family(self) -> str:
        """The family of that method."""
        return find(self.method).family


@dataclass(frozen=True)
class Finding:
    """The outcome of a claim at one setting."""

    claim: str
    method: str
    statement: str
    paper: str
    metric: str
    direction: str
    baseline: str
    steps: int | None
    setting: str
    ours: Estimate | None
    verdict: Verdict
    why: str
    model: str = ""


def judge(claim: Claim, measured: Measured) -> tuple[Verdict, str]:
    """The verdict on a measurement, and the reason in words."""
    value, bound = measured.value, claim.bound
    if value is None:
        return "not testable here", measured.why or "it could not be measured"
    remark = f"; {measured.why}" if measured.why else ""
    if claim.direction == "equal":
        near = abs(value.mean - bound) <= claim.tolerance * max(abs(bound), 1e-12)
        return ("holds" if near else "does not hold"), f"within {claim.tolerance:.1%} of {bound:g}: {near}{remark}"
    if claim.direction == "at most":
        return ("holds" if value.mean <= bound else "does not hold"), f"at most {bound:g} on average{remark}"
    if value.low is None or value.high is None:
        return "not testable here", f"one seed gives no interval{remark}"
    above = claim.direction == "above"
    if (value.low > bound) if above else (value.high < bound):
        return "holds", f"the interval lies {claim.direction} {bound:g}{remark}"
    if (value.high < bound) if above else (value.low > bound):
        return "does not hold", f"the interval lies on the other side of {bound:g}{remark}"
    return "does not hold", f"the interval contains {bound:g}: no difference is shown{remark}"


def examine(claim: Claim, lab: Any, steps: int, *, stepped: bool = True) -> list[Finding]:
    """Run the experiment of a claim and judge every number it gives; `stepped` if `steps` counts steps of a run."""
    try:
        rows = list(claim.measure(lab, steps))
    except (UnsupportedTarget, OptionError) as error:
        rows = [Measured("", None, str(error))]
    return judged(claim, rows, None if claim.once or not stepped else steps, lab.subject.name)


def judged(claim: Claim, rows: Iterable[Measured], steps: int | None, model: str) -> list[Finding]:
    """The findings of measurements on a model at a number of steps."""
    found: list[Finding] = []
    for row in rows:
        verdict, why = judge(claim, row)
        found.append(
            Finding(
                claim.key,
                claim.method,
                claim.statement,
                claim.paper,
                claim.metric,
                claim.direction,
                claim.baseline,
                steps,
                row.setting,
                row.value,
                verdict,
                why,
                model,
            )
        )
    return found


_registry: dict[str, Claim] = {}


def claim(
    key: str,
    statement: str,
    *,
    paper: str,
    metric: str,
    direction: Direction = "above",
    baseline: str,
    bound: float = 0.0,
    tolerance: float = 0.0,
    once: bool = False,
    model: str | None = None,
) -> Callable[[Measure], Measure]:
    """Enrol the decorated experiment as a claim; the arguments are those of `Claim`.

    Without `model` it is written for the `MODEL` that its file names, if it names one.
    """

    def enrol(measure: Measure) -> Measure:
        if key in _registry and _registry[key].measure.__module__ != measure.__module__:
            raise OptionError(f"claim {key!r} is taken by {_registry[key].measure.__module__}")
        mine = getattr(sys.modules[measure.__module__], "MODEL", "") if model is None else model
        _registry[key] = Claim(
            key, statement, paper, metric, direction, baseline, measure, bound, tolerance, once, mine
        )
        return measure

    return enrol


@functools.cache
def _load() -> None:
    package = importlib.import_module("elision.bench.experiments")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def claims() -> Mapping[str, list[Claim]]:
    """All claims by method."""
    _load()
    found: dict[str, list[Claim]] = {}
    for entry in _registry.values():
        found.setdefault(entry.method, []).append(entry)
    return dict(sorted(found.items()))
