"""Composition: what may act together, what may not and why, and that legal pairs really work together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import elision
from elision.denoise.compose import check, conflict
from elision.denoise.methods.bac import BAC
from elision.denoise.methods.easycache import EasyCache
from elision.denoise.methods.ertacache import ERTACache
from elision.denoise.methods.first_block import FirstBlock
from elision.denoise.methods.profilingdit import ProfilingDiT
from elision.denoise.methods.random_skip import RandomSkip
from elision.denoise.methods.regione import RegionE
from elision.denoise.methods.stale import Stale
from elision.denoise.methods.taylorseer import TaylorSeer
from elision.denoise.methods.teacache import TeaCache
from elision.denoise.methods.uniform import Uniform
from elision.denoise.policy import Claims
from elision.denoise.sites import Site
from elision.errors import Conflict, OptionError
from elision.method import Method, create
from tests.conformance.settings import ACTIVE, STEPS, profile_for
from tests.models import Loop, changed, snapshot

quiet = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")

ERTA = ERTACache(reused=(2, 3), phi=0.5, rectify="off")
SKIP_SINGLES = ProfilingDiT(blocks=(2, 3), warmup_steps=2, schedule="uniform", interval=3)
LEGAL: list[list[Method]] = [
    [EasyCache(threshold=0.6, warmup_steps=2), TaylorSeer(interval=3, first_enhance=1)],
    [TaylorSeer(interval=3, first_enhance=1), EasyCache(threshold=0.6, warmup_steps=2)],
    [TeaCache(threshold=0.5, coefficients=(1.0, 0.0)), TaylorSeer(interval=3, first_enhance=1)],
    [RandomSkip(rate=0.4), Uniform(interval=2, site="stack")],
    [EasyCache(threshold=0.6, warmup_steps=2), FirstBlock(threshold=1.5)],
    [Uniform(interval=4, site="stack"), TaylorSeer(interval=6, first_enhance=1)],
    [FirstBlock(threshold=0.5), Uniform(interval=2)],
    [Stale(interval=2), TaylorSeer(interval=3, first_enhance=1, site="head")],
    [SKIP_SINGLES, TaylorSeer(interval=3, first_enhance=1)],
]
ILLEGAL: list[tuple[list[Method], str]] = [
    ([EasyCache(), RandomSkip()], "both decide model"),
    ([EasyCache(), Uniform(site="model")], "both decide model"),
    ([Uniform(), TaylorSeer()], r"both decide .*transformer_blocks\.0\.attn.*more"),
    ([EasyCache(), TeaCache()], "does not tolerate gaps"),
    ([TeaCache(), EasyCache()], "does not tolerate gaps"),
    ([EasyCache(), BAC(schedule="uniform")], "does not tolerate gaps"),
    ([SKIP_SINGLES, BAC(schedule="uniform")], "does not tolerate gaps"),
    ([RegionE(preset="kontext"), EasyCache()], "one skips .*does not tolerate gaps"),
    ([RegionE(preset="kontext"), TeaCache()], "one skips .*does not tolerate gaps"),
    ([RegionE(preset="kontext"), RandomSkip()], "does not tolerate gaps"),
    ([RegionE(preset="kontext"), TaylorSeer()], r"one skips .*kv.* must see every step"),
    ([RegionE(preset="kontext"), TaylorSeer(site="head")], r"one skips .*kv.* must see every step"),
    ([RegionE(preset="kontext"), BAC(schedule="uniform")], "does not tolerate gaps"),
    ([RegionE(preset="kontext"), ERTA], "does not tolerate gaps"),
    ([SKIP_SINGLES, EasyCache()], "does not tolerate gaps"),
    ([Uniform(), BAC(schedule="uniform")], "both decide"),
    ([Uniform(interval=2), Uniform(interval=3)], "twice"),
    ([Uniform(interval=2), Uniform(interval=3, site="stack")], "twice"),
    ([TeaCache(), TeaCache()], "twice"),
]


@quiet
@pytest.mark.parametrize("pair", LEGAL, ids=lambda pair: "+".join(m.name for m in pair))
@pytest.mark.parametrize("mode", ["distilled", "sequential"])
def test_legal_pairs_work_end_to_end(pair: list[Method], mode: str) -> None:
    loop = Loop("flux")
    plain = loop(steps=STEPS, mode=mode)
    before = snapshot(loop.model, loop.scheduler)
    run = elision.apply(loop, pair)
    out = [loop(steps=STEPS, mode=mode) for _ in range(2)]
    run.remove()
    report: Any = run.report()
    assert torch.equal(*out)
    assert torch.isfinite(out[0]).all()
    assert not torch.equal(out[0], plain)
    assert torch.equal(loop(steps=STEPS, mode=mode), plain)
    left = [key for key in changed(before, snapshot(loop.model, loop.scheduler)) if not key.endswith("_step_index")]
    assert left == []
    calls = report.calls // 2
    assert len(report.strip()) == STEPS
    outer, inner = sorted(pair, key=lambda m: ["model", "head", "stack", "run", "branch"].index(level(m)))
    tallies = {m.name: [s.groups.get(m.name) for s in report.last.steps] for m in pair}
    counts = {
        name: [sum(getattr(t, what) for t in rows if t) for what in ("computed", "stood_in")]
        for name, rows in tallies.items()
    }
    assert sum(counts[outer.name]) == report.sites[outer.name] * calls
    # the inner method is reached exactly where the outer one computes; the first block is outside FirstBlock's run
    outside = {"first_block": 3, "profilingdit": 6}.get(outer.name, 0)
    reached = (report.sites[inner.name] - outside) * counts[outer.name][0] + outside * calls
    assert sum(counts[inner.name]) == reached
    assert counts[outer.name][1] > 0
    assert counts[inner.name][1] > 0
    assert report.flops_computed + report.flops_elided == report.calls * flops_of_a_call()


def level(method: Any) -> str:
    """The level a method of these pairs works at."""
    fixed = {"easycache": "model", "random_skip": "model", "stale": "model", "first_block": "run", "teacache": "stack"}
    fixed |= {"profilingdit": "run", "bac": "branch"}
    return fixed.get(method.name) or method.site  # type: ignore[no-any-return]


def flops_of_a_call() -> int:
    loop = Loop("flux")
    with elision.apply(loop, "uniform", site="model", interval=1) as run:
        loop(steps=1)
    return run.report().flops_computed  # type: ignore[attr-defined, no-any-return]


@quiet
def test_order_of_the_list_does_not_matter() -> None:
    loop = Loop("flux")
    outs = []
    for pair in (LEGAL[0], LEGAL[1]):
        with elision.apply(loop, pair):
            outs.append(loop(steps=STEPS))
    assert torch.equal(*outs)


@quiet
def test_one_method_at_its_limit_leaves_the_other_alone() -> None:
    loop = Loop("flux")
    taylor = TaylorSeer(interval=3, first_enhance=1)
    easy = EasyCache(threshold=0.6, warmup_steps=2)
    for alone, pair in (
        (taylor, [EasyCache(threshold=0.0), taylor]),
        (easy, [easy, TaylorSeer(interval=1)]),
    ):
        with elision.apply(loop, alone):
            want = loop(steps=STEPS)
        with elision.apply(loop, pair):
            assert torch.equal(loop(steps=STEPS), want)


@quiet
def test_the_inner_interval_counts_steps_that_it_computed() -> None:
    """TaylorSeer inside a random skip: the gap is to its last computed step, not to a step that never reached it."""
    loop = Loop("flux")
    with elision.apply(loop, [RandomSkip(rate=0.5, seed=5), TaylorSeer(interval=3, first_enhance=1)]) as run:
        loop(steps=16)
    report: Any = run.report()
    last = -99
    for step in report.last.steps:
        inner = step.groups.get("taylorseer")
        reached = step.groups["random_skip"].computed
        assert bool(reached) == bool(inner and inner.computed + inner.stood_in)
        if not reached:
            continue
        assert bool(inner.computed) == (step.n - last >= 3)
        last = step.n if inner.computed else last


@pytest.mark.parametrize(("pair", "why"), ILLEGAL, ids=lambda x: x if isinstance(x, str) else None)
def test_illegal_pairs_are_refused_with_the_reason(pair: list[Method], why: str) -> None:
    loop = Loop("flux")
    before = snapshot(loop.model, loop.scheduler, loop)
    with pytest.raises(Conflict, match=why) as caught:
        elision.apply(loop, pair)
    assert all(method.name in str(caught.value) for method in pair)
    assert changed(before, snapshot(loop.model, loop.scheduler, loop)) == []


def test_names_in_a_list_take_their_defaults_and_no_options() -> None:
    loop = Loop("flux")
    with elision.apply(loop, ["easycache", "taylorseer"]) as run:
        assert [m.name for m in run.methods] == ["easycache", "taylorseer"]
    with pytest.raises(OptionError, match="which method"):
        elision.apply(loop, ["easycache", "taylorseer"], threshold=0.1)


def test_every_pair_of_methods_has_an_answer() -> None:
    """And it does not depend on the order."""
    loop = Loop("flux")
    names = [row.name for row in elision.methods("denoise")]
    profiles = {name: profile_for(loop, name, ACTIVE[name][0]) for name in names}
    for a in (create(name, **ACTIVE[name][0]) for name in names):
        for b in (create(name, **ACTIVE[name][0]) for name in names):
            answers = []
            for pair in ([a, b], [b, a]):
                try:
                    elision.apply(loop, pair, profile=profiles).remove()
                    answers.append(True)
                except Conflict:
                    answers.append(False)
            assert answers[0] == answers[1], (a.name, b.name)
            if a == b:
                assert not answers[0]


# -- the pure function -----------------------------------------------------------------------------------------------

SITES = [
    Site("guided", "guided", ""),
    Site("model", "model", ""),
    Site("head", "head", "out", blocks=("b.0", "b.1")),
    Site("stack", "stack", "b.1", blocks=("b.0", "b.1")),
    Site("run", "run", "b.1", blocks=("b.1",)),
    Site("b.0.attn", "branch", "b.0.attn"),
    Site("b.0.ff", "branch", "b.0.ff"),
    Site("b.1.attn", "branch", "b.1.attn"),
    Site("b.10.attn", "branch", "b.10.attn"),
    Site("b.0.kv", "kv", "b.0.attn"),
]
BY_KEY = {site.key: site for site in SITES}
claims = st.builds(
    Claims,
    decides=st.frozensets(st.sampled_from(SITES), max_size=3),
    controls=st.frozensets(st.sampled_from(["dt", "time", "tokens"]), max_size=2),
    needs_every_step=st.booleans(),
    tolerates_gaps=st.booleans(),
)


@given(a=claims, b=claims)
def test_conflict_is_symmetric_and_as_written(a: Claims, b: Claims) -> None:
    inside = {"run", "b.0.attn", "b.0.ff", "b.1.attn", "b.0.kv"}
    nested = {(outer, s.key) for s in SITES[1:] for outer in ("guided", "model")}
    nested |= {("head", key) for key in inside | {"head", "stack"}} | {("stack", key) for key in inside | {"stack"}}
    nested |= {("run", "b.1.attn"), ("b.0.attn", "b.0.kv")} | {(s.key, s.key) for s in SITES}

    def hides(outer: Claims, inner: Claims) -> bool:
        return any((o.key, i.key) in nested for o in outer.decides for i in inner.decides)

    want = bool(a.decides & b.decides) or bool(a.controls & b.controls)
    for outer, inner in ((a, b), (b, a)):
        want |= hides(outer, inner) and (inner.needs_every_step or not inner.tolerates_gaps)
        want |= "tokens" in outer.controls and any(s.level not in ("guided", "model") for s in inner.decides)
    assert bool(conflict(a, b)) == want
    assert bool(conflict(b, a)) == want


def test_block_one_does_not_contain_block_ten() -> None:
    run, attn, other = BY_KEY["run"], BY_KEY["b.1.attn"], BY_KEY["b.10.attn"]
    assert run.contains(attn)
    assert not run.contains(other)
    assert conflict(Claims(frozenset([run])), Claims(frozenset([other]))) is None
    assert conflict(Claims(frozenset([run])), Claims(frozenset([attn])))


def test_check_names_the_pair() -> None:
    one = Claims(frozenset([BY_KEY["model"]]))
    with pytest.raises(Conflict, match="x and z cannot be applied together: both decide model"):
        check([("x", one), ("y", Claims(frozenset())), ("z", one)])
    with pytest.raises(Conflict, match="both hold dt"):
        check([("x", Claims(frozenset(), frozenset({"dt"}))), ("y", Claims(frozenset(), frozenset({"dt", "time"})))])
    inner = frozenset([BY_KEY["b.0.attn"]])
    with pytest.raises(Conflict, match="must see every step"):
        check([("x", one), ("y", Claims(inner, needs_every_step=True, tolerates_gaps=True))])


# -- two denoisers ---------------------------------------------------------------------------------------------------


class Experts(Loop):
    """Wan 2.2: `transformer` for the noisy steps, `transformer_2` for the rest, one scheduler."""

    def __init__(self, handover: int) -> None:
        super().__init__("wan")
        self.transformer: torch.nn.Module
        self.transformer_2 = Loop("wan", seed=1).model
        self.handover = handover
        self.n = 0

    @property
    def model(self) -> torch.nn.Module:
        return self.transformer if self.n < self.handover else self.transformer_2

    def sample(self, steps: int = STEPS, **how: Any) -> torch.Tensor:
        """A run that hands over."""
        return self(steps=steps, each=lambda n: setattr(self, "n", n), **how)


@quiet
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("uniform", {"interval": 2}),
        ("taylorseer", {"interval": 3, "first_enhance": 1}),
        ("easycache", {"threshold": 1e9, "warmup_steps": 1}),
        ("first_block", {"threshold": 1.5}),
    ],
)
def test_two_denoisers_in_one_pipeline(method: str, options: dict[str, Any]) -> None:
    loop = Experts(3)
    plain = loop.sample(mode="sequential")
    before = snapshot(loop.transformer, loop.transformer_2, loop.scheduler)
    run = elision.apply(loop, method, **options)
    outs = [loop.sample(mode="sequential") for _ in range(2)]
    run.remove()
    report: Any = run.report()
    assert torch.equal(*outs)
    assert report.run_count == 2
    assert report.calls == 4 * STEPS
    states = report.last.states()
    assert len(states) == STEPS
    assert states[0] == states[3] == "computed"  # the second denoiser has nothing to stand in with at first
    assert any(s != "computed" for s in states[:3])
    assert any(s != "computed" for s in states[3:])
    assert [s.n for s in report.last.steps] == list(range(STEPS))
    assert torch.equal(loop.sample(mode="sequential"), plain)
    after = snapshot(loop.transformer, loop.transformer_2, loop.scheduler)
    assert [key for key in changed(before, after) if not key.endswith("_step_index")] == []


def test_both_denoisers_at_their_limit_are_exact() -> None:
    loop = Experts(3)
    plain = loop.sample()
    with pytest.warns(elision.ElisionWarning), elision.apply(loop, "taylorseer", interval=1):
        assert torch.equal(loop.sample(), plain)


def test_a_missing_second_denoiser_is_no_denoiser() -> None:
    loop = Loop("wan")
    loop.transformer_2 = None  # type: ignore[attr-defined]
    with elision.apply(loop, "uniform", interval=2) as run:
        loop(steps=4)
    assert run.report().strip() == "CrCr"  # type: ignore[attr-defined]
