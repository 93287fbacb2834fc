from __future__ import annotations

import dataclasses

import pytest
import torch

import elision
from elision.bench import claims
from elision.bench.dllm import lab as lab_module
from elision.bench.dllm.drift import drifts
from elision.bench.dllm.lab import INTERVALS, UNCACHED, DllmLab
from elision.bench.dllm.measure import Arm, run
from elision.bench.dllm.subject import DllmSubject, Question
from elision.bench.reproduce import run_claims
from elision.dllm.methods.fixed_interval import FixedInterval
from elision.errors import OptionError


@pytest.fixture(scope="module")
def lab(tiny: DllmSubject) -> DllmLab:
    return DllmLab(tiny, [0, 1])


def test_answers_are_judged(tiny: DllmSubject) -> None:
    question = tiny.question("chain", 64, 0)
    tokens, wrong, _ = run(tiny, UNCACHED, question)
    assert wrong.exact == 0
    right = dataclasses.replace(question, answer=tiny.text(question, tokens))
    outcome = run(tiny, UNCACHED, right, truth=tokens)[1]
    assert (outcome.exact, outcome.right, outcome.agree) == (1, 1, 1)
    assert right.answer
    spoiled = dataclasses.replace(question, answer="#" + right.answer[1:])
    near = run(tiny, UNCACHED, spoiled)[1]
    assert near.exact == 0
    assert near.right == pytest.approx(1 - 1 / len(right.answer))


def test_arms(tiny: DllmSubject) -> None:
    question = tiny.question("chain", 64, 0)
    assert "block_length" in Arm.of("dkv_cache").settings(question, tiny)
    assert "block_length" not in Arm.of("elastic_cache_dllm").settings(question, tiny)
    assert "block_length" not in Arm.of("no_cache", window=8).settings(question, tiny)
    arm = Arm.of("dkv_cache:interval=4", per_call=4)
    assert arm.label == "dkv_cache:interval=4 (per_call 4)"
    outcome = run(tiny, arm, question)[1]
    assert outcome.calls == question.gen_length // 4
    with pytest.raises(OptionError, match="family"):
        Arm.of("h2o")


def test_runs_are_remembered(lab: DllmLab, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lab.outcomes(UNCACHED, 64)
    assert len(first) == 6
    monkeypatch.setattr(lab_module, "run", None)
    assert lab.outcomes(UNCACHED, 64) == first
    assert lab.cost(UNCACHED, 64) == 1
    assert lab.outcomes(UNCACHED, 64, ("add",)) == first[2:4]


def test_controls_cost_at_least_as_much(lab: DllmLab) -> None:
    ours, tasks = Arm.of("dkv_cache:interval=4"), ("add",)
    cost = lab.cost(ours, 32, tasks)
    assert cost <= lab.cost(lab.fewer(ours, 32, tasks), 32, tasks) <= cost + 1 / 16 + 1e-9
    clock = lab.clocked(ours, 32, tasks)
    assert isinstance(clock.method, FixedInterval)
    assert lab.cost(clock, 32, tasks) >= cost
    after = INTERVALS[INTERVALS.index(clock.method.interval) + 1]
    assert lab.cost(Arm.of(FixedInterval(interval=after)), 32, tasks) < cost


def test_leads_and_losses_are_paired(lab: DllmLab) -> None:
    ours = Arm.of("dkv_cache")
    versus = lab.versus(ours, UNCACHED, 64, ("add",))
    assert versus.value is not None
    assert versus.value.n == 2
    assert "add" in versus.setting
    assert "100.0% of the token-layers" in versus.why
    loss = lab.loss(ours, 64)
    assert loss.value is not None
    assert loss.value.n == 6


def test_races_are_run_in_turn(lab: DllmLab, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[Arm, str, int]] = []

    def counted(subject: DllmSubject, arm: Arm, question: Question) -> object:
        ran.append((arm, question.task, question.seed))
        return run(subject, arm, question)

    monkeypatch.setattr(lab_module, "run", counted)
    ours = Arm.of("elastic_cache_dllm:eps=0.2")
    mine, other = lab.race([(ours, 32), (UNCACHED, 32)], count=3)
    assert len(mine) == len(other) == 3
    assert [arm for arm, _, _ in ran] == [ours, UNCACHED, UNCACHED, ours, ours, UNCACHED]
    assert [task for _, task, _ in ran] == ["chain", "chain", "add", "add", "recall", "recall"]
    speed = lab.speedup(ours, 32)
    assert speed.value is not None
    assert speed.value.mean > 1  # all 16 tokens in a call or two


def test_drift_is_of_decided_tokens(tiny: DllmSubject, lab: DllmLab) -> None:
    found = drifts(tiny, UNCACHED, tiny.question("chain", 64, 0))
    assert found.decided[0] == pytest.approx(0, abs=1e-5)  # the first layer's rows depend on their own token alone
    assert bool((found.decided[1:] > 1e-4).all())
    assert found.attended.shape == found.each.shape == (3,)
    assert bool(torch.isfinite(torch.stack([found.decided, found.each, found.attended])).all())
    assert len(lab.drifts(64, 2)) == 2


def test_models_without_answers_are_not_judged(tiny: DllmSubject) -> None:
    from elision.bench.dllm.subject import load_dllm

    free = DllmLab(load_dllm(tiny.lm, [torch.tensor([5, 6])]), [0, 1])
    with pytest.raises(OptionError, match="right answer"):
        free.values(UNCACHED, "exact", 32)


def test_every_claim_gives_findings(tiny: DllmSubject) -> None:
    told: list[str] = []
    known = tiny.ask

    def ask(task: str, length: int, seed: int) -> Question:
        return dataclasses.replace(known(task, 32, seed), length=length)  # short ones, so that all of it is quick

    tiny = dataclasses.replace(tiny, ask=ask, tasks=("add", "recall"), _asked={})
    names = [row.name for row in elision.methods("dllm")]
    result = run_claims(names, model=tiny, prompts=2, length=64, progress=lambda done, total, what: told.append(what))
    keys = [claim.key for name in names for claim in claims.claims()[name]]
    assert list(dict.fromkeys(f.claim for f in result.findings)) == keys
    assert result.questions == 2
    assert result.total == 64
    assert result.steps == []
    assert all(f.steps is None for f in result.findings)
    assert {f.verdict for f in result.findings} == {"holds", "does not hold", "not testable here"}
    assert [f.claim for f in result.findings if f.verdict == "not testable here"] == ["dkv_cache/shift"]
    assert all(f.ours is not None and f.ours.low is not None for f in result.findings if f.claim != "dkv_cache/shift")
    assert result.table().row_count == len(result.findings)
    assert any("dkv_cache" in what for what in told)
