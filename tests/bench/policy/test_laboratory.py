from __future__ import annotations

import math

import pytest
import torch

from elision import zoo
from elision.bench import claims
from elision.bench.experiments.bac import Even
from elision.bench.experiments.bac_policy import _Schedules
from elision.bench.policy.laboratory import HELD_OUT, PolicyLab
from elision.bench.policy.measure import Way
from elision.bench.policy.subject import PolicySubject, load_policy
from elision.bench.reproduce import run_claims
from elision.bench.subject import Subject, load_subject
from elision.denoise.methods.bac import BAC
from elision.denoise.methods.uniform import Uniform
from elision.errors import MissingDependency, OptionError, UnknownName, UnsupportedTarget
from elision.zoo import metaworld
from elision.zoo.metaworld import TASKS
from tests.bench.policy.conftest import small_pipeline


@pytest.fixture
def lab(subject: PolicySubject) -> PolicyLab:
    return PolicyLab(subject, range(4))


def test_an_episode_does_not_depend_on_its_company(subject: PolicySubject) -> None:
    """Noise is a row's own, so that arms are paired although episodes end at different times."""
    alone = [e for seed in range(5) for e in subject.episodes(10, TASKS[0], [seed])]
    assert subject.episodes(10, TASKS[0], range(5)) == alone
    assert len({e.steps for e in alone}) > 1


def test_runs_are_remembered_and_requests_are_the_uncached_policys(lab: PolicyLab) -> None:
    told: list[str] = []
    lab.told = told.append
    plain = lab.episodes(lab.plain)
    assert lab.episodes(lab.plain) == plain
    assert told == [f"ddpm:steps=10, {task}" for task in TASKS[:2]]
    assert len(lab._requests) == sum(e.chunks for e in plain)
    assert {r.task for r in lab.requests} == set(TASKS[:2])
    assert lab.errors(lab.plain) == [0.0] * len(lab.requests)
    assert min(lab.spread()) > 0


def test_profiles_come_from_one_held_out_observation_of_every_task(lab: PolicyLab) -> None:
    way = Way(10, BAC(num_caches=3))
    profile = lab.profile(way)
    assert profile is not None
    assert profile.facts["samples"] == 2
    assert profile.facts["steps"] == 10
    assert lab.profile(way) is profile
    assert lab.profile(lab.plain) is None
    assert HELD_OUT not in lab.seeds


def test_costs(lab: PolicyLab) -> None:
    half = Way(10, Uniform(interval=2))
    plain, cost = lab.cost(lab.plain), lab.cost(half)
    assert plain.per_chunk == pytest.approx(lab.whole)
    assert plain.share == 1
    assert cost.share is not None
    assert 0.5 < cost.share < 0.75  # what is no branch runs at every step
    assert lab.equal_steps(half) == math.ceil(cost.share * 10)
    assert lab.fewer(half).label == f"ddim:steps={lab.equal_steps(half)}"
    assert lab.equal_steps(lab.plain) == 10


def test_even_schedules_make_as_many_calls(lab: PolicyLab) -> None:
    s = _Schedules(lab, 3, 10)
    ours, even = lab.played(s.way(s.ours), TASKS[0])[1], lab.played(s.even(), TASKS[0])[1]
    assert isinstance(s.even().method, Even)
    assert s.even().method.calls == s.calls(s.ours)  # type: ignore[union-attr]
    assert ours.bytes_peak == even.bytes_peak
    assert s.calls(s.more()) >= s.calls(s.ours) > s.calls(s.alone) == 3 * 6


def test_ddim_is_put_back(subject: PolicySubject) -> None:
    own = subject.pipe.scheduler
    with pytest.raises(RuntimeError, match="boom"), subject.sampler("ddim"):  # noqa: PT012
        assert type(subject.pipe.scheduler).__name__ == "DDIMScheduler"
        assert torch.equal(subject.pipe.scheduler.alphas_cumprod, own.alphas_cumprod)
        raise RuntimeError("boom")
    assert subject.pipe.scheduler is own


def test_claims_on_a_policy(subject: PolicySubject) -> None:
    found = run_claims(["bac"], model=subject.subject(), episodes=3, steps=[4])
    assert found.model == "random-policy"
    assert found.episodes == 3
    assert found.steps == [10]  # a policy has steps of its own
    assert found.seeds == []
    assert "3 episodes per task" in found.table().title  # type: ignore[operator]
    by_claim = {f.claim: f for f in found.findings}
    assert len(by_claim) == 10
    assert all(key.startswith("bac/policy-") for key in by_claim)
    assert {f.setting.split(",")[0] for f in found.findings} == {"M = 3", "M = 5"}  # M = 10 is all steps here
    assert all(f.ours is not None for f in found.findings)
    assert "times fewer operations" in by_claim["bac/policy-speed"].why
    assert by_claim["bac/policy-lossless"].ours.n == 6  # type: ignore[union-attr]


def test_claims_belong_to_models(subject: PolicySubject) -> None:
    with pytest.raises(OptionError, match="policies"):
        run_claims(["uniform"], model=subject.subject())
    with pytest.raises(OptionError, match="episode"):
        run_claims(["bac"], model=subject.subject(), episodes=1)


def test_without_metaworld_the_claims_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingDependency("mujoco not installed: pip install 'elision[policy]'")

    monkeypatch.setattr(metaworld, "needed", missing)
    monkeypatch.setattr(zoo, "load", lambda name, folder=None: small_pipeline())
    known = [claim for claim in claims.claims()["bac"] if claim.model]
    monkeypatch.setattr(claims, "claims", lambda: {"bac": known})
    found = run_claims(["bac"])
    assert found.model == "metaworld-policy"
    assert len(found.findings) == 10
    assert {f.verdict for f in found.findings} == {"not testable here"}
    assert all("pip install 'elision[policy]'" in f.why for f in found.findings)
    assert {f.model for f in found.findings} == {"metaworld-policy"}
    with pytest.raises(MissingDependency, match=r"elision\[policy\]"):
        run_claims(["bac"], model="metaworld-policy")


def test_what_is_a_policy(subject: PolicySubject) -> None:
    assert load_policy(subject) == load_policy(subject.subject())
    assert load_policy(subject, TASKS[:1]).tasks == [TASKS[0]]
    with pytest.raises(UnknownName, match="door-open"):
        load_policy(subject, ["door-opn-v3"])
    with pytest.raises(UnsupportedTarget, match="no policy"):
        load_policy(Subject("images", object(), ["a fox"]))


def test_the_zoos_policy_is_a_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metaworld, "needed", lambda: None)
    monkeypatch.setattr(zoo, "load", lambda name, folder=None: small_pipeline())
    found = load_subject("metaworld-policy", prompts=[TASKS[2]])
    assert (found.kind, found.steps, found.grids, found.prompts) == ("policy", 100, (100,), [TASKS[2]])
    assert load_policy("metaworld-policy").tasks == list(TASKS)
    assert load_subject(small_pipeline()).kind == "policy"
    with pytest.raises(UnknownName, match="push"):
        load_subject("metaworld-policy", prompts=["a fox"])
