"""Fast-dLLM against recorded runs of its released code: tokens, rows that were run, logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision import dllm
from elision.dllm.decode import Step
from elision.dllm.methods.fast_dllm import FastDLLM
from elision.dllm.passes import Net
from tests.dllm.support import names, recorded, recorded_lm

SLUG = "fast-dllm"
pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


@pytest.mark.parametrize("name", names(SLUG))
def test_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = recorded(SLUG)[name]
    o = case.options
    lm = recorded_lm(SLUG, o["weights"], shift=o["model"] == "dream")
    seen: list[Tensor] = []
    outputs: list[Tensor] = []
    whole = Net.logits

    def spy(self: Net, h: Tensor, rows: Any, step: Step) -> Any:
        outputs.append(lm.head(h))
        return whole(self, h, rows, step)

    monkeypatch.setattr(Net, "logits", spy)
    how: dict[str, Any] = {"gen_length": o["gen"], "steps": o["steps"], "block_length": o["block"]}
    how["on_step"] = lambda step, logits, net: seen.append(step.ids)
    if o.get("alg") == "entropy":
        how["remasking"] = "entropy"
    if o["mode"] == "none":
        out = dllm.generate(lm, case["prompt"], threshold=o.get("threshold"), **how)
        computed = torch.ones_like(case["compute"])
    else:
        with elision.apply(lm, FastDLLM(cache=o["mode"], threshold=o.get("threshold"))) as run:
            out = run.generate(case["prompt"], **how)
        last = run.report().last
        assert last is not None
        assert last.token_layers == 3 * int(case["compute"].sum())
        computed = last.query.long()
    assert torch.equal(computed, case["compute"])
    assert torch.equal(torch.stack([*seen, out]), case["tokens"])
    for i, mine in enumerate(outputs):
        if f"logits_{i}" in case:
            assert torch.allclose(mine, case[f"logits_{i}"], atol=1e-4)
    assert len(outputs) == case.about["calls"]
