"""Estimates with confidence intervals: Student's t over seeds, and the same on logarithms for ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds with its confidence interval; `low` and `high` are None where one seed cannot give one."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __format__(self, spec: str) -> str:
        """The mean and half the width of the interval, as in `27.31 ± 0.42`."""
        spec = spec or ".3g"
        if self.low is None or self.high is None:
            return format(self.mean, spec)
        return f"{format(self.mean, spec)} ± {format((self.high - self.low) / 2, spec.replace('+', ''))}"

    def interval(self, spec: str = ".3g") -> str:
        """The mean and both ends, as in `1.84 [1.71, 1.97]`."""
        if self.low is None or self.high is None:
            return f"{format(self.mean, spec)} (one seed)"
        return f"{format(self.mean, spec)} [{format(self.low, spec)}, {format(self.high, spec)}]"


def mean(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean of independent values with Student's t interval."""
    data = np.asarray(values, dtype=float)
    if data.size == 0:
        raise ValueError("an estimate needs at least one value")
    centre = float(data.mean())
    if data.size == 1:
        return Estimate(centre, None, None, 1)
    half = float(stats.t.ppf(0.5 + level / 2, data.size - 1) * data.std(ddof=1) / math.sqrt(data.size))
    return Estimate(centre, centre - half, centre + half, int(data.size))


def difference(ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean of the paired differences `ours - theirs`."""
    return mean([a - b for a, b in zip(ours, theirs, strict=True)], level)


def ratio(over: Sequence[float], under: Sequence[float], level: float = LEVEL) -> Estimate:
    """Geometric mean of the paired ratios `over / under`; the interval is Student's t on their logarithms."""
    logs = mean([math.log(a / b) for a, b in zip(over, under, strict=True)], level)
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Estimate(math.exp(logs.mean), low, high, logs.n)


def jackknife(whole: Callable[[Sequence[int]], float], n: int, level: float = LEVEL) -> Estimate:
    """A statistic of pooled seeds with an interval from leaving each of the `n` seeds out in turn."""
    value = whole(range(n))
    if n < 3:
        return Estimate(value, None, None, n)
    left = np.array([whole([i for i in range(n) if i != out]) for out in range(n)])
    error = math.sqrt((n - 1) / n * float(((left - left.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * error
    return Estimate(value, value - half, value + half, n)
