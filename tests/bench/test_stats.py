from __future__ import annotations

import math

import pytest

from elision.bench import stats


def test_mean_is_students_interval() -> None:
    found = stats.mean([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2) times 1 / sqrt(3)
    assert (found.mean, found.low, found.high, found.n) == (
        2.0,
        pytest.approx(2 - half),
        pytest.approx(2 + half),
        3,
    )


def test_one_value_has_no_interval() -> None:
    found = stats.mean([4.0])
    assert (found.mean, found.low, found.high) == (4.0, None, None)
    assert f"{found:.1f}" == "4.0"
    assert found.interval(".1f") == "4.0 (one seed)"


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        stats.mean([])


def test_difference_is_paired() -> None:
    found = stats.difference([10.0, 20.0, 30.0], [9.0, 19.0, 29.0])
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)


def test_difference_needs_pairs() -> None:
    with pytest.raises(ValueError, match=r"zip|shorter|longer"):
        stats.difference([1.0, 2.0], [1.0])


def test_ratio_is_geometric() -> None:
    found = stats.ratio([2.0, 8.0], [1.0, 1.0])
    assert found.mean == pytest.approx(4.0)
    assert found.low is not None
    assert found.high is not None
    assert found.low * found.high == pytest.approx(16.0)  # symmetric on the logarithm


def test_jackknife_of_a_mean_is_students_interval() -> None:
    data = [1.0, 4.0, 2.0, 8.0]
    jack = stats.jackknife(lambda rows: sum(data[i] for i in rows) / len(rows), len(data))
    plain = stats.mean(data)
    assert (jack.mean, jack.low, jack.high) == pytest.approx((plain.mean, plain.low, plain.high))


def test_text_has_mean_and_half_width() -> None:
    assert f"{stats.Estimate(2.0, 1.5, 2.5, 4):.1f}" == "2.0 ± 0.5"
    assert f"{stats.Estimate(2.0, 1.5, 2.5, 4):+.1f}" == "+2.0 ± 0.5"
