from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import elision
from elision.errors import OptionError
from elision.kv.methods.cake import CAKE, TAUS, _Indicator
from elision.kv.methods.snapkv import SnapKV
from elision.kv.parts import Call
from elision.kv.slicing import shares, single_round, water_filling
from tests.kv.contracts import Row, check_chunks, check_rows, feed, rig_of
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


# -- the exact list of the specification -------------------------------------------------------------------------------


def _model(layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, head_dim=32, **sizes)).eval()


def test_a_budget_above_everything_changes_nothing() -> None:
    model, prompt, forced = _model(), torch.randint(0, 64, (1, 20)), torch.randint(0, 64, (1, 12))
    full = decode(model, prompt, forced)
    run = elision.apply(model, "cake", budget=32)
    logits = decode(model, prompt, forced)
    report = run.report()
    with pytest.warns(elision.ElisionWarning, match="left nothing out"):
        run.remove()
    assert torch.equal(logits, full)
    assert set(report.evicted.values()) == {0}


@pytest.mark.parametrize("schedule", ["cascading", "one_shot"])
def test_the_first_token_is_that_of_the_full_cache(schedule: str) -> None:
    model, prompt = _model(), torch.randint(0, 64, (2, 60))
    full = decode(model, prompt, torch.zeros(2, 0, dtype=torch.long))
    with elision.apply(model, "cake", budget=12, window=4, schedule=schedule) as run:
        logits = decode(model, prompt, torch.zeros(2, 0, dtype=torch.long))
        assert sum(run.report().slots.values()) < 4 * 60
    assert torch.equal(logits, full)


def _random_shares(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    layers = int(torch.randint(2, 9, (1,), generator=g))
    spread = 0.2 + 2.8 * torch.rand(200, 1, generator=g)
    preference = (torch.randn(200, layers, generator=g) * spread).exp()
    cap = torch.randint(1, 200, (200, 1), generator=g).expand(200, layers)
    total = (torch.rand(200, generator=g) * cap[:, 0] * layers).long()
    return preference, total, cap


@pytest.mark.parametrize("seed", range(5))
def test_repaired_budgets_use_the_whole(seed: int) -> None:
    """No layer over the cap; all of T, and by a single round all of it iff that lifted no layer over the cap."""
    preference, total, cap = _random_shares(seed)
    real = shares(preference, total)
    filled = water_filling(real, total, cap)
    assert (filled >= 0).all()
    assert (filled <= cap).all()
    assert torch.equal(filled.sum(-1), total.minimum(cap.sum(-1)))
    once = single_round(real, total, cap)
    used = once.minimum(cap)
    assert (used >= 0).all()
    assert torch.equal(used.sum(-1) == total, ~(once > cap).any(-1))
    assert torch.equal(
        water_filling(shares(torch.ones_like(real), total), total, cap).amax(-1), -(-total // len(cap[0]))
    )


@pytest.mark.parametrize("seed", range(3))
def test_shares_depend_on_ratios_alone_and_shrink_along_the_cascade(seed: int) -> None:
    preference, total, _ = _random_shares(seed)
    torch.testing.assert_close(shares(preference * 512, total), shares(preference, total))
    even = total[:, None] / preference.shape[1]
    torch.testing.assert_close(shares(torch.full_like(preference, 7), total), even.expand_as(preference))
    assert torch.equal(shares(torch.zeros_like(preference), total), shares(torch.ones_like(preference), total))
    before = None
    for m in range(1, preference.shape[1] + 1):
        stage = shares(preference[:, :m], total)
        assert before is None or (stage[:, :-1] <= before * (1 + 1e-6)).all()
        before = stage


@pytest.mark.parametrize("repair", ["released", "water_filling"])
@pytest.mark.parametrize("seed", range(6))
def test_cascade_and_one_shot_agree(seed: int, repair: str) -> None:
    """Whenever integer stage budgets never rise, the sets are equal; layers together hold T, none above S - w."""
    torch.manual_seed(seed)
    layers, s, w, c = 4, 40, 6, (14, 22, 30)[seed % 3]
    scale = torch.tensor([0.3, 1.0, 2.0, 3.0])[torch.randperm(4)].view(-1, 1, 1, 1, 1)
    q, k = torch.randn(layers, 1, 4, s, 8) * scale, torch.randn(layers, 1, 2, s, 8)
    rigs = {x: _rig(CAKE(c, window=w, schedule=x, repair=repair), q, k) for x in ("cascading", "one_shot")}
    stages = []
    for m in range(layers):
        for rig in rigs.values():
            rig.feed(m, q[m], k[m], phase="prompt_end")
        states = [rigs["cascading"].book.stores[i].state["middle"] for i in range(m + 1)]
        stages.append([int(x) for x in states])
    held = {x: [rig.kept(m).shape[-1] - w for m in range(layers)] for x, rig in rigs.items()}
    assert max(held["one_shot"]) <= s - w
    assert stages[-1] == [int(store.state["middle"]) for store in rigs["one_shot"].book.stores.values()]
    assert sum(held["one_shot"]) == sum(stages[-1]) <= (c - w) * layers
    if repair == "water_filling":
        assert sum(held["one_shot"]) == min((c - w) * layers, (s - w) * layers)
    falling = all(new <= old for a, b in pairwise(stages) for old, new in zip(a, b, strict=False))
    for m in range(layers):
        assert set(range(s - w, s)) <= set(rigs["cascading"].kept(m)[0, 0].tolist())
        if falling:
            assert torch.equal(rigs["cascading"].kept(m), rigs["one_shot"].kept(m))
    assert falling or sum(held["cascading"]) <= sum(held["one_shot"])


def test_a_budget_that_rises_again_does_not_bring_tokens_back() -> None:
    """The example of a layer that gets 0 at the third stage and 1 from the fourth on."""
    preference, total, cap = torch.tensor([[1.13, 0.00093, 0.519, 0.024, 0.111]]), torch.tensor([260]), 187
    budgets = []
    for m in range(1, 6):
        caps = torch.full((1, m), cap)
        budgets.append(single_round(shares(preference[:, :m], total), total, caps).minimum(caps)[0].tolist())
    assert [b[1] for b in budgets[1:]][1:] == [0, 1, 1]


def test_a_layer_that_was_emptied_stays_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same example in a cache: the second layer has a budget of 1 beside its window, and nothing left to put in."""
    w, s = 5, 187 + 5
    measure = _Indicator._measure

    def given(self: _Indicator, call: Call) -> None:
        measure(self, call)
        call.store.state["preference"] = torch.tensor([(1.13, 0.00093, 0.519, 0.024, 0.111)[call.layer]])

    monkeypatch.setattr(_Indicator, "_measure", given)
    q, k = torch.randn(5, 1, 2, s + 2, 8), torch.randn(5, 1, 2, s + 2, 8)
    rig = _rig(CAKE(52 + w, window=w), q, k)
    held = [[rig.kept(m).shape[-1] for m in range(5)] for _ in rig.run(q, k, k, s)]
    middle = [store.state["middle"] for store in rig.book.stores.values()]
    assert middle[1] == 1
    assert [h[1] for h in held] == [w, w + 1, w + 1]
    assert [h[0] for h in held] == [middle[0] + w] * 3


@pytest.mark.parametrize("schedule", ["cascading", "one_shot"])
def test_peak_of_the_prefill(schedule: str) -> None:
    """Bytes held while a prompt passes: T + w L tokens and one full layer under the cascade, L S tokens otherwise."""
    layers, s, c, w = 6, 256, 20, 8
    with elision.apply(_model(layers), "cake", budget=c, window=w, schedule=schedule) as run:
        run.host.model(torch.randint(0, 64, (1, s)))
        report = run.report()
    kv, facts = 2 * 2 * 32 * 4, 2 * (4 + 4)  # keys and values; position and indicator, for two heads
    if schedule == "cascading":
        assert report.bytes_peak <= ((c - w) * layers + w * layers + s) * (kv + facts)
    else:
        assert report.bytes_peak >= layers * s * kv
    assert report.bytes_held <= c * layers * (kv + facts / 2)


def test_dispersion_of_uniform_attention() -> None:
    s, w = 30, 5
    rig = Rig(CAKE(w, window=w, tau1=1, tau2=math.inf), layers=2, heads=3)
    rig.feed(0, torch.randn(1, 3, s, 8), torch.zeros(1, 3, s, 8), phase="prompt_end")
    seen = torch.arange(s - w + 1, s + 1).float()
    expected = 3 * ((s - w) / seen * seen.log()).sum()
    torch.testing.assert_close(rig.book.stores[0].state["preference"], expected[None], rtol=1e-5, atol=0)


def test_no_shift_anywhere_means_even_budgets() -> None:
    """Rows that agree before the window have V = 0, hence P = 0; nothing is preferred then."""
    s, w, layers = 30, 5, 3
    q = torch.ones(1, 2, s, 4)
    rig = Rig(CAKE(12, window=w), layers=layers, heads=2)
    for m in range(layers):
        k = torch.randn(1, 2, s, 4)
        k[:, :, -w:] = -1e4
        rig.feed(m, q, k, phase="prompt_end")
        if m < layers - 1:
            assert rig.book.stores[m].state["preference"].item() == 0
    assert [rig.book.stores[m].state["middle"] for m in range(layers)] == [7, 7, 7]


def test_without_variance_and_preference_it_is_snapkv() -> None:
    q, k = torch.randn(3, 2, 4, 50, 8), torch.randn(3, 2, 2, 50, 8)
    cake = _rig(CAKE(20, window=8, gamma=0, tau1=math.inf, tau2=math.inf), q, k)
    snap = Rig(SnapKV(20, 8), 3, 4, 2)
    for m in range(3):
        for rig in (cake, snap):
            rig.feed(m, q[m], k[m], phase="prompt_end")
    for m in range(3):
        assert torch.equal(cake.kept(m), snap.kept(m))


@pytest.mark.parametrize("order", ["positional", "released"])
def test_one_token_leaves_per_step_and_head(order: str) -> None:
    w, layers = 6, 3
    q, k = torch.randn(layers, 1, 4, 70, 8), torch.randn(layers, 1, 2, 70, 8)
    rig = _rig(CAKE(16, window=w, decode_order=order), q, k)
    sets: list[set[int]] = []
    for t, _ in enumerate(rig.run(q, k, k, 50)):
        now = [set(head) for m in range(layers) for head in rig.kept(m)[0].expand(2, -1).tolist()]
        newest = set(range(50 + t - w, 50 + t))
        if t:
            for before, after in zip(sets, now, strict=True):
                gone = (before | {50 + t - 1}) - after
                assert len(gone) == 1
                assert newest <= after
        sets = now


# -- batches, chunks, turns --------------------------------------------------------------------------------------------

OPTIONS = [
    {"budget": 14},
    {"budget": 0.5},
    {"budget": 14, "decode_order": "released"},
    {"budget": 14, "repair": "water_filling", "schedule": "one_shot"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("lengths", "turns"),
    [
        ((40, 23), None),
        ((40, 15), None),
        ((40, 3), None),
        ((40, 31), (12, 12)),
        ((40, 31), (12, 3)),
        ((16, 40), (3, 2)),
    ],
)
def test_rows_are_like_single_runs(options: dict[str, Any], lengths: tuple[int, ...], turns: Any) -> None:
    check_rows(CAKE(window=5, **options), lengths, 7, turns, 4)


@pytest.mark.parametrize("options", OPTIONS)
def test_chunks_are_one_prompt(options: dict[str, Any]) -> None:
    check_chunks(CAKE(window=5, **options), 40, (17, 34, 37, 39), 3)


def test_a_coupled_batch_has_one_preference() -> None:
    rows = [Row.random(40, seed) for seed in (1, 2)]
    rigs = {coupled: rig_of(CAKE(14, window=5, coupled=coupled)) for coupled in (True, False)}
    for rig in rigs.values():
        feed(rig, rows, [0, 0], [40, 40], "prompt_end")
    assert all(isinstance(store.state["middle"], int) for store in rigs[True].book.stores.values())
    apart = torch.stack([torch.as_tensor(s.state["middle"]).expand(2) for s in rigs[False].book.stores.values()])
    assert apart[:, 0].tolist() != apart[:, 1].tolist()
    assert apart.sum(0).tolist() == [27, 27]


def test_turns() -> None:
    """A long turn slices anew, a short one leaves budgets as they are; layers never hold more than c on average."""
    row, rig = Row.random(100, 0), rig_of(CAKE(14, window=5, repair="water_filling"))
    at, budgets = 0, []
    for size in (40, 1, 1, 20, 3, 1, 1):
        feed(rig, [row], [at], [size], "step" if size == 1 else "prompt_end")
        at += size
        budgets.append([store.state["middle"] for store in rig.book.stores.values()])
        assert sum(rig.kept(m).shape[-1] for m in range(3)) == 14 * 3
        assert all((rig.kept(m)[..., -5:] == torch.arange(at - 5, at)).all() for m in range(3))
    assert budgets[0] == budgets[2] != budgets[3]
    assert budgets[3] == budgets[4] == budgets[6]


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 14, 19, 20])
def test_short_prompts(length: int) -> None:
    """Nothing leaves up to c + w; the first step then comes down to c."""
    row, rig = Row.random(60, 0), rig_of(CAKE(14, window=5))
    feed(rig, [row], [0], [length], "prompt_end")
    held = [rig.kept(m).shape[-1] for m in range(3)]
    assert (set(held) == {length}) == (length <= 19)
    if length <= 19:
        for t in range(length, 30):
            feed(rig, [row], [t], [1], "step")
            assert {rig.kept(m).shape[-1] for m in range(3)} == {min(t + 1, 14)}


def test_options() -> None:
    assert CAKE(preset="llama-3.1-8b").taus() == (1.6, 0.4)
    assert CAKE(200, preset="llama-2-7b").taus() == (0.9, 2.3)
    assert CAKE(preset="llama-2-7b", tau2=5).taus() == (1.9, 5)
    assert CAKE().taus() == (1, 1)
    assert CAKE(cache_size=64).budget == 64
    assert all(len(sizes) == 2 for sizes in TAUS.values())
    with pytest.raises(OptionError, match="budget=16 tokens is smaller than window=32"):
        CAKE(16)
    with pytest.raises(OptionError, match="give one"):
        CAKE(512, cache_size=64)
    with pytest.raises(OptionError, match="give the budget in tokens"):
        CAKE(0.5, preset="llama-2-7b")
    with pytest.raises(OptionError, match="window=1 is out of range"):
        CAKE(window=1)
