from __future__ import annotations

import math

import pytest

from elision.bench.dllm.shares import lead, share

Z2 = 1.959963984540054**2


def test_wilson() -> None:
    found = share([1.0] * 81 + [0.0] * 182)  # 81 of 263: Newcombe 1998, Statistics in Medicine 17, 857, table I
    assert found.mean == pytest.approx(0.3080, abs=1e-4)
    assert found.low == pytest.approx(0.2553, abs=1e-4)
    assert found.high == pytest.approx(0.3662, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_alike_still_has_an_interval(value: float) -> None:
    found = share([value] * 16)
    wide = Z2 / (16 + Z2)
    assert found.mean == value
    assert found.low == pytest.approx((1 - wide) * value)
    assert found.high == pytest.approx(wide + (1 - wide) * value)
    both = lead([value] * 16, [value] * 16)
    assert both.mean == 0
    assert both.low == pytest.approx(-wide)
    assert both.high == pytest.approx(wide)


def test_one_question_gives_no_interval() -> None:
    assert share([1.0]).low is None
    assert lead([1.0], [0.0]).low is None
    with pytest.raises(ValueError, match="at least one"):
        share([])


def test_the_lead_is_antisymmetric_and_narrowed_by_pairing() -> None:
    ours = [1.0] * 30 + [0.0] * 10
    same, shuffled = [1.0] * 26 + [0.0] * 14, [0.0] * 10 + [1.0] * 26 + [0.0] * 4
    one, other = lead(ours, same), lead(same, ours)
    assert one.mean == pytest.approx(0.1)
    assert one.low is not None
    assert one.high is not None
    assert other.low == pytest.approx(-one.high)
    assert other.high == pytest.approx(-one.low)
    apart = lead(ours, shuffled)
    assert apart.low is not None
    assert apart.high is not None
    assert one.high - one.low < apart.high - apart.low


def test_newcombe_by_hand() -> None:
    ours, theirs = [1.0] * 8 + [0.0] * 2, [1.0] * 5 + [0.0] * 5
    p, q = share(ours), share(theirs)
    shared = 5 * 10 - 8 * 5 - 10 / 2
    phi = shared / math.sqrt(8 * 2 * 5 * 5)
    assert p.low is not None
    assert q.high is not None
    a, b = 0.8 - p.low, q.high - 0.5
    assert lead(ours, theirs).low == pytest.approx(0.3 - math.sqrt(a * a - 2 * phi * a * b + b * b))
