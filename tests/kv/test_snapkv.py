from __future__ import annotations

import pytest
import torch

import elision
from elision.kv.methods.snapkv import SnapKV
from tests.kv.models import decode, llama
from tests.kv.rig import Recorded, Rig, recorded

CASES = recorded("snapkv")


def _method(case: Recorded, reduce: str = "mean") -> SnapKV:
    options = case.options
    pooling = options["pooling"].removesuffix("pool")
    return SnapKV(options["capacity"], options["window"], options["kernel"], pooling, reduce)


@pytest.mark.parametrize("name", [n for n in CASES if n != "e2e"])
def test_recorded_selections(name: str) -> None:
    """Kept sets per KV head, and, with keys repeated first, per query head."""
    case = CASES[name]
    q, k = case["q"], case["k"]
    for reduce in ("mean", "max", "sum"):
        if f"kept_{reduce}" in case.tensors:
            rig = Rig(_method(case, reduce))
            rig.feed(0, q, k, phase="prompt_end")
            assert torch.equal(rig.kept(), case[f"kept_{reduce}"].sort(-1).values)
    rig = Rig(_method(case))
    rig.feed(0, q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), phase="prompt_end")
    kept = rig.kept().expand(-1, q.shape[1], -1)
    assert torch.equal(kept, case["kept_query_head"].sort(-1).values)


def test_recorded_logits() -> None:
    case = CASES["e2e"]
    with elision.apply(llama(case), "snapkv", budget=24, window=8) as run:
        logits = decode(run.host.model, case["prompt_ids"], case["forced_ids"])
    torch.testing.assert_close(logits, case["logits_kv_head"].view_as(logits), atol=1e-4, rtol=0)


def test_chunks_are_one_prompt() -> None:
    """The window reaches back over chunks that are shorter than it."""
    q, k = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8)
    whole, parts = Rig(SnapKV(20, 8)), Rig(SnapKV(20, 8))
    whole.feed(0, q, k, phase="prompt_end")
    for i, (start, stop) in enumerate([(0, 30), (30, 45), (45, 48), (48, 49), (49, 50)]):
        phase = "prompt_end" if stop == 50 else "prompt_chunk"
        parts.feed(0, q[:, :, start:stop], k[:, :, start:stop], phase=phase, starts=i == 0)
    assert torch.equal(whole.kept(), parts.kept())


@pytest.mark.parametrize("length", [1, 3, 8, 9])
def test_prompts_shorter_than_the_window(length: int) -> None:
    rig = Rig(SnapKV(9, 8))
    rig.feed(0, torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8), phase="prompt_end")
    assert torch.equal(rig.kept()[0, 0], torch.arange(length))
