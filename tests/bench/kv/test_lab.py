"""The laboratory of KV claims, and all claims on a random model: verdicts mean nothing there, but all must come."""

from __future__ import annotations

import pytest
import torch

from elision.bench import claims
from elision.bench.kv.lab import KVLab, method
from elision.bench.kv.subject import LanguageSubject
from elision.bench.reproduce import run_claims
from elision.errors import OptionError

LENGTH = 224


@pytest.fixture(scope="module")
def lab(tiny: LanguageSubject) -> KVLab:
    return KVLab(tiny, [0, 1, 2])


def test_what_was_tried_is_remembered(lab: KVLab) -> None:
    told: list[str] = []
    lab.told = told.append
    snap = method("snapkv:budget=64")
    first = lab.values(snap, "nll", "passkey", LENGTH)
    runs = len(told)
    assert lab.values(snap, "nll", "passkey", LENGTH) == first
    assert len(told) == runs > 0
    assert [o.seed for o in lab.outcomes(snap, "passkey", LENGTH)] == [0, 1, 2]


def test_a_lead_is_positive_where_ours_is_better(lab: KVLab) -> None:
    snap = method("snapkv:budget=48")
    assert lab.lead(snap, snap, "nll", "passkey", LENGTH).mean == 0
    mine, full = (lab.values(m, "kl", "passkey", LENGTH) for m in (snap, None))
    assert lab.lead(snap, None, "kl", "passkey", LENGTH).mean == pytest.approx(-sum(mine) / 3 + sum(full) / 3)
    assert lab.lead(snap, None, "kl", "passkey", LENGTH).mean < 0
    right = [lab.values(m, "exact", "passkey", LENGTH) for m in (snap, None)]
    assert lab.lead(snap, None, "exact", "passkey", LENGTH).mean == pytest.approx(sum(right[0]) / 3 - sum(right[1]) / 3)


def test_shares_are_of_a_16_bit_cache(lab: KVLab, tiny: LanguageSubject) -> None:
    """By hand, for a model in float32: what is not packed counts half."""
    packing, evicting = method("mikv"), method("snapkv:budget=64")
    assert lab.share(evicting, "passkey", LENGTH) == pytest.approx(64 / LENGTH, rel=0.15)
    outcome = lab.outcomes(packing, "passkey", LENGTH)[0]
    assert outcome.exact_share == pytest.approx(0.2, abs=0.01)
    exact = outcome.exact_share * outcome.bytes_full
    want = (outcome.bytes_held - exact + exact / 2) / (outcome.bytes_full / 2)
    assert lab.share(packing, "passkey", LENGTH) == pytest.approx(want, rel=0.02)


def test_few_recordings_are_kept(lab: KVLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elision.bench.kv.lab._REMEMBERED", 1000)
    for task in ("passkey", "lines", "continuation"):
        lab.truths(task, LENGTH)
    assert list(lab._truths) == [("continuation", LENGTH)]
    assert lab.full("passkey", LENGTH)  # outcomes stay


def test_recall_of_everything_is_one_and_of_chance_is_the_budget(lab: KVLab) -> None:
    everything = lab.recall(method("snapkv:budget=1024"), "continuation", LENGTH, 32)
    assert everything == pytest.approx([1.0] * 3)
    by_chance = lab.recall(method("random:budget=112"), "continuation", LENGTH, 112)
    assert all(0.3 < value < 0.7 for value in by_chance)


def test_recall_of_the_oracle_itself(lab: KVLab, tiny: LanguageSubject) -> None:
    """The oracle is the attention of the answer's queries: by hand for one layer."""
    truth = lab.truths("continuation", LENGTH)[0]
    best = lab._oracle(truth, 16)[1]
    tiny.model.set_attn_implementation("eager")
    try:
        ids = torch.cat([truth.recording.ids, truth.answers[0]], 1)
        with torch.no_grad():
            weights = tiny.model(ids, output_attentions=True).attentions[1]
    finally:
        tiny.model.set_attn_implementation("sdpa")
    sums = weights[:, :, LENGTH:, :LENGTH].sum(2)
    grouped = sums.view(len(ids), 2, -1, LENGTH).mean(2)
    assert torch.equal(best.sort(-1).values, grouped.topk(16).indices.sort(-1).values)


def test_a_task_without_right_answers_has_no_share_of_them(lab: KVLab) -> None:
    with pytest.raises(OptionError, match="no right answer"):
        lab.values(None, "exact", "continuation", LENGTH)


def test_claims_of_one_method_run(tiny: LanguageSubject) -> None:
    found = run_claims(["uniform_rtn"], model=tiny, prompts=2, length=LENGTH)
    assert {f.claim for f in found.findings} == {"uniform_rtn/bits"}
    assert found.model == "random-llama"
    assert "2 prompts of 224 tokens" in str(found.table().title)


@pytest.mark.slow
def test_all_claims_run_and_each_finding_is_judged(tiny: LanguageSubject) -> None:
    found = run_claims(["all"], model=tiny, prompts=2, length=LENGTH)
    known = [c for mine in claims.claims().values() for c in mine if c.family == "kv"]
    assert {f.claim for f in found.findings} == {c.key for c in known}
    assert all(f.steps is None and f.why for f in found.findings)
    unmeasured = [(f.claim, f.why) for f in found.findings if f.ours is None]
    assert not unmeasured
    assert "2 prompts of 224 tokens" in str(found.table().title)


def test_one_model_serves_one_family(tiny: LanguageSubject) -> None:
    with pytest.raises(OptionError, match="one model cannot serve"):
        run_claims(["h2o", "uniform"], model="some/model")
    with pytest.raises(OptionError, match="none of uniform"):
        run_claims(["uniform"], model=tiny)
    with pytest.raises(OptionError, match="1 prompt gives"):
        run_claims(["h2o"], model=tiny, prompts=1)
