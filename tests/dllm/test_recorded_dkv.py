"""dKV-Cache against recorded runs of its released code: tokens, rows that were run, logits, cached rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision import dllm
from elision.dllm.decode import Noise, Step
from elision.dllm.methods.dkv_cache import DKVCache
from elision.dllm.passes import Net
from tests.dllm.support import Recorded, Replay, names, recorded, recorded_lm

SLUG = "dkv-cache"
ATOL = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


def method_of(case: Recorded) -> DKVCache | None:
    o = case.options
    if "N" not in o and o.get("cache_type") != "prefill":
        return None
    if case.about["kind"] == "llada_greedy":
        return DKVCache(variant="greedy", interval=o["N"], window=o["window"])
    variant = {"decoded": "decode"}.get(o.get("cache_type", "decoded"), o.get("cache_type", "decode"))
    shift_type = o.get("shift", "un")
    missing = "zero" if shift_type == "right" else "skip"
    return DKVCache(variant=variant, interval=o.get("N", 8), shift_type=shift_type, missing=missing)


def settings_of(case: Recorded) -> dict[str, Any]:
    o = case.options
    out = {"gen_length": o["gen"], "steps": o["steps"], "block_length": o.get("block")}
    if "alg" in o:
        out["remasking"] = o["alg"]
    if o.get("remasking"):
        out["remasking"] = o["remasking"]
    if case.about["kind"] == "llada_greedy":
        out["remasking"] = "random_order"
    return out


def noise_of(case: Recorded) -> Noise:
    table: dict[tuple[str, int], Tensor] = {}
    if "priority" in case:
        table |= {("order", b): row for b, row in enumerate(case["priority"])}
    for i in range(case.about["calls"]):
        if f"rand_{i}" in case:
            spread = torch.full(case["compute"][i].shape, -1.0)
            spread[case["compute"][i].bool()] = case[f"rand_{i}"].flatten()
            table["confidence", i] = spread
    return Replay(table) if table else Noise()


@pytest.mark.parametrize("name", names(SLUG))
def test_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = recorded(SLUG)[name]
    lm = recorded_lm(SLUG, case.about["weights"], shift=case.about["kind"] == "dream")
    seen: list[Tensor] = []
    outputs: list[Tensor] = []
    whole = Net.logits

    def spy(self: Net, h: Tensor, rows: Any, step: Step) -> Any:
        outputs.append(lm.head(h))
        return whole(self, h, rows, step)

    monkeypatch.setattr(Net, "logits", spy)
    kept: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def on_step(step: Step, logits: Tensor, net: Net) -> None:
        seen.append(step.ids)
        if f"cache_k_{step.n}" in case:
            kept[step.n] = ([net.held.k(i).clone() for i in range(3)], [net.held.v(i).clone() for i in range(3)])

    padding = case.tensors.get("attention_mask")
    method = method_of(case)
    how = {"attention_mask": padding, "noise": noise_of(case), "on_step": on_step, **settings_of(case)}
    if method is None:
        out = dllm.generate(lm, case["prompt"], **how)
        computed = torch.ones_like(case["compute"])
    else:
        with elision.apply(lm, method) as run:
            out = run.generate(case["prompt"], **how)
            report = run.report()
        assert report.last is not None
        computed = report.last.query.long()
        assert report.token_layers == 3 * int(case["compute"].sum())
        assert report.last.padding == 0
    assert torch.equal(computed, case["compute"])
    assert torch.equal(torch.stack([*seen, out]), case["tokens"])
    check_logits(case, outputs, padding)
    check_cache(case, lm, kept)


def check_logits(case: Recorded, outputs: list[Tensor], padding: Tensor | None) -> None:
    checked = 0
    for i, mine in enumerate(outputs):
        if f"logits_{i}" not in case:
            continue
        theirs = case[f"logits_{i}"]
        if padding is not None:  # what a padded query computes is nobody's business
            real = torch.cat((padding, torch.ones(len(padding), case.options["gen"])), dim=1).bool()
            rows = real[case["compute"][i].bool()].view(mine.shape[:2])
            mine, theirs = mine[rows], theirs[rows]
        assert torch.allclose(mine, theirs, atol=ATOL)
        checked += 1
    assert checked


def check_cache(case: Recorded, lm: dllm.MaskedLM, kept: dict[int, tuple[list[Tensor], list[Tensor]]]) -> None:
    """Recorded keys are raw, ours are rotated; the rows kept after call i are those decided before it."""
    for i, (keys, values) in kept.items():
        decided = case["tokens"][i][0] != lm.mask_id
        where = decided.nonzero()[:, 0]
        turn = lm.rotation(where[None])
        for layer in range(3):
            raw = case[f"cache_k_{i}"][layer].view(1, len(where), lm.kv_heads, lm.head_dim)
            assert torch.allclose(keys[layer][:, where], turn.turn(raw), atol=ATOL)
            v = case[f"cache_v_{i}"][layer].view(1, len(where), lm.kv_heads, lm.head_dim)
            assert torch.allclose(values[layer][:, where], v, atol=ATOL)
