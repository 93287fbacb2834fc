from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elision import dllm
from elision.bench.dllm.measure import Arm, run
from elision.bench.dllm.subject import DllmSubject, load_dllm
from elision.errors import OptionError, UnknownName, UnsupportedTarget
from elision.zoo.digits import expected
from elision.zoo.digits_mdlm import save
from tests.bench.dllm.conftest import small_digits


@pytest.mark.parametrize("length", [64, 128, 256, 512])
@pytest.mark.parametrize("task", ["chain", "add", "recall", "copy", "sort"])
def test_questions_fit(tiny: DllmSubject, task: str, length: int) -> None:
    question = tiny.question(task, length, 3)
    assert question is tiny.question(task, length, 3)
    assert length - 2 * question.block < question.total <= length
    assert question.gen_length % question.block == 0
    assert question.answer is not None
    assert len(question.answer) <= question.gen_length
    prompt = tiny.decode(question.ids[0].tolist())
    assert expected(prompt) == question.answer
    other = tiny.question(task, length, 4)
    assert other.ids.shape == question.ids.shape  # questions of a task can share a batch
    assert not torch.equal(other.ids, question.ids)


def test_bad_questions(tiny: DllmSubject) -> None:
    with pytest.raises(UnknownName, match="task"):
        tiny.question("chains", 64, 0)
    with pytest.raises(OptionError, match="at least 32"):
        tiny.question("chain", 16, 0)


def test_flops_are_those_that_run(tiny: DllmSubject) -> None:
    question = tiny.question("chain", 64, 0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outcome = run(tiny, Arm.of("no_cache"), question)[1]
    assert outcome.flops == counter.get_total_flops()


def test_folders_of_the_zoo_are_known(tmp_path: Path) -> None:
    save(small_digits().model, tmp_path / "mine")
    found = load_dllm(str(tmp_path / "mine"))
    assert found.name == "mine"
    assert "chain" in found.tasks
    assert found.lm.layers == 3


def test_other_models_continue_prompts() -> None:
    model = small_digits().model
    with pytest.raises(OptionError, match="give prompts"):
        load_dllm(dllm.masked_lm(model))
    found = load_dllm(dllm.masked_lm(model), [torch.tensor([5, 6, 7]), torch.tensor([9, 10])])
    question = found.question("prompt", 40, 1)
    assert question.ids.tolist() == [[9, 10]]
    assert question.gen_length == 32
    outcome = run(found, Arm.of("dkv_cache"), question)[1]
    assert outcome.exact is None
    assert outcome.tokens == 32


def test_what_is_no_such_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import elision.zoo

    monkeypatch.setattr(elision.zoo, "load", lambda name, folder=None: object())
    with pytest.raises(UnsupportedTarget, match="masked-diffusion"):
        load_dllm("garments-flux")
    with pytest.raises(UnsupportedTarget, match=r"no config\.json"):
        load_dllm(str(tmp_path))
    digits = small_digits()
    assert load_dllm(load_dllm(digits)).name == "digits-mdlm"
