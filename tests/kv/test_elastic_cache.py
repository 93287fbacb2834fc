from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision.kv.methods.elastic_cache import ElasticCache
from tests.kv.given import feed, same
from tests.kv.models import decode, llama
from tests.kv.rig import Recorded, Rig, recorded

CASES = recorded("elastic-cache-lvlm")
SELECTIONS = [n for n, c in CASES.items() if "kept_paper" in c.tensors and n != "e2e"]


def _method(case: Recorded, **more: Any) -> ElasticCache:
    return ElasticCache(**{k: case.options[k] for k in ("ratio", "start_size", "distance")}, **more)


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_recorded_runs(name: str, mode: str) -> None:
    """Kept sets, merged keys and values after the prompt, and what is held after every step."""
    case = CASES[name]
    weights, k, v = case["attentions"], case["k"], case["v"]
    layers, length = len(weights), weights.shape[-1]
    rig = Rig(_method(case, mode=mode), layers)
    for i in range(layers):
        feed(rig, i, weights[i], k[i], v[i])
        store = rig.book.stores[i]
        assert torch.equal(rig.order(i)[0, 0], case[f"kept_{mode}"][i])
        torch.testing.assert_close(store.dense["k"], case[f"k_{mode}"][i], atol=1e-5, rtol=0)
        torch.testing.assert_close(store.dense["v"], case[f"v_{mode}"][i], atol=1e-5, rtol=0)
        moved = case[f"source_{mode}"].shape[1] * k.shape[2]
        assert (store.merged, store.evicted) == (moved, 0)
    for step, expected in enumerate(case[f"kept_after_step_{mode}"]):
        for i in range(layers):
            new = k[i][:, :, :1]
            feed(rig, i, torch.zeros(1, weights.shape[2], 1, length + step + 1), new, new)
            if case.scalars["fixed_index_valid"] or mode == "released":
                assert same(rig.kept(i), expected[i][None])
