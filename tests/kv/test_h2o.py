from __future__ import annotations

import pytest
import torch
from torch import Tensor

import elision
from elision.kv.attend import _places
from elision.kv.methods.h2o import H2O
from tests.kv.models import decode, llama, prompts, tiny
from tests.kv.rig import Recorded, Rig, recorded

CASES = recorded("h2o")


def _by_time(rig: Rig) -> tuple[Tensor, Tensor]:
    """Positions and scores held, in order of time."""
    store = rig.book.stores[0]
    positions = store.positions().long()
    score = store.dense["score"]
    positions, order = positions.expand_as(score).sort(-1)
    return positions, score.gather(-1, order)


def _method(case: Recorded, reduce: str = "mean") -> H2O:
    return H2O(heavy=case.options["heavy"], recent=case.options["recent"], reduce=reduce)


@pytest.mark.parametrize(
    ("name", "reduce"),
    [
        ("mha_ratio_10_10", "sum"),
        ("mha_starts_below_budget", "mean"),
        ("mha_window_only", "mean"),
        ("gqa_port_batch2", "first"),
        ("gqa_mean_batch2", "mean"),
    ],
)
def test_recorded_runs(name: str, reduce: str) -> None:
    """Positions, scores and outputs of the released code after the prompt and after every step."""
    case = CASES[name]
    q, k, v = (case[x][None] for x in "qkv")
    prompt = case.scalars["S"] if "S" in case.scalars else case.scalars["chunks"][0]
    rig, outs = Rig(_method(case, reduce)), []
    kept, scores = case["kept_pos"], case["score"]
    if kept.ndim == 3:
        kept, scores = kept[:, None], scores[:, None]
    for step, out in enumerate(rig.run(q, k, v, prompt)):
        outs.append(out[0])
        positions, score = _by_time(rig)
        n = positions.shape[-1]
        assert torch.equal(positions, kept[step][..., :n])
        assert (kept[step][..., n:] == -1).all()
        torch.testing.assert_close(score, scores[step][..., :n], atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.cat(outs, 2), case["out"], atol=2e-5, rtol=0)


def test_room_is_made_before_a_turn() -> None:
    case = CASES["gqa_port_make_space"]
    q, k, v = (case[x] for x in "qkv")
    rig, start = Rig(H2O(heavy=8, recent=8, reduce="first", room=True)), 0
    for step, size in enumerate(case.scalars["chunks"]):
        part = slice(start, start + size)
        out = rig.feed(0, q[:, :, part], k[:, :, part], v[:, :, part], "step" if size == 1 else "prompt_end")
        torch.testing.assert_close(out, case["out"][:, :, part], atol=2e-5, rtol=0)
        positions, score = _by_time(rig)
        assert torch.equal(positions, case["kept_pos"][step])
        torch.testing.assert_close(score, case["score"][step], atol=2e-5, rtol=0)
        if step == 4:
            survivors = [set(row.tolist()) - set(range(start, start + size)) for row in positions[0]]
            expected = [set(row.tolist()) for row in case["kept_after_space_0"][0]]
            assert survivors == expected
        start += size
    with pytest.raises(elision.ElisionError, match=r"turn of 9 tokens does not fit into recent=8"):
        rig.feed(0, q[:, :, :9], k[:, :, :9], v[:, :, :9], "prompt_end")


@pytest.mark.parametrize("positions", ["absolute", "rolling"])
@pytest.mark.parametrize("name", ["e2e_mha", "e2e_gqa_port"])
def test_recorded_logits(name: str, positions: str) -> None:
    """A tiny Llama under the released code, with true and with rolling positions."""
    case = CASES[name]
    model = llama(case)
    full = decode(model, case["prompt_ids"], case["forced_ids"])
    torch.testing.assert_close(full, case["logits_full"].view_as(full), atol=1e-4, rtol=0)
    options = {"heavy": 6, "recent": 6, "reduce": "first", "rolling": positions == "rolling"}
    with elision.apply(model, "h2o", **options) as run:
        cache = run.cache()
        logits = decode(model, case["prompt_ids"], case["forced_ids"], cache)
        held = run.report().slots
    torch.testing.assert_close(logits, case[f"logits_{positions}"].view_as(logits), atol=1e-4, rtol=0)
    assert set(held.values()) == {12}
    for layer, store in enumerate(cache.layers):
        order = store.store.positions().expand_as(store.store.dense["score"]).argsort(-1)
        score = store.store.dense["score"].gather(-1, order)
        expected = case[f"final_score_{positions}"][layer].view_as(score)
        torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)


def test_recorded_logits_with_the_mean_of_a_group() -> None:
    case = CASES["e2e_gqa_port"]
    with elision.apply(llama(case), "h2o", heavy=6, recent=6) as run:
        logits = decode(run.host.model, case["prompt_ids"], case["forced_ids"])
    torch.testing.assert_close(logits, case["logits_absolute_mean"].view_as(logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("heads", "groups", "heavy", "recent"), [(3, 3, 5, 4), (4, 2, 5, 4), (4, 1, 5, 4), (4, 2, 9, 0), (4, 2, 0, 9)]
)
def test_brute_force(heads: int, groups: int, heavy: int, recent: int) -> None:
    """Scores and victims recomputed from the full history, masking what was evicted: equal sets and outputs."""
    torch.manual_seed(heads * 10 + groups)
    total, prompt, d = 40, 23, 8
    q, k, v = (torch.randn(1, 2, h, total, d) for h in (heads, groups, groups))
    rig = Rig(H2O(heavy=heavy, recent=recent, reduce="sum"))
    alive = torch.ones(2, groups, total, dtype=torch.bool)
    score = torch.zeros(2, groups, total)
    for step, out in enumerate(rig.run(q, k, v, prompt)):
        start, stop = (0, prompt) if step == 0 else (prompt + step - 1, prompt + step)
        for b in range(2):
            for g in range(groups):
                for head in range(g * heads // groups, (g + 1) * heads // groups):
                    logits = q[0, b, head, start:stop] @ k[0, b, g, :stop].T / d**0.5
                    logits[:, ~alive[b, g, :stop]] = -torch.inf
                    logits += torch.full((stop - start, stop), -torch.inf).triu(start + 1)
                    weights = logits.softmax(-1)
                    torch.testing.assert_close(out[0][b, head], weights @ v[0, b, g, :stop], atol=1e-5, rtol=0)
                    score[b, g, :stop] += weights.sum(0)
                while alive[b, g, :stop].sum() > heavy + recent:
                    candidates = alive[b, g, :stop].clone()
                    candidates[stop - recent :] = False
                    victim = torch.where(candidates, score[b, g, :stop], torch.inf).argmin()
                    alive[b, g, victim] = False
                held = alive[b, g, :stop].nonzero().flatten()
                assert torch.equal(rig.kept()[b, g], held)


def test_scores_sum_to_the_number_of_rows_before_any_eviction() -> None:
    q, k = torch.randn(1, 1, 4, 30, 8), torch.randn(1, 1, 2, 30, 8)
    rig = Rig(H2O(budget=64, reduce="sum"))
    list(rig.run(q, k, k, 20))
    torch.testing.assert_close(rig.book.stores[0].dense["score"].sum(-1), torch.full((1, 2), 60.0))


@torch.no_grad()
def test_rolling_places_follow_each_other_after_a_deep_crop() -> None:
    """Taking back more than the newest tokens leaves heads with different counts; none may count the gaps."""
    model = tiny("llama")
    ids, _ = prompts([30])
    with elision.apply(model, "h2o", heavy=8, recent=4, rolling=True) as run:
        cache = run.cache()
        model(ids, past_key_values=cache)
        cache.crop(-24)
        model(ids[:, :1], past_key_values=cache)
        stores = [layer.store for layer in cache.layers if "valid" in layer.store.dense]
        assert stores
        for store in stores:
            places, valid = _places(store), store.dense["valid"]
            assert places is not None
            for held, real in zip(store.dense["pos"][0], valid[0], strict=True):
                assert bool((held[real].diff() > 0).all())
                assert bool((places[0][real].diff() == 1).all())
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()
