from __future__ import annotations

import pytest
import torch

import elision
from elision.kv.methods.layer_shared import LayerShared
from tests.kv.given import feed
from tests.kv.rig import Rig, recorded
from tests.kv.tiny import chunks_are_one_prompt, held, rows_are_single_runs, tiny, tokens

CASE = recorded("elastic-cache-lvlm")["baselines"]


@pytest.mark.parametrize("kind", ["local", "h2o"])
def test_recorded_runs(kind: str) -> None:
    """Kept sets after the prompt and after every step, the same in all layers, with the defects of the release."""
    weights, rows = CASE["attentions"], CASE["step_attentions_h2o"]
    layers = len(weights)
    rig = Rig(LayerShared(kind=kind, **CASE.options), layers)
    for i in range(layers):
        feed(rig, i, weights[i])
    for i in range(layers):
        assert torch.equal(rig.kept(i)[0, 0], CASE[f"kept_{kind}"])
    for step, expected in enumerate(CASE[f"kept_after_step_{kind}"]):
        for i in range(layers):
            store = rig.book.stores[i]
            n = store.n + 1
            order = torch.cat([store.positions()[0, 0].argsort().argsort(), torch.tensor([n - 1])])
            feed(rig, i, rows[step, i][..., :n][..., order])
        for i in range(layers):
            kept = rig.kept(i)[0, 0]
            assert torch.equal(kept, expected[: len(kept)])
            assert (expected[len(kept) :] == -1).all()


def test_without_the_defects() -> None:
    """The best by the mean over layers, heads included, and then at every step the lowest of all so far goes."""
    torch.manual_seed(0)
    weights = torch.rand(3, 1, 2, 30, 30).tril()
    rig = Rig(LayerShared(ratio=0.5, mode="paper", start_size=2), 3)
    for i in range(3):
        feed(rig, i, weights[i])
    score = dict(enumerate(weights.mean((0, 2)).sum(1)[0].tolist()))
    gone = sorted(range(2, 29), key=lambda j: score[j])[:16]
    kept = [j for j in range(30) if j not in gone]
    for i in range(3):
        assert rig.kept(i)[0, 0].tolist() == kept
    for step in range(12):
        row = torch.rand(3, 1, 2, 1, len(kept) + 1)
        kept.append(30 + step)
        score[30 + step] = 0.0
        order = [*rig.order()[0, 0].tolist(), 30 + step]
        for i in range(3):
            feed(rig, i, row[i])
        for j, p in enumerate(order):
            score[p] += float(row.mean((0, 2))[0, 0, j])
        if int(len(kept) - (31 + step) * 0.5) >= 1:
            kept.remove(min(kept[2:-1], key=lambda p: score[p]))
        for i in range(3):
            assert rig.kept(i)[0, 0].tolist() == kept


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("kind", ["local", "h2o"])
def test_batches_chunks_and_decoding(kind: str, mode: str) -> None:
    model = tiny()
    options = {"kind": kind, "mode": mode, "ratio": 0.45}
    rows_are_single_runs(model, "layer_shared", (60, 37, 12), **options)
    chunks_are_one_prompt(model, "layer_shared", **options)
    for decoding in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 4}):
        with elision.apply(model, "layer_shared", **options) as run:
            cache = run.cache()
            prompt = tokens(1, 12).repeat(1, 4)
            model.generate(prompt, past_key_values=cache, max_new_tokens=12, do_sample=False, **decoding)
            sets = held(run, cache)
            assert sets[0] == sets[1] == sets[2]
            assert -2 < len(sets[0][0]) - cache.get_seq_length() * 0.55 < 1


def test_a_budget_in_tokens_and_a_second_turn() -> None:
    model = tiny()
    with elision.apply(model, "layer_shared", budget=20) as run, torch.no_grad():
        cache = run.cache()
        for part in (tokens(1, 40), tokens(1, 25, 3), tokens(1, 1, 4), tokens(1, 1, 5)):
            model(part, past_key_values=cache)
            assert all(18 < len(layer[0]) <= 20 for layer in held(run, cache))


@pytest.mark.parametrize(("length", "ratio", "first"), [(1, 0.0, 0), (2, 0.3, 4), (2, 0.9, 4), (30, 1.0, 1)])
def test_the_head_stays_when_nothing_else_may(length: int, ratio: float, first: int) -> None:
    rig = Rig(LayerShared(kind="local", ratio=ratio, start_size=first), heads=1)
    q = torch.randn(1, 1, length, 8)
    rig.feed(0, q, q, phase="prompt_end")
    forget = min(int(length - length * (1 - ratio)), max(length - first, 0))
    expected = [p for p in range(length) if not first <= p < first + forget]
    assert rig.kept()[0, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["released", "paper"])
def test_scores_of_tokens_that_were_taken_back_go_with_them(mode: str) -> None:
    """In the paper mode; the release knows no crop, and lets scores lie where they are."""
    rig = Rig(LayerShared(ratio=0.0, mode=mode), layers=2, heads=1)
    q = torch.randn(1, 1, 26, 8)
    for phase, part in [("prompt_end", slice(0, 20)), *(("step", slice(t, t + 1)) for t in range(20, 24))]:
        for i in range(2):
            rig.feed(i, q[:, :, part], q[:, :, part], phase=phase)
    for store in rig.book.stores.values():
        store.crop(3)
    before = rig.book.state["scores"].clone()
    for i in range(2):
        rig.feed(i, q[:, :, 25:], q[:, :, 25:])
    scores = rig.book.state["scores"][0]
    logits = q[0, 0, 25] @ q[0, 0, [*range(21), 25]].T / 8**0.5
    torch.testing.assert_close(scores[:21], before[0, :21] + logits.softmax(-1)[:21])
    own = before[0, 21] if mode == "released" else 0
    torch.testing.assert_close(scores[21], own + logits.softmax(-1)[21])
    assert bool((scores[22:] == (before[0, 22:] if mode == "released" else 0)).all())
