from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from elision.bench import reproduce
from elision.bench.experiments.bac import Even
from elision.bench.experiments.bac_policy import _Schedules
from elision.bench.policy import subject as subjects
from elision.bench.policy.lab import HELD_OUT, PolicyLab
from elision.bench.policy.measure import Way
from elision.bench.policy.subject import PolicySubject, is_policy, load_policy
from elision.bench.reproduce import run_claims
from elision.denoise.methods.bac import BAC
from elision.denoise.methods.uniform import Uniform
from elision.errors import MissingDependency, OptionError, UnsupportedTarget
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


def test_claims_on_a_policy(subject: PolicySubject, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_claims(["bac"], model=subject, episodes=3)
    assert found.model == "random-policy"
    assert found.episodes == 3
    assert found.denoising == 10
    assert found.images == 0
    by_claim = {f.claim: f for f in found.findings}
    assert len(by_claim) == 10
    assert all(key.startswith("bac/policy-") for key in by_claim)
    assert {f.setting.split(",")[0] for f in found.findings} == {"M = 3", "M = 5"}  # M = 10 is all steps here
    assert all(f.ours is not None for f in found.findings)
    assert "times fewer operations" in by_claim["bac/policy-speed"].why
    assert by_claim["bac/policy-lossless"].ours.n == 6  # type: ignore[union-attr]


def test_claims_belong_to_models(subject: PolicySubject) -> None:
    with pytest.raises(OptionError, match="policies"):
        run_claims(["uniform"], model=subject)
    with pytest.raises(OptionError, match="episode"):
        run_claims(["bac"], model=subject, episodes=1)


def test_without_metaworld_the_claims_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects.importlib.util, "find_spec", lambda name: None if name == "mujoco" else object())
    monkeypatch.setattr(reproduce, "_denoise", lambda *a: "none")
    found = run_claims(["bac"])
    assert found.model == "none, metaworld-policy"
    assert {f.verdict for f in found.findings} == {"not testable here"}
    assert all("pip install 'elision[policy]'" in f.why for f in found.findings)
    with pytest.raises(MissingDependency, match=r"elision\[policy\]"):
        load_policy("metaworld-policy")


def test_what_is_a_policy(subject: PolicySubject, tmp_path: object) -> None:
    assert is_policy("metaworld-policy")
    assert is_policy(subject)
    assert is_policy(small_pipeline())
    assert not is_policy("garments-flux")
    assert not is_policy(np)
    with pytest.raises(UnsupportedTarget, match="no policy"):
        load_policy("garments-flux")
