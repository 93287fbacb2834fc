from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision.errors import OptionError
from elision.kv.methods.cake import CAKE, TAUS
from elision.kv.methods.snapkv import SnapKV
from elision.kv.slicing import shares, single_round, water_filling
from tests.kv.models import decode, llama
from tests.kv.rig import Recorded, Rig, recorded

CASES = recorded("cake")
RUNS = [name for name in CASES if name not in ("adjust_table", "e2e")]


def _method(case: Recorded, **changes: Any) -> CAKE:
    options = case.options
    settings = {
        "budget": options["cache_size"],
        "window": options["window_size"],
        "gamma": options["gamma"],
        "tau1": options["tau1"],
        "tau2": options["tau2"],
        "kernel": options["pool_kernel"],
        "schedule": options["schedule"].replace("-", "_"),
        "decode_order": options["decode_order"],
        "coupled": True,
    }
    return CAKE(**{**settings, **changes})


def _inputs(case: Recorded) -> list[Tensor]:
    own = {"one_shot_gqa": "cascade_gqa", "cascade_positional": "cascade_gqa"}.get(case.name, case.name)
    return [CASES[own][x] for x in "qkv"]


def _rig(method: CAKE, q: Tensor, k: Tensor, layers: int | None = None) -> Rig:
    return Rig(method, layers or len(q), q.shape[2], k.shape[2])


def _padded(held: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(held, (0, width - held.shape[-1]), value=-1)


def _order(rig: Rig, layer: int, heads: int) -> Tensor:
    """Positions held, in the order in which the released code would have them in its cache."""
    dense = rig.book.stores[layer].dense
    positions = rig.order(layer).expand(-1, heads, -1)
    if "rank" not in dense:
        return positions.sort(-1).values
    return positions.gather(-1, dense["rank"].argsort(dim=-1, stable=True))


@pytest.mark.parametrize("name", RUNS)
def test_recorded_runs(name: str) -> None:
    """Budgets and kept sets after every stage of the prompt, order, sets and outputs after every step."""
    case = CASES[name]
    q, k, v = _inputs(case)
    layers, prompt, w = len(q), case.scalars["S"], case.options["window_size"]
    rig = _rig(_method(case), q, k)
    budgets, kept = case["stage_budgets"], case["kept_after_stage"]
    outs = [[] for _ in q]
    for m in range(layers):
        outs[m].append(rig.feed(m, *(x[m][:, :, :prompt] for x in (q, k, v)), phase="prompt_end"))
        for layer in range(m + 1):
            held = rig.kept(layer).expand(-1, k.shape[2], -1)
            assert torch.equal(_padded(held, kept.shape[-1]).sort(-1).values, kept[m, layer].sort(-1).values)
            if budgets[m, layer] >= 0 and (m == layers - 1 or case.options["schedule"] == "cascading"):
                assert torch.as_tensor(rig.book.stores[layer].state["middle"]).eq(budgets[m, layer]).all()
    for step in range(case.scalars["T"]):
        part = slice(prompt + step, prompt + step + 1)
        for m in range(layers):
            outs[m].append(rig.feed(m, *(x[m][:, :, part] for x in (q, k, v))))
            order = _padded(_order(rig, m, k.shape[2]), case["kept_after_step"].shape[-1])
            expected = case["kept_after_step"][step, m]
            if "rank" not in rig.book.stores[m].dense:
                order, expected = order.sort(-1).values, expected.sort(-1).values
            assert torch.equal(order[..., :-w].sort(-1).values, expected[..., :-w].sort(-1).values)
            assert torch.equal(order, expected)
    out = torch.stack([torch.cat(parts, 2) for parts in outs])
    torch.testing.assert_close(out, case["out"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in RUNS if "dispersion" in CASES[n].tensors])
@pytest.mark.parametrize("what", ["preference", "dispersion", "shift"])
def test_recorded_statistics(name: str, what: str) -> None:
    """One infinite temperature leaves the other statistic alone; a layer that never comes keeps them from leaving."""
    case = CASES[name]
    q, k, v = _inputs(case)
    prompt, w = case.scalars["S"], case.options["window_size"]
    taus = {"dispersion": {"tau1": 1, "tau2": math.inf}, "shift": {"tau1": math.inf, "tau2": 1}}.get(what, {})
    rig = _rig(_method(case, budget=w, schedule="one_shot", **taus), q, k, len(q) + 1)
    for m in range(len(q)):
        rig.feed(m, *(x[m][:, :, :prompt] for x in (q, k, v)), phase="prompt_end")
        store = rig.book.stores[m]
        torch.testing.assert_close(store.state["preference"][0], case[what][m], rtol=1e-4, atol=0)
        torch.testing.assert_close(store.dense["indicator"][..., :-w], case["indicator"][m], rtol=1e-4, atol=1e-6)


def test_recorded_repairs() -> None:
    rows = CASES["adjust_table"].scalars["rows"]
    for row in rows:
        total, cap = torch.tensor([row["total"]]), torch.full((1, len(row["preferences"])), row["cap"])
        real = shares(torch.tensor([row["preferences"]]), total)
        torch.testing.assert_close(real[0], torch.tensor(row["real_budgets"]), rtol=1e-6, atol=0)
        budget = single_round(real, total, cap)
        assert budget[0].tolist() == row["adjusted"]
        assert budget.minimum(cap)[0].tolist() == row["used"]
    assert any(sum(r["used"]) < min(r["total"], r["cap"] * len(r["used"])) for r in rows)


@pytest.mark.parametrize("order", ["released", "positional"])
def test_recorded_logits(order: str) -> None:
    case = CASES["e2e"]
    options = {"budget": 24, "window": 8, "tau1": 1.6, "tau2": 0.6, "decode_order": order}
    with elision.apply(llama(case), "cake", **options) as run:
        cache = run.cache()
        logits = decode(run.host.model, case["prompt_ids"], case["forced_ids"], cache)
    torch.testing.assert_close(logits, case[f"logits_{order}"].view_as(logits), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[:, 0], case["logits_full"][:1], atol=1e-4, rtol=0)
    assert [layer.store.state["middle"] for layer in cache.layers] == case["budgets"].tolist()
