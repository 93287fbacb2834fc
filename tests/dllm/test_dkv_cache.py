"""dKV-Cache: what the paper's method must satisfy exactly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision import dllm
from elision.dllm.decode import Step
from elision.dllm.engine import DllmApplied
from elision.dllm.methods.dkv_cache import DKVCache
from elision.dllm.passes import Net
from elision.errors import ElisionWarning, OptionError
from elision.tensors.slots import Rows
from tests.dllm.oracle import full_keys, overwritten
from tests.dllm.support import KINDS, MASK, Replay, lm_of, prompts, recorded_lm

P, G = 6, 12


def run(lm: dllm.MaskedLM, method: DKVCache, ids: Tensor, **how: Any) -> tuple[Tensor, dllm.DllmReport]:
    with elision.apply(lm, method) as applied:
        assert isinstance(applied, DllmApplied)
        out = applied.generate(ids, **{"gen_length": G, "steps": G, **how})
    return out, applied.report()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [False, True])
def test_n1_is_the_uncached_sampler_bit_for_bit(kind: str, shift: bool) -> None:
    lm, ids = lm_of(kind, shift=shift), prompts(2, P)
    logits: list[list[Tensor]] = [[], []]
    how: dict[str, Any] = {"gen_length": G, "steps": 6, "block_length": 6}
    plain = dllm.generate(lm, ids, on_step=lambda s, x, n: logits[0].append(x), **how)
    with pytest.warns(ElisionWarning, match="elided nothing: .* token-layers ran in 6 calls"):
        out, report = run(lm, DKVCache(interval=1), ids, on_step=lambda s, x, n: logits[1].append(x), **how)
    assert torch.equal(out, plain)
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
    assert report.full_calls == report.calls == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unequal", [False, True])
def test_a_partial_step_equals_a_full_pass_with_overwritten_rows(kind: str, unequal: bool) -> None:
    """Any set of positions, grouped heads or not, samples with sets of different sizes."""
    lm, n = lm_of(kind), 13
    old, new = prompts(2, n, seed=3), prompts(2, n, seed=4)
    net = Net(lm, old)
    chosen = torch.rand(2, n, generator=torch.Generator().manual_seed(5)) < 0.4
    if not unequal:
        chosen[1] = chosen[0].roll(3)
    step = Step(0, 0, 1, 0, n, 1, old, chosen, chosen, chosen, Rows.where(chosen), None)
    with torch.no_grad():
        net.full(step)
        held = [net.held.k(i).clone() for i in range(3)], [net.held.v(i).clone() for i in range(3)]
        step = Step(1, 1, 1, 0, n, 1, new, chosen, chosen, chosen, Rows.where(chosen), None)
        rows = Rows.where(chosen)
        h = net.part(step, rows)
        logits, exists = net.logits(h, rows, step)
    keys, values, oracle = overwritten(lm, new, ~chosen, held)
    assert exists is not None
    assert bool(exists.all())
    for i in range(2):
        assert torch.allclose(logits[i, : rows.count[i]], oracle[i][chosen[i]], atol=1e-4)
    for layer in range(3):
        assert torch.allclose(net.held.k(layer), keys[layer], atol=1e-4)
        assert torch.allclose(net.held.v(layer), values[layer], atol=1e-4)
    assert net.book.padding == (0 if not unequal else 3 * (2 * max(rows.count) - sum(rows.count)))


def test_the_order_of_rows_does_not_matter() -> None:
    """Permuting the query permutes the result; keys rotated before or after storage are the same keys."""
    lm = lm_of("gqa")
    block, h = lm.blocks[0], torch.randn(1, 9, 32)
    turn = lm.rotation(torch.arange(9)[None])
    with torch.no_grad():
        q, k, v = block.project(h, turn)
        perm = torch.randperm(9)
        out = block.attend(q, k, v, None)
        assert torch.allclose(block.attend(q[:, perm], k, v, None), out[:, perm], atol=1e-5)
        assert torch.allclose(block.attend(q, k[:, perm], v[:, perm], None), out, atol=1e-5)
        flat = lm.rotation(torch.zeros(1, 9, dtype=torch.long))
        _, raw, _ = block.project(h, flat)
        assert torch.allclose(turn.at(perm[None]).turn(raw[:, perm]), k[:, perm], atol=1e-5)


def spy(lm: dllm.MaskedLM, method: DKVCache, ids: Tensor, **how: Any) -> list[dict[str, Any]]:
    """Per call: tokens that went in at which positions, and the slots after it."""
    rows: list[dict[str, Any]] = []

    def on_step(step: Step, logits: Tensor, net: Net) -> None:
        rows.append(
            {
                "ids": step.ids.clone(),
                "masked": step.masked.clone(),
                "committed": step.committed.clone(),
                "query": net.book.query[-1].clone(),
                "full": net.book.depth[-1] == 0,
                "k": [net.held.k(i).clone() for i in range(lm.layers)],
            }
        )

    run(lm, method, ids, on_step=on_step, **how)
    return rows


def test_rows_enter_the_cache_from_their_real_token() -> None:
    """First-layer keys depend on the token alone: once cached they are those of the decided id, never of [MASK]."""
    lm, ids = lm_of("mha"), prompts(2, P)
    rows = spy(lm, DKVCache(interval=5), ids)
    cached = 0
    for before, now in itertools.pairwise(rows):
        stale = ~now["query"]
        if not stale.any():
            continue
        cached += int(stale.sum())
        true, _, _ = full_keys(lm, now["ids"])
        assert bool((now["ids"][stale] != MASK).all())
        assert torch.allclose(now["k"][0][stale], true[0][stale], atol=1e-5)
        assert bool(now["query"][now["committed"]].all())  # computed once more after the decision
        for k, old in zip(now["k"], before["k"], strict=True):
            assert torch.equal(k[stale], old[stale])  # bit-identical between refreshes
    assert cached > 50


def test_without_delay_rows_are_frozen_as_masks() -> None:
    lm, ids = lm_of("mha"), prompts(1, P)
    rows = spy(lm, DKVCache(interval=12, delay=False), ids)
    mask = torch.full((1, P + G), MASK)
    frozen = full_keys(lm, mask)[0][0]  # first-layer keys of [MASK] at every position
    for now in rows[2:]:
        just = now["committed"]
        assert just.any()
        assert not now["query"][just].any()
        assert torch.allclose(now["k"][0][just], frozen[just], atol=1e-5)


def test_delay_keeps_the_uncached_logits_closer() -> None:
    """The damage of freezing masks is large on any model; delayed caching of the same rows does far less."""
    lm, ids = lm_of("mha", layers=4), prompts(4, 16)
    errors = {}
    for delay in (True, False):
        seen: list[float] = []

        def on_step(step: Step, logits: Tensor, net: Net, seen: list[float] = seen) -> None:
            true = lm.logits(step.ids)
            picked = true.gather(1, step.need.pos[:, :, None].expand(-1, -1, true.shape[-1]))
            seen.append(float((logits - picked).norm() / picked.norm()))

        run(lm, DKVCache(interval=24, delay=delay), ids, gen_length=24, steps=24, on_step=on_step)
        errors[delay] = sum(seen) / len(seen)
    assert errors[True] < 0.75 * errors[False]


def test_everything_changes_at_a_refresh() -> None:
    rows = spy(lm_of("gqa"), DKVCache(interval=4), prompts(1, P))
    assert [row["full"] for row in rows] == [i % 4 == 0 or i == 1 for i in range(G)]
    for i in (4, 8):
        for layer in (1, 2):  # above the first layer every row saw the other tokens change
            differ = (rows[i]["k"][layer] != rows[i - 1]["k"][layer]).flatten(2).any(-1)
            assert bool(differ.all())


@pytest.mark.parametrize("interval", [2, 3, 4, 100])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_counters_in_closed_form(interval: int, n: int) -> None:
    """full = L, partial i = L − |prompt| − n·(i−1); the cache ratio is one minus their share."""
    lm, batch, layers = lm_of("mha"), 2, 3
    steps, length = G // n, P + G
    _, report = run(lm, DKVCache(interval=interval), prompts(batch, P), steps=steps)
    full = [i == 1 or i % interval == 0 for i in range(steps)]
    rows = [length if f else length - P - n * (i - 1) for i, f in enumerate(full)]
    assert report.token_layers == batch * layers * sum(rows)
    assert report.last is not None
    assert report.last.query.sum(dim=(1, 2)).tolist() == [batch * r for r in rows]
    assert report.full_calls == sum(full)
    assert report.cache_ratio == pytest.approx(1 - sum(rows) / (steps * length))
    assert report.token_layers == int(report.last.computed().sum())


@pytest.mark.parametrize("variant", ["decode", "prefill", "pd", "greedy"])
@pytest.mark.parametrize("shift", [False, True])
def test_only_masked_positions_change(variant: str, shift: bool) -> None:
    lm, ids = lm_of("gqa", shift=shift), prompts(2, P)
    rows: list[Step] = []
    out, report = run(
        lm,
        DKVCache(variant=variant, interval=4),
        ids,
        steps=6,
        block_length=6,
        remasking="random_order" if variant == "greedy" else "low_confidence",
        on_step=lambda step, logits, net: rows.append(step),
    )
    assert report.last is not None
    assert torch.equal(out[:, :P], ids)
    assert MASK not in out
    for i, (step, after) in enumerate(zip(rows, [*[r.ids for r in rows[1:]], out], strict=True)):
        changed = step.ids != after
        assert not bool((changed & ~step.masked).any())
        source = changed.roll(-1, 1) if shift else changed
        assert not bool((source & ~report.last.query[i]).any())  # skipped positions decide nothing


def test_greedy_with_the_whole_window_and_n1_is_uncached() -> None:
    lm, ids = lm_of("mha"), prompts(2, P)
    order = {("order", b): torch.rand(2, P + G) for b in range(2)}
    how: dict[str, Any] = {"steps": 6, "block_length": 6, "noise": Replay(order)}
    plain = dllm.generate(lm, ids, gen_length=G, remasking="random_order", **how)
    with pytest.warns(ElisionWarning, match="elided nothing"):
        out, _ = run(lm, DKVCache(variant="greedy", interval=1, window=P + G), ids, **how)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("window", [0, 1, 3, 4, 7, 40])
@pytest.mark.parametrize("n", [1, 2])
def test_greedy_walks_outwards(window: int, n: int) -> None:
    """The set of every partial call against the walk written out position by position; samples differ in size."""
    lm, ids = lm_of("mha"), prompts(3, P)
    steps: list[Step] = []
    method = DKVCache(variant="greedy", interval=99, window=window)
    _, report = run(lm, method, ids, steps=G // n, on_step=lambda s, x, net: steps.append(s))
    assert report.last is not None
    for i, step in enumerate(steps[1:], 1):
        assert step.next is not None
        assert step.order is not None
        for b in range(3):
            expected = {p for p in range(P + G) if step.next[b, p] or step.committed[b, p]}
            anchors = [p for p in range(P + G) if step.next[b, p]]
            for anchor in sorted(anchors, key=lambda p: -float(step.order[b, p])):
                added, offset = 0, 1
                while added < window and (anchor - offset >= 0 or anchor + offset < P + G):
                    for p in (anchor - offset, anchor + offset):
                        free = 0 <= p < P + G and p not in expected and bool(step.masked[b, p] or step.committed[b, p])
                        if free and added < window:
                            expected.add(p)
                            added += 1
                    offset += 1
            assert set(report.last.query[i, b].nonzero()[:, 0].tolist()) == expected
    sizes = report.last.query.sum(dim=2)
    assert report.last.padding == 3 * int((sizes.max(dim=1, keepdim=True).values - sizes).sum())


def test_greedy_window_on_the_committed() -> None:
    lm, ids = lm_of("mha"), prompts(2, P)
    steps: list[Step] = []
    method = DKVCache(variant="greedy", interval=99, window=3, window_on="committed")
    _, report = run(lm, method, ids, on_step=lambda s, x, net: steps.append(s))
    assert report.last is not None
    for i, step in enumerate(steps[1:], 1):
        assert step.next is not None
        for b in range(2):
            expected = {p for p in range(P + G) if step.next[b, p] or step.committed[b, p]}
            for d in step.committed[b].nonzero()[:, 0].tolist():
                expected |= {p for p in range(d - 2, d + 2) if 0 <= p < P + G and step.masked[b, p]}
            assert set(report.last.query[i, b].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("n", [1, 2])
def test_greedy_on_shifted_models_computes_the_rows_that_predict(n: int) -> None:
    """Otherwise nothing could be decided between two refreshes."""
    lm, ids = lm_of("gqa", shift=True), prompts(2, P)
    steps: list[Step] = []
    method = DKVCache(variant="greedy", interval=99, window=0)
    _, report = run(lm, method, ids, steps=G // n, on_step=lambda s, x, net: steps.append(s))
    assert report.last is not None
    assert report.calls == G // n
    assert report.full_calls == 1
    for i, step in enumerate(steps[1:], 1):
        assert step.next is not None
        assert step.committed.sum(dim=1).tolist() == [n, n]
        assert torch.equal(report.last.query[i], step.next | step.committed | step.next.roll(-1, 1))


def test_greedy_without_delay_leaves_out_what_was_just_committed() -> None:
    steps: list[Step] = []
    method = DKVCache(variant="greedy", interval=99, window=2, delay=False)
    _, report = run(lm_of("mha"), method, prompts(2, P), on_step=lambda s, x, net: steps.append(s))
    assert report.last is not None
    for i, step in enumerate(steps[1:], 1):
        assert step.next is not None
        assert not bool((report.last.query[i] & step.committed).any())
        assert bool((report.last.query[i] >= step.next).all())
        assert bool((report.last.query[i] <= step.masked).all())


def test_shifted_blocks_keep_what_earlier_blocks_decided() -> None:
    """Only after the very first call are the prompt's rows all that is kept."""
    steps: list[Step] = []
    lm, ids = lm_of("gqa", shift=True), prompts(2, P)
    _, report = run(lm, DKVCache(interval=99), ids, block_length=6, on_step=lambda s, x, net: steps.append(s))
    assert report.last is not None
    second = next(i for i, step in enumerate(steps) if step.i == 1 and step.n > 1)
    assert torch.equal(report.last.query[1], (torch.arange(P + G) >= P - 1).expand(2, -1))
    assert torch.equal(report.last.query[second], steps[second].before.roll(-1, 1))


def test_greedy_needs_a_known_order() -> None:
    with pytest.raises(OptionError, match="decodes with remasking='random_order'"):
        run(lm_of("mha"), DKVCache(variant="greedy"), prompts(1, P), remasking="low_confidence")


@pytest.mark.parametrize("variant", ["prefill", "pd"])
@pytest.mark.parametrize("shift", [False, True])
def test_the_prompt_is_computed_once(variant: str, shift: bool) -> None:
    lm, ids = lm_of("gqa", shift=shift), prompts(2, P)
    pointers: set[int] = set()
    kept: list[Tensor] = []

    def on_step(step: Step, logits: Tensor, net: Net) -> None:
        pointers.add(net.held.k(2).data_ptr())
        kept.append(net.held.k(2)[:, : P - int(shift)].clone())

    _, report = run(lm, DKVCache(variant=variant, interval=3), ids, on_step=on_step)
    assert report.last is not None
    assert len(pointers) == 1
    assert all(torch.equal(kept[0], later) for later in kept)
    assert not report.last.query[1:, :, : P - int(shift)].any()
    assert report.full_calls == 1
    if variant == "prefill":
        assert bool(report.last.query[:, :, P - int(shift) :].all())


@pytest.mark.parametrize("shift_type", ["un", "un_right", "right"])
def test_the_shift_invariant_and_its_counter_example(shift_type: str) -> None:
    """Under un and un_right every masked token t + 1 has its predicting row t in R; under right it has not."""
    lm = recorded_lm("dkv-cache", "gqa", shift=True)
    violated = 0
    for seed in range(3):
        rows = spy(lm, DKVCache(interval=6, shift_type=shift_type), prompts(1, P, seed), remasking="entropy")
        for row in rows:
            predicting = row["masked"].roll(-1, 1)
            predicting[:, -1] = False
            violated += int((predicting & ~row["query"]).sum())
    assert (violated > 0) == (shift_type == "right")


@pytest.mark.parametrize("method", [DKVCache(interval=4), DKVCache(interval=4, shift_type="un_right")])
@pytest.mark.parametrize("shift", [False, True])
def test_samples_with_unequal_counts(method: DKVCache, shift: bool) -> None:
    """A threshold commits different numbers per sample; each sample is decoded as if it were alone."""
    lm, ids = lm_of("gqa", shift=shift, layers=2), prompts(3, P)
    how: dict[str, Any] = {"threshold": 0.95, "block_length": 6, "steps": None}
    together, report = run(lm, method, ids, **how)
    assert report.last is not None
    sizes = report.last.query.sum(dim=2)
    assert bool((sizes != sizes[:, :1]).any())
    for i in range(3):
        alone, _ = run(lm, method, ids[i : i + 1], **how)
        assert torch.equal(together[i : i + 1], alone)


def test_each_branch_of_guidance_has_slots_of_its_own() -> None:
    lm, ids = lm_of("mha"), prompts(2, P)
    batches: list[int] = []
    how: dict[str, Any] = {"cfg_scale": 1.0, "steps": 6}
    plain = dllm.generate(lm, ids, gen_length=G, **how)
    with pytest.warns(ElisionWarning):
        out, _ = run(lm, DKVCache(interval=1), ids, on_step=lambda s, x, net: batches.append(net.held.shape[0]), **how)
    assert torch.equal(out, plain)
    assert set(batches) == {4}
    _, report = run(lm, DKVCache(interval=4), ids, **how)
    assert report.last is not None
    assert torch.equal(report.last.query[:, :2], report.last.query[:, 2:])
    assert report.cache_ratio > 0.25


@pytest.mark.parametrize("variant", ["decode", "prefill", "pd", "greedy"])
@pytest.mark.parametrize("shift", [False, True])
def test_a_left_padded_sample_is_decoded_as_alone(variant: str, shift: bool) -> None:
    lm, ids, pad = lm_of("qk_norm", shift=shift), prompts(2, P), 3
    mask = torch.ones(2, P, dtype=torch.long)
    mask[0, :pad] = 0
    order = torch.rand(2, P + G, generator=torch.Generator().manual_seed(2))
    method = DKVCache(variant=variant, interval=5, window=2)
    how: dict[str, Any] = {"steps": 6, "cfg_scale": 0.4}
    together, _ = run(lm, method, ids, attention_mask=mask, noise=Replay({("order", 0): order}), **how)
    for b, start in ((0, pad), (1, 0)):
        noise = Replay({("order", 0): order[b : b + 1, start:]})
        alone, _ = run(lm, method, ids[b : b + 1, start:], noise=noise, **how)
        assert torch.equal(together[b : b + 1, start:], alone)
