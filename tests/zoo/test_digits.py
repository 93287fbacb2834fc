"""`digits-mdlm`: its tasks, its sampler, the shipped weights and the recipe."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from elision import zoo
from elision.errors import OptionError, UnknownName
from elision.zoo import _training, digits_mdlm
from elision.zoo.digits import LETTERS, TASKS, Alphabet, expected, sample
from elision.zoo.digits_mdlm import DigitsMdlm, batch, fill


@pytest.fixture(scope="module")
def digits() -> DigitsMdlm:
    return zoo.load("digits-mdlm")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("#a6b7c5=", "a6+0=06,b7+6=13,c5+3=08,"),
        ("+a67b12c30=", "a6+7=13,b1+2=04,c3+0=03,"),
        ("+Y99Z99a00=", "Y9+9=18,Z9+9=19,a0+0=01,"),
        ("?a427b190|ba=", "b190,a427,"),
        ("@k381c902=", "k381,c902,"),
        ("<k381c902B777=", "c902,k381,B777,"),
    ],
)
def test_answers(prompt: str, answer: str) -> None:
    assert expected(prompt) == answer


def test_a_written_addition_is_the_sum() -> None:
    prompt, answer = sample("add", 512, np.random.default_rng(3))
    columns = [prompt[i : i + 3] for i in range(1, len(prompt) - 1, 3)]
    x, y = (int("".join(column[k] for column in reversed(columns))) for k in (1, 2))
    steps = answer.rstrip(",").split(",")
    written = steps[-1].split("=")[1] + "".join(step[-1] for step in reversed(steps[:-1]))
    assert int(written) == x + y


@pytest.mark.parametrize("task", TASKS)
def test_questions(task: str) -> None:
    for length in (32, 64, 256, 512):
        prompt, answer = sample(task, length, np.random.default_rng(length))
        again = sample(task, length, np.random.default_rng(length))
        assert (prompt, answer) == again
        assert expected(prompt) == answer
        assert len(prompt) + len(answer) <= length
        most = TASKS[task].most(length)
        assert most == len(LETTERS) or sum(map(len, TASKS[task](most + 1, np.random.default_rng(0)))) > length
        few = sample(task, length, np.random.default_rng(1), full=False)
        assert sum(map(len, few)) <= length


def test_no_letter_occurs_twice() -> None:
    rng = np.random.default_rng(0)
    for task in TASKS.values():
        body = task.draw(52, rng).split("|")[0]
        assert sorted(c for c in body if c in LETTERS) == sorted(LETTERS)


def test_alphabet() -> None:
    alphabet = Alphabet()
    text = "?a427b190|ba=b190,"
    assert alphabet.decode(alphabet.encode(text)) == text
    assert alphabet.decode([*alphabet.encode("a1"), alphabet.mask_id, alphabet.pad_id, 5]) == "a1_"
    with pytest.raises(OptionError, match="'é' is not in the alphabet"):
        alphabet.encode("é")


def test_refusals() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UnknownName, match="did you mean 'chain'"):
        sample("chains", 64, rng)
    with pytest.raises(OptionError, match="length=8"):
        sample("chain", 8, rng)
    with pytest.raises(OptionError, match="items=53"):
        TASKS["copy"](53, rng)
    with pytest.raises(OptionError, match="begins with no sign"):
        expected("a1=")
    with pytest.raises(OptionError, match="block=0"):
        fill(None, torch.zeros(1, 4, dtype=torch.long), [0], block=0)  # type: ignore[arg-type]


def oracle(target: torch.Tensor, confidence: torch.Tensor) -> object:
    """A "model" that knows the answer and is as sure of each place as it is told."""
    hot = torch.nn.functional.one_hot(target, len(Alphabet())).float() * confidence[..., None]
    return lambda ids: SimpleNamespace(logits=hot)


@pytest.mark.parametrize("per_step", [1, 2, 5])
def test_the_sampler_finishes_blocks_in_order_and_the_surest_first(per_step: int) -> None:
    rng = np.random.default_rng(0)
    target = torch.from_numpy(rng.integers(2, 12, size=(2, 24)))
    sure = torch.from_numpy(rng.uniform(5, 9, size=(2, 24)))
    prompt, block, order = [5, 7], 8, []
    ids = target.clone()
    for row, begin in zip(ids, prompt, strict=True):
        row[begin:] = 1
    open_before = []
    done = fill(
        oracle(target, sure),  # type: ignore[arg-type]
        ids,
        prompt,
        block=block,
        per_step=per_step,
        seen=lambda now, open_: open_before.append(open_.clone()),
    )
    assert torch.equal(done, target)
    open_before.append(torch.zeros_like(open_before[0]))
    for before, after in itertools.pairwise(open_before):
        for row, begin in enumerate(prompt):
            chosen = (before[row] & ~after[row]).nonzero().flatten().tolist()
            still = before[row].nonzero().flatten().tolist()
            eligible = [i for i in still if (i - begin) // block == (still[0] - begin) // block]
            assert sorted(chosen) == sorted(sorted(eligible, key=lambda i: -float(sure[row, i]))[:per_step])
            order += chosen
    assert len(order) == 2 * 24 - sum(prompt)


def test_noise_covers_answers_only() -> None:
    for frontier in (0.0, 1.0):
        noisy, clean, weight, position = batch(64, 32, np.random.default_rng(2), frontier)
        assert bool((position.diff() >= 1).all())
        assert int(position.max()) < digits_mdlm.CONFIG["max_position_embeddings"]
        masked = noisy == Alphabet.mask_id
        assert torch.equal(noisy[~masked], clean[~masked])
        assert torch.equal(masked, weight > 0)
        end = (clean == Alphabet().encode("=")[0]).int().argmax(1)  # the prompt ends with its first "="
        assert not (masked & (torch.arange(64) <= end[:, None])).any()
        assert (weight.sum(1) > 0).float().mean() > 0.9


def test_every_position_sees_every_other(digits: DigitsMdlm) -> None:
    ids, _, _ = digits.questions("copy", 64, 1)
    other = ids.clone()
    other[0, -1] = digits.encode("7")[0]
    with torch.no_grad():
        change = (digits.model(ids).logits - digits.model(other).logits).abs().amax(-1)[0]
    assert bool((change > 0).all())
    assert digits.model.config.num_hidden_layers >= 6


@pytest.mark.parametrize("task", ["chain", "add", "recall"])
def test_it_answers(digits: DigitsMdlm, task: str) -> None:
    """A small version of the card's measurement: nearly all of 16 short questions are answered exactly right."""
    ids, prompt, answers = digits.questions(task, 64, 16, seed=9)
    done = fill(digits.model, ids, prompt, per_step=2)
    right = digits.right(done)
    assert sum(right) >= 14
    texts = [digits.decode(row[begin:]) for row, begin in zip(done, prompt, strict=True)]
    assert right == [text == answer for text, answer in zip(texts, answers, strict=True)]


def test_a_wrong_answer_is_not_right(digits: DigitsMdlm) -> None:
    ids, prompt, answers = digits.questions("recall", 64, 1)
    for answer, verdict in ((answers[0], True), (answers[0][:-1], False), (answers[0] + ",", False)):
        row = torch.full((1, 64), digits.pad_id)
        row[0, : prompt[0]] = ids[0, : prompt[0]]
        row[0, prompt[0] : prompt[0] + len(answer)] = torch.tensor(digits.encode(answer))
        assert digits.right(row) == [verdict]


def test_the_recipe_runs_and_its_weights_load(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    zoo.train("digits-mdlm", tmp_path, steps=2, tokens=64, config={**small, "intermediate_size": 32})
    trained = zoo.load("digits-mdlm", tmp_path)
    assert next(trained.model.parameters()).dtype == torch.float32
    numbers = digits_mdlm.check(trained, {32: 2}, per_step=(4,))
    assert set(numbers["exact_match_4_per_step"]) == set(TASKS)
    on = digits_mdlm.train_model(steps=1, tokens=64, start=tmp_path, begin=0.9)
    assert on.config.hidden_size == 32  # type: ignore[union-attr]


@pytest.mark.parametrize("muon", [None, 0.02])
def test_training_reports_what_it_has(muon: float | None) -> None:
    """Both optimizers bring a small regression down, and the averaged module is handed out on the way."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8, bias=False))
    target, reports, losses = torch.randn(8, 8), [], []

    def loss(step: int) -> torch.Tensor:
        losses.append(torch.nn.functional.mse_loss(module(torch.arange(8)), target))
        return losses[-1]

    averaged = _training.fit(
        module, loss, steps=60, lr=0.02, muon=muon, warmup=1, every=20, keep=lambda n, m: reports.append((n, m))
    )
    assert reports == [(n, averaged) for n in (20, 40, 60)]
    assert losses[-1].item() < 0.6 * losses[0].item()
