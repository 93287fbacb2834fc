from __future__ import annotations

import pytest
import torch

import elision
from elision.kv.methods.prefixkv import PrefixKV, rescale, search, threshold
from tests.kv.given import feed, same
from tests.kv.models import decode, llama
from tests.kv.rig import Rig, recorded

CASES = recorded("prefixkv")
DECODED = [n for n, c in CASES.items() if "kept_after_step" in c.tensors]


@pytest.mark.parametrize("name", DECODED)
def test_recorded_selections_and_deletions(name: str) -> None:
    """Given ratios: kept sets after the prompt, deletion points, and what is held after every step."""
    case = CASES[name]
    options = {k: case.options[k] for k in ("start_size", "distance")}
    weights = case["attentions"]
    layers, b, heads, length, _ = weights.shape
    rig = Rig(PrefixKV(ratios=tuple(case.options["ratios"]), **options), layers)
    for i in range(layers):
        feed(rig, i, weights[i])
        assert torch.equal(rig.order(i), rig.kept(i)), "original order"
        assert same(rig.kept(i).expand(b, 1, -1), case["kept_pos"][i])
        assert rig.book.stores[i].state["point"] == case["fixed_index"][i]
    for step, expected in enumerate(case["kept_after_step"]):
        for i in range(layers):
            feed(rig, i, torch.zeros(b, heads, 1, length + step + 1))
            assert same(rig.kept(i).expand(b, 1, -1), expected[i])


def test_recorded_profile_of_one_prompt() -> None:
    """Threshold, counts before and after rescaling, and the kept sets of the mode without a profile."""
    case = CASES["profile_gqa_free"]
    score = case["score"][:, 0]
    p, forget = threshold(list(score), case.scalars["target"], 2, 5)
    assert p == case.scalars["threshold_p"]
    assert torch.equal(forget, case["forget_raw"])
    ratios = search(list(score), 0.5, score.shape[1], 2, 5)
    assert ratios.tolist() == case.scalars["ratios"]
    rig = Rig(PrefixKV(ratio=0.5), len(score))
    for i, weights in enumerate(case["attentions"]):
        feed(rig, i, weights)
        assert rig.book.stores[i].intact == (i < len(score) - 1), "nothing is cut before the last layer"
    for i in range(len(score)):
        assert same(rig.kept(i), case["kept_pos"][i][None])
        assert rig.book.stores[i].state["point"] == case["fixed_index"][i]


def test_recorded_searches() -> None:
    case = CASES["search_sweep"]
    score = case["score"]
    layers, length = score.shape
    for i, rho in enumerate(case.options["rhos"]):
        p, forget = threshold(list(score), rho * layers * length, 2, 5)
        assert p == case.scalars["threshold_p"][i]
        assert torch.equal(forget, case["forget_raw"][i])
        limits = torch.full((layers,), length - 2)
        assert torch.equal(rescale(forget, rho * layers * length, limits), case["forget"][i])


@pytest.mark.parametrize("position", ["true", "compressed"])
def test_recorded_logits(position: str) -> None:
    """A tiny Llama under the released cache, with true and with the release's positions."""
    case = CASES["e2e"]
    model = llama(case)
    full = decode(model, case["prompt_ids"], case["forced_ids"])
    torch.testing.assert_close(full, case["logits_full"].view_as(full), atol=1e-4, rtol=0)
    with elision.apply(model, "prefixkv", ratios=tuple(case.options["ratios"]), position=position) as run:
        cache = run.cache()
        logits = decode(model, case["prompt_ids"], case["forced_ids"], cache)
        kept = run.kept(cache)
    torch.testing.assert_close(logits, case[f"logits_{position}"].view_as(logits), atol=1e-4, rtol=0)
    for i, expected in enumerate(case["final_kept"]):
        assert same(kept[i], expected[None])
