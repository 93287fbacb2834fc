"""The sampler: what it commits, when, and in which order, against formulas written out slowly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from elision import dllm
from elision.dllm.decode import Decoding, Noise, Sampler, Step
from elision.errors import OptionError, UnknownName
from tests.dllm.support import MASK, Replay, lm_of, prompts


class Script:
    """A model whose logits are a fixed table [N, V] of positions: row p says what is predicted for p."""

    def __init__(self, table: Tensor, shift: bool = False) -> None:
        self.table, self.shift, self.steps = table, shift, list[Step]()

    def __call__(self, step: Step) -> tuple[Tensor, None]:
        self.steps.append(step)
        return self.table[step.need.pos + int(self.shift)], None


def table(length: int, seed: int = 0, vocab: int = 12) -> Tensor:
    return torch.randn(length, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def sample(batch: int = 1, shift: bool = False, noise: Noise | None = None, **settings: Any) -> tuple[Tensor, Script]:
    decoding = Decoding.of(**settings)
    script = Script(table(4 + decoding.gen_length), shift)
    sampler = Sampler(torch.zeros(batch, 4, dtype=torch.long), decoding, mask_id=11, shift=shift, noise=noise)
    return sampler.run(script), script


def order_of(script: Script, out: Tensor) -> list[list[int]]:
    """Positions committed at every call, of the first sample."""
    masks = [step.masked[0] for step in script.steps] + [torch.zeros_like(script.steps[0].masked[0])]
    return [(a & ~b).nonzero()[:, 0].tolist() for a, b in itertools.pairwise(masks)]


def confidence(rows: Tensor) -> Tensor:
    """Probability of the most probable token that is not [MASK]."""
    p = rows.double().softmax(-1)
    return p[:, :11].max(-1).values


def test_blocks_from_left_to_right_and_equal_parts() -> None:
    out, script = sample(gen_length=12, steps=8, block_length=6)
    counts = [len(c) for c in order_of(script, out)]
    assert counts == [2, 2, 1, 1, 2, 2, 1, 1]
    assert all(4 <= p < 10 for c in order_of(script, out)[:4] for p in c)
    assert all(10 <= p < 16 for c in order_of(script, out)[4:] for p in c)
    assert [(s.n, s.i, s.start, s.end) for s in script.steps[3:6]] == [(3, 3, 4, 10), (4, 0, 10, 16), (5, 1, 10, 16)]


def test_a_block_ends_when_nothing_is_left_to_decide() -> None:
    """More scheduled calls than tokens: the first ones commit one each, and no call is made for nothing."""
    out, script = sample(gen_length=6, steps=16, block_length=3)
    assert [len(c) for c in order_of(script, out)] == [1] * 6
    assert [(s.n, s.i, s.start) for s in script.steps] == [
        (0, 0, 4),
        (1, 1, 4),
        (2, 2, 4),
        (3, 0, 7),
        (4, 1, 7),
        (5, 2, 7),
    ]


def test_low_confidence_commits_the_most_probable_first() -> None:
    out, script = sample(gen_length=8, steps=4)
    best = confidence(table(12)[4:])
    order = (best.argsort(descending=True) + 4).tolist()
    committed = order_of(script, out)
    assert [sorted(order[2 * i : 2 * i + 2]) for i in range(4)] == committed
    assert out[0, 4:].tolist() == table(12)[4:, :11].argmax(-1).tolist()


def test_threshold_commits_all_above_it_and_at_least_one() -> None:
    out, script = sample(gen_length=8, threshold=0.6)
    best = confidence(table(12)[4:])
    sure = (best >= 0.6).nonzero()[:, 0] + 4
    rest = [p for p in (best.argsort(descending=True) + 4).tolist() if p not in sure]
    assert order_of(script, out) == [sure.tolist(), *[[p] for p in rest]]
    assert all(step.calls is None and not step.overtime for step in script.steps)


def test_the_window_is_the_left_most_masks_and_slides() -> None:
    out, script = sample(gen_length=10, threshold=1.5, window=3)
    committed = order_of(script, out)
    left = list(range(4, 14))
    for step, gone in zip(script.steps, committed, strict=True):
        assert step.eligible[0].nonzero()[:, 0].tolist() == left[:3]
        assert step.need.pos[0].tolist() == left[:3]
        assert len(gone) == 1
        left.remove(gone[0])


def test_the_order_is_known_beforehand() -> None:
    order = torch.rand(1, 12)
    out, script = sample(gen_length=8, steps=4, remasking="random_order", noise=Replay({("order", 0): order}))
    best = (order[0, 4:].argsort(descending=True) + 4).tolist()
    assert order_of(script, out) == [sorted(best[2 * i : 2 * i + 2]) for i in range(4)]
    for step, gone in zip(script.steps, order_of(script, out), strict=True):
        assert step.next is not None
        assert step.next[0].nonzero()[:, 0].tolist() == gone
    with pytest.raises(OptionError, match="fixes the order beforehand"):
        sample(gen_length=8, remasking="random_order", threshold=0.5)


def test_random_remasking_draws_at_every_call() -> None:
    drawn = {("confidence", i): torch.rand(1, 12) for i in range(4)}
    out, script = sample(gen_length=8, steps=4, remasking="random", noise=Replay(drawn))
    left = list(range(4, 12))
    for i, gone in enumerate(order_of(script, out)):
        numbers = drawn["confidence", i][0]
        assert gone == sorted(sorted(left, key=lambda p: -float(numbers[p]))[:2])
        left = [p for p in left if p not in gone]


@pytest.mark.parametrize("alg", ["entropy", "maskgit_plus", "topk_margin"])
@pytest.mark.parametrize("steps", [5, 8, 16])
def test_dream(alg: str, steps: int) -> None:
    """Confidence and the time grid, with outputs shifted by one."""
    out, script = sample(gen_length=16, steps=steps, remasking=alg, shift=True)
    p = table(20)[4:].softmax(-1)
    two = p.topk(2, -1).values
    score = {
        "entropy": (p * (p + 1e-10).log()).sum(-1),
        "maskgit_plus": p[:, :11].max(-1).values,
        "topk_margin": two[:, 0] - two[:, 1],
    }[alg]
    order = (score.argsort(descending=True) + 4).tolist()
    grid = torch.linspace(1, 1e-3, steps + 1)
    left, expected = 16, []
    for i in range(steps):
        n = left if i == steps - 1 else int(torch.tensor(float(left)) * (1 - grid[i + 1] / grid[i]))
        expected.append(sorted(order[16 - left : 16 - left + n]))
        left -= n
    assert order_of(script, out) == expected
    for step in script.steps:
        assert step.need.pos[0].tolist() == [p - 1 for p in step.eligible[0].nonzero()[:, 0].tolist()]


def test_only_masks_change_and_the_mask_is_never_chosen() -> None:
    decoding = Decoding(gen_length=6, steps=6)
    rows = table(10)
    rows[:, 11] = 50.0  # the model always wants the mask token
    script = Script(rows)
    out = Sampler(torch.full((1, 4), 3), decoding, mask_id=11, shift=False).run(script)
    assert out[0, :4].tolist() == [3] * 4
    assert 11 not in out
    before = torch.cat((torch.full((1, 4), 3), torch.full((1, 6), 11)), dim=1)
    for step in [*script.steps[1:]]:
        assert torch.equal(step.ids[~step.committed], before[~step.committed])
        assert bool((before[step.committed] == 11).all())
        before = step.ids


def test_samples_of_a_batch_are_independent() -> None:
    lm, ids = lm_of("gqa"), prompts(3, 6)
    for how in (
        {"steps": 8, "block_length": 4},
        {"threshold": 0.3, "block_length": 4},
        {"threshold": 0.3, "window": 5},
    ):
        together = dllm.generate(lm, ids, gen_length=8, **how)
        for i in range(3):
            assert torch.equal(together[i : i + 1], dllm.generate(lm, ids[i : i + 1], gen_length=8, **how)), how


def test_a_left_padded_sample_is_decoded_as_alone() -> None:
    for shift in (False, True):
        lm, ids = lm_of("gqa", shift=shift), prompts(2, 8)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        both = dllm.generate(lm, ids, attention_mask=mask, gen_length=8, steps=8)
        alone = dllm.generate(lm, ids[1:, 3:], gen_length=8, steps=8)
        assert torch.equal(both[1, 3:], alone[0])
        assert torch.equal(both[0], dllm.generate(lm, ids[:1], gen_length=8, steps=8)[0])


def test_guidance() -> None:
    """Logits are those of two passes, the second over a masked prompt; weight 0 is no guidance."""
    lm, ids = lm_of("mha"), prompts(2, 6)
    seen: list[tuple[Step, Tensor]] = []
    dllm.generate(
        lm, ids, gen_length=6, steps=3, cfg_scale=1.5, on_step=lambda s, logits, net: seen.append((s, logits))
    )
    for step, logits in seen:
        blank = step.ids.clone()
        blank[:, :6] = MASK
        given, free = lm.logits(step.ids), lm.logits(blank)
        whole = free + 2.5 * (given - free)
        picked = whole.gather(1, step.need.pos[:, :, None].expand(-1, -1, whole.shape[-1]))
        assert torch.allclose(logits, picked, atol=1e-4)
    plain = dllm.generate(lm, ids, gen_length=6, steps=3)
    assert torch.equal(dllm.generate(lm, ids, gen_length=6, steps=3, cfg_scale=0.0), plain)


@pytest.mark.parametrize("remasking", ["low_confidence", "random", "random_order", "entropy"])
def test_temperature_is_reproducible_and_spreads(remasking: str) -> None:
    lm, ids = lm_of("mha"), prompts(1, 5)

    def once(seed: int) -> Tensor:
        how: dict[str, Any] = {
            "temperature": 1.5,
            "remasking": remasking,
            "generator": torch.Generator().manual_seed(seed),
        }
        return dllm.generate(lm, ids, gen_length=8, steps=4, **how)

    assert torch.equal(once(3), once(3))
    assert len({tuple(once(seed)[0].tolist()) for seed in range(6)}) > 1
    assert MASK not in once(0)


def test_gumbel_noise_samples_the_softmax() -> None:
    """Frequencies of the first committed token against softmax(logits / τ)."""
    rows = torch.tensor([[1.0, 0.0, -1.0, 0.5] + [-30.0] * 8])
    decoding = Decoding(gen_length=1, steps=1, temperature=2.0)
    noise = Noise(torch.Generator().manual_seed(0))
    counts = torch.zeros(12)
    for _ in range(2000):
        sampler = Sampler(torch.zeros(1, 1, dtype=torch.long), decoding, 11, False, noise)
        counts[int(sampler.run(lambda step: (rows[None], None))[0, 1])] += 1
    assert torch.allclose(counts / 2000, (rows[0] / 2).softmax(-1), atol=0.04)


def test_an_unguessable_candidate_waits_or_becomes_zero() -> None:
    """Where logits do not exist: skip leaves the mask for a later call, zero commits token 0 first."""
    rows = table(10)
    lost = 6

    def call(step: Step) -> tuple[Tensor, Tensor]:
        return rows[step.need.pos], (step.need.pos != lost) | step.overtime

    made = {}
    for missing in ("skip", "zero"):
        sampler = Sampler(
            torch.zeros(1, 4, dtype=torch.long), Decoding(gen_length=6, steps=3, missing=missing), 11, False
        )
        made[missing] = (sampler.run(call), sampler.n)
    assert made["zero"][0][0, lost] == 0
    assert made["zero"][1] == 3
    assert made["skip"][0][0, lost] == rows[lost, :11].argmax()
    assert made["skip"][1] == 4  # one more call, beyond the schedule


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"gen_lenght": 8}, UnknownName, "did you mean 'gen_length'"),
        ({"gen_length": 0}, OptionError, "gen_length=0 is not a whole number of at least 1"),
        ({"gen_length": 10, "block_length": 4}, OptionError, "no multiple of block_length=4"),
        ({"gen_length": 8, "block_length": 4, "steps": 5}, OptionError, "cannot be shared equally by 2 blocks"),
        ({"remasking": "lowest"}, OptionError, "remasking='lowest' is not one of"),
        ({"schedule": "log"}, OptionError, "schedule='log'"),
        ({"temperature": -1.0}, OptionError, "temperature=-1.0"),
        ({"cfg_scale": float("nan")}, OptionError, "cfg_scale=nan"),
        ({"window": 4, "block_length": 4, "gen_length": 8}, OptionError, "two ways to go from left to right"),
        ({"window": True}, OptionError, "window=True"),
        ({"temperature": None}, OptionError, "temperature=None is out of range"),
        ({"threshold": "0.9"}, OptionError, "threshold='0.9' is out of range"),
        ({"threshold": -0.5}, OptionError, "threshold=-0.5 is out of range"),
        ({"gen_length": 12, "steps": 3, "window": 2}, OptionError, "window=2 is smaller than the 4 tokens"),
        ({"max_new_tokens": 8}, UnknownName, "here it is called 'gen_length'"),
        ({"alg": "entropy"}, UnknownName, "here it is called 'remasking'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        dllm.generate(lm_of("mha"), prompts(1, 4), **settings)


@pytest.mark.parametrize(
    ("prompt", "mask", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), None, "give token ids"),
        (torch.zeros(2, 3), None, "give token ids"),
        (torch.zeros(0, 3, dtype=torch.long), None, "give token ids"),
        (torch.zeros(2, 3, dtype=torch.bool), None, "give token ids"),
        (torch.tensor([[1, 48]]), None, "hold 48: token ids go from 0 to 47"),
        (torch.tensor([[1, -1]]), None, "hold -1: token ids"),
        (torch.tensor([[1, 47]]), None, r"hold the \[MASK\] token 47"),
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4), "does not fit"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]]), "pad prompts on the left"),
    ],
)
def test_bad_prompts(prompt: Tensor, mask: Tensor | None, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        dllm.generate(lm_of("mha"), prompt, attention_mask=mask, gen_length=4)


def test_a_single_prompt_needs_no_batch() -> None:
    lm, ids = lm_of("mha"), prompts(1, 4)
    assert torch.equal(dllm.generate(lm, ids.int(), gen_length=4), dllm.generate(lm, ids, gen_length=4))
    assert torch.equal(dllm.generate(lm, ids[0], gen_length=4), dllm.generate(lm, ids, gen_length=4))
