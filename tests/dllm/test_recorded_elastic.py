"""Elastic-Cache against trajectories on which two independent implementations of the paper agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision.dllm import drift
from elision.dllm.decode import Step
from elision.dllm.methods import elastic_cache_dllm
from elision.dllm.methods.elastic_cache_dllm import ElasticCache
from elision.dllm.passes import Net
from tests.dllm.support import names, recorded, recorded_lm

SLUG = "elastic-cache-dllm"
L = 5
pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


@pytest.mark.parametrize("sync", ["layer", "step"])
@pytest.mark.parametrize("name", names(SLUG))
def test_recorded(name: str, sync: str) -> None:
    case = recorded(SLUG)[name]
    o = case.options
    lm = recorded_lm(SLUG, o["weights"])
    method = ElasticCache(
        gamma=o["gamma"],
        beta=o["beta"],
        eps=o["eps"],
        track=o.get("track", 1),
        force_full=o.get("force_full", False),
        sync=sync,
    )
    seen: list[Tensor] = []
    committed: list[Tensor] = []
    window: list[Tensor] = []

    def on_step(step: Step, logits: Tensor, net: Net) -> None:
        seen.append(step.ids[0])
        window.append(step.eligible[0].long())
        if f"logits_{step.n}" in case:
            assert torch.allclose(logits[0], case[f"logits_{step.n}"], atol=2e-4)
        if step.n:
            committed.append(step.committed[0].long())
        if f"h_{step.n}" in case:
            check_slots(case, step.n, net)

    with elision.apply(lm, method) as run:
        out = run.generate(case["prompt"], gen_length=o["gen"], on_step=on_step)
    report = run.report()
    last = report.last
    assert last is not None
    facts = last.facts
    assert torch.equal(torch.stack([*seen, out[0]]), case["tokens"])
    assert torch.equal(torch.stack(window), case["window"])
    assert torch.equal(torch.stack(committed), case["committed"][:-1])
    assert torch.equal(facts["lstar"], case["lstar"])
    if not method.force_full:
        assert torch.equal(last.query[1:, 0].long(), case["query_set"][1:])
    check_tracked(facts["tracked"][:, :, 0], case["tracked"])
    if sync == "layer":
        assert torch.allclose(facts["sigma"][:, 0], case["sigma"], atol=1e-4)
        rows = [int(row.sum()) for row in last.computed()]
        assert rows == case.about["layer_rows_per_step"]
        assert last.token_layers == sum(rows)
    else:  # all layers reuse before those above the trigger are refreshed
        more = [(L - s) * q for s, q in zip(case["lstar"].tolist(), case["query_set"].sum(dim=1).tolist(), strict=True)]
        extra = 0 if method.force_full else sum(more[1:])
        assert last.token_layers == sum(case.about["layer_rows_per_step"]) + extra


def check_slots(case: Any, n: int, net: Net) -> None:
    lm = net.lm
    for layer in range(L):
        raw = case[f"k_raw_{n}"][layer].view(1, -1, lm.kv_heads, lm.head_dim)
        assert torch.allclose(net.held.k(layer), net.rotation.turn(raw), atol=2e-4)
        assert torch.allclose(net.held.v(layer)[0].flatten(1), case[f"v_{n}"][layer], atol=2e-4)
        assert torch.allclose(net.held.h(layer)[0], case[f"h_{n}"][layer], atol=2e-4)


def check_tracked(picks: Tensor, expected: Tensor) -> None:
    mine = torch.zeros_like(expected).scatter_(2, picks, 1)
    assert torch.equal(mine, expected)


@pytest.mark.parametrize("name", ["default_like", "gqa_track2"])
def test_joined_sigma(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other reading of σ, along the same trajectory."""
    case = recorded(SLUG)[name]
    o = case.options
    joined: list[Tensor] = []

    class Both(drift.Drift):
        def __init__(self, before: list[Tensor], valid: Tensor, how: str) -> None:
            super().__init__(before, valid, how)
            self.other = drift.Drift(before, valid, "joined")

        def sigma(self, layer: int, now: Tensor) -> Tensor:
            joined.append(self.other.sigma(layer, now))
            return super().sigma(layer, now)

    monkeypatch.setattr(elastic_cache_dllm, "Drift", Both)
    lm = recorded_lm(SLUG, o["weights"])
    method = ElasticCache(gamma=o["gamma"], beta=o["beta"], eps=o["eps"], track=o.get("track", 1))
    with elision.apply(lm, method) as run:
        run.generate(case["prompt"], gen_length=o["gen"])
    expected = case["sigma_flattened"][case["sigma_flattened"] < 1.5]
    assert torch.allclose(torch.cat(joined), expected, atol=1e-4)
