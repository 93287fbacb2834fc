"""Elastic-Cache: what the paper's method must satisfy exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision import dllm
from elision.dllm import drift
from elision.dllm.decode import Step
from elision.dllm.engine import DllmApplied
from elision.dllm.methods import elastic_cache_dllm
from elision.dllm.methods.elastic_cache_dllm import NO_TEST, ElasticCache
from elision.dllm.passes import Net
from elision.errors import ElisionWarning, OptionError
from tests.dllm.box import Box
from tests.dllm.oracle import full_keys
from tests.dllm.support import KINDS, lm_of, prompts

P, G, L = 7, 14, 4
ANY: dict[str, Any] = {"beta": 4, "eps": 0.9}


def run(
    lm: dllm.MaskedLM,
    ids: Tensor,
    *,
    method: ElasticCache | None = None,
    gen: int = G,
    on_step: Any = None,
    **options: Any,
) -> tuple[Tensor, dllm.DllmReport]:
    with elision.apply(lm, method or ElasticCache(**{**ANY, **options})) as applied:
        assert isinstance(applied, DllmApplied)
        out = applied.generate(ids, gen_length=gen, on_step=on_step)
    return out, applied.report()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_force_full_is_the_uncached_window_decoder_bit_for_bit(kind: str, shift: bool, batch: int) -> None:
    lm, ids = lm_of(kind, shift=shift, layers=L), prompts(batch, P)
    logits: list[list[Tensor]] = [[], []]
    plain = dllm.generate(lm, ids, gen_length=G, window=4, threshold=0.9, on_step=lambda s, x, n: logits[0].append(x))
    with pytest.warns(ElisionWarning, match="elided nothing"):
        out, report = run(lm, ids, force_full=True, batch="together", on_step=lambda s, x, n: logits[1].append(x))
    assert torch.equal(out, plain)
    assert len(logits[0]) == len(logits[1])
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
    assert report.full_calls == report.calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_over_everything_with_every_row_queried_is_uncached(kind: str) -> None:
    """β ≥ |M| and Q = I: reuse overwrites every row, so its logits are those of a plain pass, whatever is decided."""
    lm, ids = lm_of(kind, layers=L), prompts(1, 2)
    logits: list[Tensor] = []
    true: list[Tensor] = []

    def on_step(step: Step, got: Tensor, net: Net) -> None:
        logits.append(got)
        true.append(lm.logits(step.ids).gather(1, step.need.pos[:, :, None].expand(-1, -1, got.shape[-1])))

    # as many tracked tokens as there are positions, so that all decided ones are in Q besides all masks
    with pytest.warns(ElisionWarning, match="elided nothing"):
        out, report = run(lm, ids, gen=8, beta=8, eps=1.5, gamma=-1, track=10, on_step=on_step)
    assert report.last is not None
    assert bool(report.last.query.all())
    assert report.last.depth.tolist() == [0] + [L] * (len(logits) - 1)
    assert len(logits) == 8
    for ours, plain in zip(logits, true, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)
    assert torch.equal(out, dllm.generate(lm, ids, gen_length=8, threshold=1.5))


@pytest.mark.parametrize("shift", [False, True])
def test_below_minus_one_it_never_refreshes(shift: bool) -> None:
    lm = lm_of("gqa", shift=shift, layers=L)
    _, report = run(lm, prompts(1, P), gamma=-1.0)
    last = report.last
    assert last is not None
    assert last.full_calls == 1
    assert last.depth.tolist() == [0] + [L] * (last.calls - 1)
    per_step = last.computed().sum(dim=(1, 2))
    assert torch.equal(per_step[1:], L * last.query[1:].sum(dim=(1, 2)))
    assert last.token_layers == int(per_step.sum())


def test_above_one_it_refreshes_every_layer_but_the_first() -> None:
    """And the first layer's K and V are exact, since they depend on the tokens alone."""
    lm, checked = lm_of("gqa", layers=L), 0

    def on_step(step: Step, logits: Tensor, net: Net) -> None:
        nonlocal checked
        keys, values, _ = full_keys(lm, step.ids)
        assert torch.allclose(net.held.k(0), keys[0], atol=1e-5)
        assert torch.allclose(net.held.v(0), values[0], atol=1e-5)
        checked += 1

    _, report = run(lm, prompts(1, P), gamma=1.5, on_step=on_step)
    last = report.last
    assert last is not None
    assert last.depth.tolist() == [0] + [1] * (last.calls - 1)
    whole = (L - 1) * (P + G)
    assert torch.equal(last.computed().sum(dim=(1, 2))[1:], whole + last.query[1:].sum(dim=(1, 2)))
    assert checked == last.calls > 4


def test_above_a_trigger_inputs_are_stored_ones_mixed_with_fresh_rows() -> None:
    """K of layer ℓ* + 1 is the projection of the mixed inputs; layers up to ℓ* change on rows Q only."""
    lm, seen = lm_of("mha", layers=L), 0
    state: dict[str, Any] = {}

    def on_step(step: Step, logits: Tensor, net: Net) -> None:
        nonlocal seen
        now = [(net.held.k(i).clone(), net.held.v(i).clone(), net.held.h(i).clone()) for i in range(L)]
        depth, query = net.book.depth[-1], net.book.query[-1]
        if depth > 0:
            for layer in range(depth):
                for new, old in zip(now[layer], state["now"][layer], strict=True):
                    assert torch.equal(new[~query], old[~query])
        if 0 < depth < L:
            seen += 1
            mixed, layer = now[depth][2], lm.model.model.layers[depth]
            assert torch.equal(mixed[~query], state["now"][depth][2][~query])
            x = layer.input_layernorm(mixed)
            k = layer.self_attn.k_proj(x).view(1, P + G, lm.kv_heads, lm.head_dim)
            v = layer.self_attn.v_proj(x).view(1, P + G, lm.kv_heads, lm.head_dim)
            assert torch.allclose(now[depth][0], net.rotation.turn(k), atol=1e-5)
            assert torch.allclose(now[depth][1], v, atol=1e-5)
        state["now"] = now

    run(lm, prompts(1, P), gamma=0.97, on_step=on_step)
    assert seen >= 3


@pytest.mark.parametrize("sigma", ["rows", "joined"])
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("unseen", ["last", "skip"])
def test_sigma_is_a_cosine(sigma: str, heads: str, unseen: str) -> None:
    _, report = run(lm_of("gqa", layers=L), prompts(1, P), gamma=0.9, sigma=sigma, heads=heads, unseen=unseen)
    assert report.last is not None
    found = report.last.facts["sigma"]
    tested = found[found != NO_TEST]
    assert len(tested) > L
    assert bool(((tested >= 0) & (tested <= 1 + 1e-5)).all())


@pytest.mark.parametrize("how", ["rows", "joined"])
def test_sigma_is_one_when_nothing_changed(how: str) -> None:
    """Two steps on the same tokens: fresh rows equal stored ones, so attention does too."""
    lm = lm_of("gqa", layers=L)
    ids = prompts(1, P + G)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[:, P:] = True
    ids[masked] = lm.mask_id
    none = torch.zeros_like(masked)
    eligible = masked & (masked.cumsum(1) <= 4)
    net = Net(lm, ids, slots="h")
    policy = ElasticCache(beta=4, sigma=how, gamma=0.999).policy(lm)
    with torch.no_grad():
        for n in range(3):
            need = elastic_cache_dllm.Rows.where(eligible)
            step = Step(n, n, None, P, P + G, P, ids, masked, none, eligible, need, None)
            policy.forward(step, net)
    found = policy.facts()["sigma"]
    assert torch.allclose(found[1:], torch.ones_like(found[1:]), atol=1e-5)
    assert policy.facts()["lstar"].tolist() == [0, L, L]


def test_drift_against_its_definition() -> None:
    a, b = torch.rand(2, 3, 9), torch.rand(2, 3, 9)
    valid = torch.tensor([[True, True, False], [False, False, False]])[None]
    rows = drift.Drift([a], valid, "rows").sigma(0, b)
    cos = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    assert rows.tolist() == pytest.approx([float(cos[0, :2].mean()), 1.0])
    joined = drift.Drift([a], valid, "joined").sigma(0, b)
    both = torch.nn.functional.cosine_similarity(a[0, :2].flatten(), b[0, :2].flatten(), dim=0)
    assert joined.tolist() == pytest.approx([float(both), 1.0])


def test_refreshed_layers_grow_with_gamma_from_one_state() -> None:
    """For a single step from the same state, not for whole runs."""
    lm, ids = lm_of("gqa", layers=L), prompts(1, P)
    gammas = (-1.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.99, 0.999, 1.5)
    counts: list[list[int]] = []
    whole = elastic_cache_dllm._Elastic.forward
    method = ElasticCache(gamma=0.9, **ANY)

    def forward(self: Any, step: Step, net: Net) -> Any:
        if self.memory is not None:
            row = []
            for gamma in gammas:
                other, its_net = copy.copy(self), copy.copy(net)
                other.o = ElasticCache(gamma=gamma, **ANY)
                other.memory, other.log = copy.copy(self.memory), copy.deepcopy(self.log)
                other.memory._whole, other.memory._has = list(self.memory._whole), self.memory._has.clone()
                other.memory._single = [None if x is None else x.clone() for x in self.memory._single]
                its_net.slots, its_net.book = copy.deepcopy(net.slots), copy.deepcopy(net.book)
                whole(other, step, its_net)
                row.append(L - its_net.book.depth[-1])
            counts.append(row)
        return whole(self, step, net)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic_cache_dllm._Elastic, "forward", forward)
        run(lm, ids, method=method)
    assert len(counts) > 4
    for row in counts:
        assert row == sorted(row)
        assert (row[0], row[-1]) == (0, L - 1)
    assert any(len(set(row)) > 2 for row in counts)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("eps", [0.5, 0.9, 1.5])
def test_commits_lie_in_the_window_and_are_queried_again(shift: bool, eps: float) -> None:
    lm = lm_of("gqa", shift=shift, layers=L)
    steps: list[Step] = []
    _, report = run(lm, prompts(1, P), eps=eps, on_step=lambda s, x, n: steps.append(s))
    assert report.last is not None
    for i, step in enumerate(steps):
        left = step.masked[0].nonzero()[:, 0].tolist()
        assert step.eligible[0].nonzero()[:, 0].tolist() == left[:4]
        if i:
            gone = step.committed[0]
            assert not bool((gone & ~steps[i - 1].eligible[0]).any())
            assert int(gone.sum()) >= 1
            assert not bool((gone & ~report.last.query[i, 0]).any())
            if eps > 1:
                assert int(gone.sum()) == 1
            tracked = report.last.facts["tracked"][i - 1, :, 0].flatten()
            assert bool(report.last.query[i, 0, tracked].all())
            assert bool((~steps[i - 1].masked[0, tracked]).all())  # tracked tokens were decided before that call
            expected = step.eligible[0] | gone
            expected |= step.need.mask()[0]
            expected[tracked] = True
            assert torch.equal(report.last.query[i, 0], expected)


def test_without_requery_keys_of_committed_tokens_stay_those_of_the_mask() -> None:
    lm = lm_of("mha", layers=L)
    error = {}
    for requery in (True, False):
        gaps: list[float] = []

        def on_step(step: Step, logits: Tensor, net: Net, gaps: list[float] = gaps) -> None:
            keys, _, _ = full_keys(lm, step.ids)
            where = step.committed
            if where.any():
                gaps.append(float((net.held.k(0) - keys[0])[where].abs().max()))

        run(lm, prompts(1, P), gamma=-1.0, requery=requery, on_step=on_step)
        error[requery] = gaps
    assert max(error[True]) < 1e-5
    assert min(error[False]) > 1e-2


def test_the_window_of_the_step_before() -> None:
    """It contains what was committed there; present candidates outside it wait, unless a refresh takes them."""
    lm = lm_of("gqa", layers=L)
    waited = 0
    for gamma, eps in ((-1.0, 1.5), (-1.0, 0.3), (0.9, 0.6)):
        steps: list[Step] = []

        def on_step(step: Step, logits: Tensor, net: Net, steps: list[Step] = steps) -> None:
            steps.append(step)

        out, report = run(lm, prompts(1, P), query="previous", gamma=gamma, eps=eps, on_step=on_step)
        assert report.last is not None
        assert lm.mask_id not in out
        tracked = report.last.facts["tracked"]
        for i in range(1, len(steps)):
            expected = steps[i - 1].eligible[0].clone()
            assert not bool((steps[i].committed[0] & ~expected).any())
            expected[tracked[i - 1].flatten()] = True
            assert torch.equal(report.last.query[i, 0], expected)
            new = steps[i].eligible[0] & ~expected
            waited += int(new.sum())
            if gamma < 0 and i + 1 < len(steps):
                assert not bool((steps[i + 1].committed[0] & new).any())
    assert waited > 0


@pytest.mark.parametrize("sync", ["layer", "step"])
@pytest.mark.parametrize("far_tail", ["refresh", "keep"])
@pytest.mark.parametrize("unseen", ["last", "skip"])
def test_when_decisions_are_read_changes_no_result(sync: str, far_tail: str, unseen: str) -> None:
    lm, ids = lm_of("gqa", layers=L), prompts(1, P)
    how: dict[str, Any] = {"gamma": 0.95, "far_tail": far_tail, "mask_block": 4, "unseen": unseen, "eps": 1.5}
    out, report = run(lm, ids, sync=sync, **how)
    other, reference = run(lm, ids, sync="layer", **how)
    assert torch.equal(out, other)
    assert report.last is not None
    assert reference.last is not None
    assert torch.equal(report.last.facts["lstar"], reference.last.facts["lstar"])
    assert torch.equal(report.last.query, reference.last.query)


def test_the_far_tail_can_be_kept() -> None:
    """A refresh stops at the end of the mask block that holds the window's end."""
    lm, kept = lm_of("gqa", layers=L), 0
    before: list[Tensor] = []

    def on_step(step: Step, logits: Tensor, net: Net) -> None:
        nonlocal kept
        reach, depth = net.book.reach[-1], net.book.depth[-1]
        if 0 < depth < L:
            last = int((step.eligible | ~step.masked)[0].nonzero().max())
            assert reach == min(P + -(-(last + 1 - P) // 4) * 4, P + G)
            if reach < P + G:
                kept += 1
                assert torch.equal(net.held.k(L - 1)[:, reach:], before[-1][:, reach:])
        before.append(net.held.k(L - 1).clone())

    _, report = run(lm, prompts(1, P), gamma=1.5, far_tail="keep", mask_block=4, eps=1.5, on_step=on_step)
    assert kept >= 3
    last = report.last
    assert last is not None
    assert bool((last.reach[2:] >= last.reach[1:-1]).all())  # the first call took everything
    assert last.token_layers == int(last.computed().sum())


@pytest.mark.parametrize("kind", ["mha", "gqa", "qk_norm"])
def test_samples_one_by_one_equal_single_runs(kind: str) -> None:
    lm, ids = lm_of(kind, layers=L), prompts(3, P)
    out, report = run(lm, ids, gamma=0.95)
    assert report.run_count == 3
    for i in range(3):
        assert torch.equal(out[i : i + 1], run(lm, ids[i : i + 1], gamma=0.95)[0])


def test_samples_together() -> None:
    """Without triggers a sample is decoded as alone; with them all refresh when one does."""
    lm, ids = lm_of("gqa", layers=L), prompts(3, P)
    out, report = run(lm, ids, gamma=-1.0, batch="together")
    assert report.run_count == 1
    for i in range(3):
        assert torch.equal(out[i : i + 1], run(lm, ids[i : i + 1], gamma=-1.0)[0])
    assert report.last is not None
    sizes = report.last.query[1:].sum(dim=2)
    assert bool((sizes != sizes[:, :1]).any())
    _, report = run(lm, ids, gamma=0.95, batch="together")
    assert report.last is not None
    fired = (report.last.facts["sigma"] < 0.95).any(dim=1)  # [calls, L]
    first = [next((i + 1 for i, f in enumerate(row) if f), L) for row in fired[1:].tolist()]
    assert report.last.facts["lstar"].tolist()[1:] == first


def test_equal_samples_together_equal_one_alone_although_the_tail_is_kept() -> None:
    lm, ids = lm_of("gqa", layers=L), prompts(1, P)
    how: dict[str, Any] = {"gamma": 0.97, "far_tail": "keep", "mask_block": 4, "eps": 1.5}
    both, _ = run(lm, ids.repeat(2, 1), batch="together", **how)
    alone, _ = run(lm, ids, **how)
    assert torch.equal(both, alone.repeat(2, 1))


def test_left_padding_is_neither_tracked_nor_attended() -> None:
    lm, ids = lm_of("gqa", layers=L), prompts(2, P + 3)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with elision.apply(lm, "elastic_cache_dllm", gamma=0.95, track=2, **ANY) as applied:
        both = applied.generate(ids, attention_mask=mask, gen_length=G)
        tracked = applied.report().runs[1].facts["tracked"]
        alone = applied.generate(ids[1:, 3:], gen_length=G)
    assert int(tracked.min()) >= 3
    assert torch.equal(both[1:, 3:], alone)


def test_a_prompt_shorter_than_the_number_of_tracked_tokens() -> None:
    """As soon as enough tokens are decided, that many are tracked."""
    lm = lm_of("gqa", layers=L)
    steps: list[Step] = []
    out, report = run(lm, prompts(1, 1), track=5, eps=1.5, on_step=lambda s, x, n: steps.append(s))
    assert lm.mask_id not in out
    assert report.last is not None
    for step, tracked in zip(steps, report.last.facts["tracked"], strict=True):
        decided = int((~step.masked).sum())
        assert [len(set(layer[0].tolist())) for layer in tracked] == [min(5, decided)] * L


def test_guidance_keeps_slots_per_branch() -> None:
    lm, ids = lm_of("mha", layers=L), prompts(1, P)
    how: dict[str, Any] = {"gen_length": G, "cfg_scale": 0.5}
    plain = dllm.generate(lm, ids, window=4, threshold=0.9, **how)
    with elision.apply(lm, ElasticCache(force_full=True, **ANY)) as applied, pytest.warns(ElisionWarning):
        assert torch.equal(applied.generate(ids, **how), plain)
    with elision.apply(lm, ElasticCache(gamma=0.9, **ANY)) as applied:
        out = applied.generate(ids, **how)
        assert applied.report().last.query.shape[1] == 2
    assert lm.mask_id not in out


def test_window_and_threshold_are_options_of_the_method() -> None:
    lm, ids = lm_of("mha", layers=L), prompts(1, P)
    with elision.apply(lm, ElasticCache(**ANY)) as applied:
        for how in ({"window": 8}, {"threshold": 0.5}):
            with pytest.raises(OptionError, match="set the option of the method"):
                applied.generate(ids, gen_length=G, **how)
        with pytest.raises(OptionError, match=r"slides a window of 4 masks, .* two ways to go from left to right"):
            applied.generate(ids, gen_length=G, block_length=7)
        applied.generate(ids, gen_length=G, window=4, threshold=0.9)


CHOICES: list[dict[str, Any]] = [
    {"gamma": 0.95, "eps": 0.6},
    {"gamma": 0.95, "eps": 1.5, "track": 3, "heads": "max"},
    {"gamma": 0.9, "eps": 0.4, "sigma": "joined", "unseen": "skip", "track": 2},
    {"gamma": 0.8, "eps": 0.6, "far_tail": "keep", "mask_block": 3, "sync": "step"},
    {"gamma": 0.95, "eps": 0.6, "query": "previous", "beta": 2},
    {"gamma": 0.9, "eps": 0.4, "query": "previous", "far_tail": "keep", "mask_block": 2, "sigma": "joined"},
    {"gamma": -1.0, "eps": 1.5, "beta": 30},
    {"gamma": 1.5, "eps": 0.6, "beta": 3, "track": 5},
]


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize(("kind", "shift"), [("gqa", False), ("qk_norm", True)])
def test_every_call_equals_the_algorithm_box(options: dict[str, Any], kind: str, shift: bool) -> None:
    """Tokens, rows, triggers, σ and tracked tokens, with left padding and a prompt shorter than `track`."""
    lm = lm_of(kind, shift=shift, layers=L, seed=11)
    ids, mask = prompts(2, 4, seed=5), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    method = ElasticCache(**{**ANY, **options})
    with elision.apply(lm, method) as applied:
        assert isinstance(applied, DllmApplied)
        out = applied.generate(ids, attention_mask=mask, gen_length=11)
    for b, made in enumerate(applied.report().runs):
        box = Box(lm, method, ids[b : b + 1], mask[b], 11)
        assert torch.equal(out[b : b + 1], box.go())
        assert made.calls == len(box.calls)
        for i, call in enumerate(box.calls):
            assert set(made.query[i, 0].nonzero()[:, 0].tolist()) == call.query
            assert int(made.facts["lstar"][i]) == call.lstar
            assert [set(layer[0].tolist()) for layer in made.facts["tracked"][i]] == call.tracked
            if i:
                torch.testing.assert_close(made.facts["sigma"][i, 0], torch.tensor(call.sigma), atol=1e-4, rtol=0)


@pytest.mark.parametrize("gamma", [-1.0, 1.5])
def test_every_branch_of_guidance_follows_the_algorithm_box(gamma: float) -> None:
    """Own slots, own tracked tokens, own rows; what is decided is decided for both."""
    lm, ids, scale = lm_of("gqa", layers=L, seed=12), prompts(1, 4), 0.7
    method = ElasticCache(**ANY, gamma=gamma)
    with elision.apply(lm, method) as applied:
        assert isinstance(applied, DllmApplied)
        out = applied.generate(ids, gen_length=11, cfg_scale=scale)
        made = applied.report().last
    assert made is not None
    given, free = (Box(lm, method, x, torch.ones(4), 11) for x in (ids, torch.full_like(ids, lm.mask_id)))
    while bool(given.masked.any()):
        logits, blank = given.compute(), free.compute()
        for box in (given, free):
            box.commit(blank + (scale + 1) * (logits - blank))
    assert torch.equal(out, given.ids)
    for i, calls in enumerate(zip(given.calls, free.calls, strict=True)):
        for branch, call in enumerate(calls):
            assert set(made.query[i, branch].nonzero()[:, 0].tolist()) == call.query
            assert [set(layer[branch].tolist()) for layer in made.facts["tracked"][i]] == call.tracked
