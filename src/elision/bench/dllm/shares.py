"""Intervals of shares of right answers, which stay honest where all answers are right or all are wrong.

Student's t on zeros and ones gives an interval of no width there. Wilson's interval does not, and Newcombe's combines
two of them into one for the difference of paired shares (R. G. Newcombe, Statistics in Medicine 17, 1998, method 10).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats as distributions

from elision.bench.stats import LEVEL, Estimate


def share(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Share of ones among zeros and ones, with Wilson's interval."""
    n = len(values)
    if n == 0:
        raise ValueError("an estimate needs at least one value")
    p = sum(values) / n
    if n == 1:
        return Estimate(p, None, None, 1)
    z2 = _z(level) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Estimate(p, min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p), n)


def lead(ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL) -> Estimate:
    """Difference of two shares, paired by question, with Newcombe's interval."""
    one, two = share(ours, level), share(theirs, level)
    d = one.mean - two.mean
    if one.low is None or one.high is None or two.low is None or two.high is None:
        return Estimate(d, None, None, one.n)
    phi = _phi(ours, theirs)
    down = (one.mean - one.low, two.high - two.mean)
    up = (one.high - one.mean, two.mean - two.low)
    low, high = (
        math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))  # correlated answers narrow it
        for a, b in (down, up)
    )
    return Estimate(d, d - low, d + high, one.n)


def _z(level: float) -> float:
    return float(distributions.norm.ppf(0.5 + level / 2))


def _phi(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Correlation of the pairs, corrected for continuity where it is positive; 0 where one side never varies."""
    both = sum(a * b for a, b in zip(ours, theirs, strict=True))
    n, a, b = len(ours), sum(ours), sum(theirs)
    spread = a * (n - a) * b * (n - b)
    if spread == 0:
        return 0.0
    shared = both * n - a * b
    return (max(shared - n / 2, 0.0) if shared > 0 else shared) / math.sqrt(spread)
