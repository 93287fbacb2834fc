from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision.kv.methods.zipcache import ZipCache
from elision.kv.probes import Probes, draw
from tests.kv.models import decode, llama
from tests.kv.rig import Rig, recorded

CASES = recorded("zipcache")


def _recorded_rows(monkeypatch: pytest.MonkeyPatch, probes: Tensor) -> None:
    """Let the random probes be those of the recorded run: `probes` [P], or [L, P]."""
    at = probes.view(-1, probes.shape[-1])
    monkeypatch.setattr(Probes, "rows", lambda self, lengths, layer, turn: (at[layer].expand(len(lengths), -1), None))


def _decoded(rig: Rig, n: int, layer: int = 0) -> tuple[Tensor, Tensor]:
    """Packed keys and values in the order of positions, [B, G, n, D]."""
    store = rig.book.stores[layer]
    keys, values = store.read(rig.book.scratch)
    order = store.positions()[..., :n].long().argsort(-1)[..., None]
    return tuple(x[:, :, :n].gather(2, order.expand(-1, -1, -1, x.shape[-1])).clone() for x in (keys, values))


@pytest.mark.parametrize("name", ["saliency_gqa", "saliency_mha_batch2", "saliency_short"])
@pytest.mark.parametrize("norm", ["full_count", "probe_nnz"])
def test_recorded_saliency_and_classes(monkeypatch: pytest.MonkeyPatch, name: str, norm: Any) -> None:
    case = CASES[name]
    _recorded_rows(monkeypatch, case["probes"])
    method = ZipCache(low_ratio=case.options["low_ratio"], norm=norm, params="float32")
    found = {}
    real = Probes.score
    monkeypatch.setattr(Probes, "score", lambda *args: found.setdefault("score", real(*args)))
    rig = Rig(method)
    rig.feed(0, case["q"], case["k"], phase="prompt_end")
    key = {"full_count": "released", "probe_nnz": "probe_nnz"}[norm]
    torch.testing.assert_close(found["score"], case[f"saliency_{key}"], rtol=1e-5, atol=1e-7)
    others, salient = rig.book.stores[0].tiers
    assert torch.equal(others.meta["pos"].long(), case[f"other_ids_{key}"])
    both = torch.cat([others.meta["pos"], salient.meta["pos"]], -1).sort(-1).values
    assert torch.equal(both.long(), torch.arange(case.scalars["S"]).expand_as(both))


def test_the_rows_of_the_release() -> None:
    for name in ("saliency_gqa", "saliency_mha_batch2", "saliency_short"):
        case = CASES[name]
        rows = draw(case.scalars["S"], 0.05, 0.05, torch.rand(99, dtype=torch.float64))
        n = case.scalars["recent_probes"]
        assert torch.equal(rows[:n], case["probes"][:n])
        assert len(rows) == n + case.scalars["random_probes"]
        assert (rows[n:] < case.scalars["S"] - n).all()


@pytest.mark.parametrize("gap", ["block", "all"])
def test_recorded_streaming(monkeypatch: pytest.MonkeyPatch, gap: Any) -> None:
    """Classes, decoded tensors and outputs through two recompressions; with "block" up to the first."""
    case = CASES["streaming_gqa"]
    _recorded_rows(monkeypatch, case["probes"])
    rig = Rig(ZipCache(norm="full_count", requant=gap, gap=8, params="float32"))
    q, k, v = (case[x][None] for x in "qkv")
    outs, prompt = [], case.scalars["S"]
    for t, out in enumerate(rig.run(q, k, v, prompt)):
        outs.append(out[0])
        store = rig.book.stores[0]
        assert store.dense.n == case["buffer_len"][t]
        assert store.n - store.dense.n == case["compressed_len"][t]
        if t in (0, 8, 16) and (gap == "all" or t == 0):
            tag = "prompt" if t == 0 else str(t)
            assert torch.equal(store.tiers[0].meta["pos"].long(), case[f"other_ids_{tag}"])
            keys, values = _decoded(rig, prompt + t)
            torch.testing.assert_close(keys, case[f"k_hat_{t}"], rtol=0, atol=1e-5)
            torch.testing.assert_close(values, case[f"v_hat_{t}"], rtol=0, atol=1e-5)
        if gap == "block" and t == 8:
            others = torch.cat([tier.meta["pos"] for tier in store.tiers[::2]], -1)
            assert torch.equal(others.long(), case["other_ids_8"])
    stop = prompt + (20 if gap == "all" else 8)
    torch.testing.assert_close(torch.cat(outs, 2)[:, :, :stop], case["out"][:, :, :stop], rtol=0, atol=5e-5)


@pytest.mark.parametrize("norm", ["full_count", "probe_nnz"])
def test_recorded_logits(monkeypatch: pytest.MonkeyPatch, norm: Any) -> None:
    case = CASES["e2e"]
    model = llama(case)
    full = decode(model, case["prompt_ids"], case["forced_ids"])
    torch.testing.assert_close(full[0], case["logits_full"], atol=1e-4, rtol=0)
    _recorded_rows(monkeypatch, case["probes"])
    with elision.apply(model, "zipcache", norm=norm, gap=8, params="float32") as run:
        cache = run.cache()
        logits = decode(model, case["prompt_ids"], case["forced_ids"], cache)
    name = "logits" if norm == "full_count" else "logits_probe_nnz"
    torch.testing.assert_close(logits[0], case[name], atol=1e-4, rtol=0)
    for layer, store in enumerate(cache.layers):
        ids = case["other_ids_prompt" if norm == "full_count" else "other_ids_prompt_probe_nnz"][layer]
        assert torch.equal(store.store.tiers[0].meta["pos"][..., : ids.shape[-1]].long(), ids)
        assert store.store.n - store.store.dense.n == case["final_compressed_len"][layer]
