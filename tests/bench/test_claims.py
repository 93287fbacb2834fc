from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import elision
from elision.bench import claims
from elision.bench.claims import Claim, Direction, Measured, examine, judge
from elision.bench.experiments.easycache import variation
from elision.bench.lab import Lab, random_steps
from elision.bench.listed import Listed, spread
from elision.bench.reproduce import POLICIES, Reproduction, run_claims
from elision.bench.stats import Estimate
from elision.bench.subject import Subject
from elision.denoise.methods.easycache import EasyCache
from elision.denoise.methods.taylorseer import TaylorSeer
from elision.denoise.methods.uniform import Uniform
from elision.errors import OptionError, UnknownName, UnsupportedTarget


def _claim(direction: Direction, bound: float = 0.0, tolerance: float = 0.0) -> Claim:
    return Claim("a/b", "s", "p", "m", direction, "x", lambda lab, steps: (), bound, tolerance)


@pytest.mark.parametrize(
    ("direction", "bound", "value", "verdict"),
    [
        ("above", 0.0, Estimate(2, 1, 3, 5), "holds"),
        ("above", 0.0, Estimate(2, -1, 5, 5), "does not hold"),
        ("above", 0.0, Estimate(-2, -3, -1, 5), "does not hold"),
        ("above", 0.5, Estimate(0.6, 0.4, 0.8, 5), "does not hold"),
        ("above", 0.0, Estimate(2, None, None, 1), "not testable here"),
        ("above", 0.0, Estimate(0, 0, 0, 5), "does not hold"),
        ("below", 1.0, Estimate(0.5, 0.2, 0.8, 5), "holds"),
        ("below", 1.0, Estimate(0.5, 0.2, 1.1, 5), "does not hold"),
        ("below", 0.0, Estimate(2, 1, 3, 5), "does not hold"),
        ("at most", 0.0, Estimate(0, -1, 1, 5), "holds"),
        ("at most", 0.0, Estimate(0.1, -1, 1, 5), "does not hold"),
        ("above", 0.0, None, "not testable here"),
    ],
)
def test_verdicts(direction: Direction, bound: float, value: Estimate | None, verdict: str) -> None:
    assert judge(_claim(direction, bound), Measured("", value))[0] == verdict


def test_equal_has_a_relative_tolerance() -> None:
    claim = _claim("equal", 2.77, 0.01)
    assert judge(claim, Measured("", Estimate(2.78, None, None, 1)))[0] == "holds"
    assert judge(claim, Measured("", Estimate(2.9, None, None, 1)))[0] == "does not hold"


def test_reasons_tell_which_side() -> None:
    assert "contains 0" in judge(_claim("above"), Measured("", Estimate(2, -1, 5, 5)))[1]
    assert "other side" in judge(_claim("above"), Measured("", Estimate(-2, -3, -1, 5)))[1]
    assert judge(_claim("above"), Measured("", None, "no GPU"))[1] == "no GPU"


def test_an_experiment_that_the_model_does_not_support_is_not_testable(subject: Subject) -> None:
    def measure(lab: Lab, steps: int) -> Iterator[Measured]:
        raise UnsupportedTarget("no such site")
        yield Measured("", None)

    found = examine(dataclasses.replace(_claim("above"), measure=measure), Lab(subject, [0]), 4)
    assert [(f.verdict, f.why) for f in found] == [("not testable here", "no such site")]


def test_every_method_has_a_claim_and_every_claim_a_method() -> None:
    assert set(claims.claims()) == {row.name for row in elision.methods()}
    for mine in claims.claims().values():
        for claim in mine:
            assert claim.statement
            assert claim.paper
            assert claim.baseline


def test_a_taken_key_is_refused() -> None:
    def measure(lab: Lab, steps: int) -> Iterator[Measured]:
        yield Measured("", None)

    assert "stale" in claims.claims()  # loads them all
    with pytest.raises(OptionError, match="taken"):
        claims.claim("stale/uniform", "s", paper="p", metric="m", baseline="b")(measure)


@pytest.mark.parametrize(("count", "total"), [(1, 10), (3, 10), (10, 10), (7, 28)])
def test_spread_is_even(count: int, total: int) -> None:
    steps = spread(count, total)
    gaps = {b - a for a, b in zip(steps, (*steps[1:], total), strict=True)}
    assert len(steps) == count
    assert steps[0] == 0
    assert max(gaps) - min(gaps) <= 1


def test_spread_refuses_what_does_not_fit() -> None:
    with pytest.raises(OptionError):
        spread(0, 5)
    with pytest.raises(OptionError):
        spread(6, 5)


def test_random_steps_begin_with_the_first() -> None:
    steps = random_steps(4, 20, 7)
    assert steps[0] == 0
    assert len(set(steps)) == 4
    assert steps != random_steps(4, 20, 8)


def test_listed_equals_uniform_on_its_steps(subject: Subject) -> None:
    lab = Lab(subject, [0])
    listed = lab.run(Listed((0, 3, 6, 9)), 10, 0)[0]
    assert torch.equal(listed, lab.run(Uniform(interval=3, site="model"), 10, 0)[0])


def test_listed_residual_on_easycaches_steps_is_easycache(subject: Subject) -> None:
    lab = Lab(subject, [0])
    method = EasyCache(threshold=0.3, warmup_steps=3)
    computed = lab.computed(method, 10)[0]
    assert 3 < len(computed) < 10
    assert torch.equal(lab.run(Listed(computed), 10, 0)[0], lab.run(method, 10, 0)[0])
    assert not torch.equal(lab.run(Listed(computed, "output"), 10, 0)[0], lab.run(method, 10, 0)[0])


def test_listed_needs_its_first_step() -> None:
    with pytest.raises(OptionError, match="step 0"):
        Listed((1, 2))


def test_lab_remembers_and_pairs(subject: Subject) -> None:
    told: list[str] = []
    lab = Lab(subject, [3, 4], told.append)
    method = TaylorSeer(interval=3)
    first = lab.psnr(method, 10)
    runs = len(told)
    assert lab.psnr(method, 10) == first
    assert len(told) == runs
    assert lab.counts(method, 10) == [5, 5]
    assert lab.gain(method, method, 10).mean == 0
    assert all(n >= 5 for n in lab.equal_flops(method, 10))


def test_variation() -> None:
    assert variation([2.0, 2.0]) == 0
    assert variation([1.0, 3.0]) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def reproduction(subject: Subject) -> Reproduction:
    return run_claims(["all"], model=subject, steps=[12], seeds=2)


def test_all_claims_run_and_each_finding_is_judged(reproduction: Reproduction) -> None:
    known = [c for mine in claims.claims().values() for c in mine if c.family == "denoise" and c.model not in POLICIES]
    assert {f.claim for f in reproduction.findings} == {c.key for c in known}
    assert set(reproduction.verdicts()) <= {"holds", "does not hold", "not testable here"}
    by_claim = {f.claim: f for f in reproduction.findings}
    assert by_claim["taylorseer/published-models"].verdict == "not testable here"
    assert by_claim["stale/uniform"].ours is not None
    assert all(f.why for f in reproduction.findings)


def test_published_step_counts_hold_exactly(reproduction: Reproduction) -> None:
    ratios = {f.claim: f for f in reproduction.findings if f.claim.startswith("taylorseer/ratio")}
    full = {3: 18, 4: 14, 5: 11}
    for interval, count in full.items():
        found = ratios[f"taylorseer/ratio-{interval}"]
        assert found.ours is not None
        assert found.ours.mean == pytest.approx(50 / count)
        assert found.verdict == "holds"


def test_reproduction_table_and_file(reproduction: Reproduction, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from elision.bench import results

    assert reproduction.table().row_count == len(reproduction.findings)
    head, records = results.read(reproduction.save(tmp_path / "r.jsonl"))
    assert head["what"] == "reproduce"
    assert [r["claim"] for r in records] == [f.claim for f in reproduction.findings]


def test_bad_requests(subject: Subject) -> None:
    with pytest.raises(UnknownName, match="taylorseer"):
        run_claims(["tailorseer"], model=subject)
    with pytest.raises(OptionError, match="at least 2"):
        run_claims(["stale"], model=subject, seeds=1)
    with pytest.raises(OptionError, match="at least 2"):
        run_claims(["stale"], model=subject, steps=[1])
