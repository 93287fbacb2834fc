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
from tests.kv.tiny import (
    chunks_are_one_prompt,
    first_layer_is_true,
    held,
    masked,
    rows_are_single_runs,
    tiny,
    tokens,
)

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


@pytest.mark.parametrize(("mode", "position"), [("paper", "true"), ("paper", "compressed"), ("released", "compressed")])
def test_recorded_logits(mode: str, position: str) -> None:
    """A tiny Llama under the released cache, and under the paper's selection in both position modes."""
    case = CASES["e2e"]
    model = llama(case)
    full = decode(model, case["prompt_ids"], case["forced_ids"])
    torch.testing.assert_close(full, case["logits_full"].view_as(full), atol=1e-4, rtol=0)
    with elision.apply(model, _method(case, mode=mode, position=position)) as run:
        cache = run.cache()
        model(case["prompt_ids"], past_key_values=cache)
        kept = torch.stack([k[0, 0] for k in run.kept(cache).values()])
        logits = decode(model, case["prompt_ids"], case["forced_ids"])
    assert torch.equal(kept, case[f"kept_{mode}"])
    name = "logits_released_compressed" if mode == "released" else f"logits_paper_{position}"
    torch.testing.assert_close(logits, case[name].view_as(logits), atol=1e-4, rtol=0)


def test_recorded_counts() -> None:
    """How much goes at the prompt and in 30 steps, in double precision, for every length and ratio recorded."""
    for row in CASES["forget_table"].scalars["rows"]:
        for ratio, forget, deleted in zip(row["ratios"], row["forget"], row["sum_deleted_in_30_steps"], strict=True):
            rig, length = Rig(ElasticCache(ratio=ratio, mode="released", distance=5)), row["S"]
            feed(rig, 0, torch.rand(1, 1, length, length).tril())
            store = rig.book.stores[0]
            merged = forget + 1 if forget > 1 else 0
            if length - 2 > forget:  # an anchor is left: else the release fails
                assert length - store.n == (forget + 1 if forget > 1 else forget)
                assert store.merged == merged or forget == 1
            for step in range(30):
                feed(rig, 0, torch.zeros(1, 1, 1, length + step + 1))
            if length - 2 > forget:
                assert length + 30 - store.n - merged == deleted, (length, ratio)


def _oracle(score: Tensor, vectors: Tensor, ratio: float, first: int) -> tuple[list[int], dict[int, list[int]], Tensor]:
    """Kept tokens, bucket of each anchor, and merged vectors [G, k, D], by loops over one layer's [S] and [G, S, D]."""
    length = len(score)
    forget = int(length - length * (1 - ratio))
    candidates = list(range(first, length - 1))
    thrown = sorted(candidates, key=lambda j: float(score[j]))[: forget + 1]
    anchors = [j for j in candidates if j not in thrown]
    buckets: dict[int, list[int]] = {a: [] for a in anchors}
    for u in thrown:
        buckets[min(anchors, key=lambda a: (abs(a - u), a))].append(u)
    kept = [*range(first), *anchors, length - 1]
    merged = [vectors[:, [j, *buckets.get(j, [])]].mean(1) for j in kept]
    return kept, buckets, torch.stack(merged, 1)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize(("ratio", "first"), [(0.5, 1), (0.2, 4), (0.8, 2)])
def test_merging_by_loops(kind: str, ratio: float, first: int) -> None:
    """On a model with grouped heads: buckets partition what goes, means are right, nothing is lost in sum."""
    model, prompt = tiny(kind), tokens(1, 50)
    with torch.no_grad():
        full = model(prompt, use_cache=True)
        model.set_attn_implementation("eager")
        weights = model(prompt, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
    with elision.apply(model, "elastic_cache", ratio=ratio, start_size=first) as run, torch.no_grad():
        cache = run.cache()
        out = model(prompt, past_key_values=cache)
        assert torch.equal(out.logits, full.logits)
        kept = run.kept(cache)
        assert cache.get_seq_length() == 50
    for i, attention in enumerate(weights):
        score, store = attention[0].mean(0).sum(0), cache.layers[i].store
        for name, whole in (("k", full.past_key_values.layers[i].keys), ("v", full.past_key_values.layers[i].values)):
            expected, buckets, merged = _oracle(score, whole[0], ratio, first)
            assert kept[i][0, 0].tolist() == expected
            torch.testing.assert_close(store.dense[name][0], merged, atol=1e-5, rtol=1e-5)
            forget = int(50 - 50 * (1 - ratio))
            assert sum(map(len, buckets.values())) == forget + 1
            times = torch.tensor([len(buckets.get(j, [])) + 1.0 for j in expected])
            total = (store.dense[name][0] * times[:, None]).sum(1)
            torch.testing.assert_close(total, whole[0].sum(1), atol=1e-4, rtol=1e-4)
            fixed = [*range(first), 49]
            assert torch.equal(store.dense[name][0][:, [*range(first), -1]], whole[0][:, fixed])


def test_dropping_keeps_the_same_tokens() -> None:
    model, prompt = tiny(), tokens(1, 40)
    sets = []
    for merge in (True, False):
        with elision.apply(model, "elastic_cache", ratio=0.5, merge=merge) as run:
            cache = run.cache()
            model(prompt, past_key_values=cache)
            sets.append(held(run, cache))
            first = run.report()
            moved = 21 * 2 * 3
            assert (sum(first.merged.values()), sum(first.evicted.values())) == ((moved, 0) if merge else (0, moved))
    assert sets[0] == sets[1]


def test_equal_values_and_equal_pairs_are_left_alone() -> None:
    """With all values equal the output is too; merging a token into its copy changes nothing but its multiplicity."""
    weights = torch.rand(1, 2, 30, 30).tril()
    k, v = torch.randn(1, 1, 30, 4), torch.randn(1, 1, 1, 4).expand(1, 1, 30, 4).contiguous()
    rig = Rig(ElasticCache(ratio=0.5))
    feed(rig, 0, weights, k, v)
    torch.testing.assert_close(rig.book.stores[0].dense["v"], v[:, :, :14])
    twins = torch.cat([k[:, :, :1], k[:, :, 1:15].repeat_interleave(2, 2), k[:, :, 29:]], 2)
    rig = Rig(ElasticCache(ratio=0.45))
    feed(rig, 0, torch.arange(30.0).fmod(2).mul(9).expand(1, 1, 30, 30), twins, twins)
    kept = [0, *range(1, 29, 2), 29]
    assert rig.order()[0, 0].tolist() == kept, "every even token went to the odd one before it, its twin"
    assert rig.book.stores[0].merged == 14
    torch.testing.assert_close(rig.book.stores[0].dense["k"], twins[:, :, kept])


def test_the_two_rankings() -> None:
    """Equal sizes; the same set when the sorting permutation is its own inverse, chance level for random scores."""

    def kept(score: Tensor, mode: str, ratio: float = 0.5) -> set[int]:
        rig = Rig(ElasticCache(ratio=ratio, mode=mode, start_size=0))
        rows = torch.zeros(1, 1, len(score), len(score))
        rows[0, 0, 0] = score
        feed(rig, 0, rows)
        return set(rig.kept()[0, 0].tolist())

    n = 41
    for score in (torch.arange(n).float(), -torch.arange(n).float()):
        assert kept(score, "paper") == kept(score, "released")
    shifted = (torch.arange(n) + 4).fmod(n - 1).float()
    assert kept(shifted, "paper") != kept(shifted, "released")
    shares = []
    for seed in range(20):
        score = torch.rand(401, generator=torch.Generator().manual_seed(seed))
        paper, released = kept(score, "paper"), kept(score, "released")
        assert len(paper) == len(released) == 200
        shares.append(len(paper & released) / 200)
    assert 0.45 < sum(shares) / 20 < 0.55


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_nothing_dropped_is_the_full_cache(mode: str) -> None:
    model, prompt = tiny(), tokens(2, 40)
    full = model.generate(prompt, max_new_tokens=12, do_sample=False)
    run = elision.apply(model, "elastic_cache", ratio=0.0, mode=mode)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), full)
    with pytest.warns(elision.ElisionWarning, match="left nothing out"):
        run.remove()


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_length_stays_at_its_share_while_decoding(ratio: float) -> None:
    """Only the fixed place is emptied: generated tokens stay for 25 slots, and the length keeps to the share."""
    model, prompt, rest = tiny(), tokens(1, 60), tokens(1, 40, 2)
    with elision.apply(model, "elastic_cache", ratio=ratio) as run, torch.no_grad():
        cache = run.cache()
        model(prompt, past_key_values=cache)
        before = held(run, cache)[0][0]
        point = max(60 - int(60 - 60 * (1 - ratio)) - 25, 1)
        for t in range(40):
            model(rest[:, t : t + 1], past_key_values=cache)
            now = held(run, cache)[0][0]
            assert -2 < len(now) - (61 + t) * (1 - ratio) < 1
            gone = [p for p in before if p not in now]
            assert gone == before[point : point + len(gone)]
            before = [*before, 60 + t]
            del before[point : point + len(gone)]
            assert now == before


@pytest.mark.parametrize(("length", "ratio"), [(1, 0.5), (2, 0.5), (3, 0.9), (8, 1.0), (20, 0.99)])
@pytest.mark.parametrize("mode", ["paper", "released"])
def test_short_prompts_and_no_anchors(mode: str, length: int, ratio: float) -> None:
    """Nothing but the head and the last token is left where no anchor is; no crash, and decoding goes on."""
    model = tiny()
    with elision.apply(model, "elastic_cache", ratio=ratio, mode=mode, distance=2) as run:
        cache = run.cache()
        model(tokens(1, length), past_key_values=cache)
        assert held(run, cache)[0][0][-1] == length - 1
        if ratio > 0.95:
            assert held(run, cache)[0][0] == [0, length - 1]
        out = model.generate(tokens(1, length), max_new_tokens=5, do_sample=False)
        assert out.shape[1] == length + 5


def test_one_token_too_many_in_the_prompt() -> None:
    """Paper: two tokens are merged. The release takes it for a decoding step and deletes the first token for good."""
    weights = torch.rand(1, 1, 30, 30).tril()
    paper, released = Rig(ElasticCache(ratio=0.05)), Rig(ElasticCache(ratio=0.05, mode="released"))
    for rig in (paper, released):
        feed(rig, 0, weights)
    assert paper.kept().shape[-1] == 28
    assert paper.book.stores[0].merged == 2
    assert released.order()[0, 0].tolist() == list(range(1, 30))
    assert released.book.stores[0].state["point"] == 0
    for step in range(30):
        feed(released, 0, torch.zeros(1, 1, 1, 31 + step))
    kept = released.kept()[0, 0].tolist()
    assert kept == list(range(kept[0], 60)), "token after token from the head"


def test_a_prompt_of_which_the_release_drops_nothing() -> None:
    """Its deletion point is set where it merges only: the first token goes, time after time. Paper: the fixed place."""
    weights = torch.rand(1, 1, 40, 40).tril()
    paper, released = Rig(ElasticCache(ratio=0.02)), Rig(ElasticCache(ratio=0.02, mode="released"))
    for rig in (paper, released):
        feed(rig, 0, weights)
        assert rig.book.stores[0].intact
        for step in range(110):
            feed(rig, 0, torch.zeros(1, 1, 1, 41 + step))
    assert released.kept()[0, 0].tolist() == list(range(3, 150))
    assert paper.kept()[0, 0].tolist() == [j for j in range(150) if j not in (15, 16, 17)]


def test_the_point_for_which_the_release_breaks() -> None:
    rig = Rig(ElasticCache(ratio=0.5, mode="released"))
    feed(rig, 0, torch.rand(1, 1, 48, 48).tril())  # 48 - 24 - 25
    for step in range(3):
        feed(rig, 0, torch.zeros(1, 1, 1, 49 + step))
    with pytest.raises(elision.ElisionError, match="deletion point of this prompt is -1"):
        feed(rig, 0, torch.zeros(1, 1, 1, 52))


@pytest.mark.parametrize("options", [{}, {"mode": "released", "ratio": 0.5}, {"merge": False, "budget": 20}])
def test_rows_of_a_batch_are_single_runs(options: dict[str, Any]) -> None:
    rows_are_single_runs(
        tiny(), "elastic_cache", (60, 37, 58, 7), **{"ratio": None if "budget" in options else 0.4} | options
    )


def test_sliding_layers_are_left_alone() -> None:
    rows_are_single_runs(tiny("Gemma3"), "elastic_cache", (60, 37, 12), ratio=0.5)


@pytest.mark.parametrize("position", ["true", "compressed"])
def test_chunks_are_one_prompt(position: str) -> None:
    chunks_are_one_prompt(tiny(), "elastic_cache", ratio=0.5, position=position)


def test_compressed_positions_of_a_padded_batch() -> None:
    rows_are_single_runs(tiny(), "elastic_cache", (60, 37, 12), ratio=0.5, position="compressed")


@pytest.mark.parametrize("decoding", [{"prompt_lookup_num_tokens": 4}, {"num_beams": 3}, {}])
def test_ways_of_decoding(decoding: dict[str, Any]) -> None:
    """What is held after generation is a share of what was seen, and belongs to its tokens."""
    model, prompt = tiny(), tokens(1, 12).repeat(1, 5)
    with elision.apply(model, "elastic_cache", ratio=0.4, merge=False) as run:
        cache = run.cache()
        out = model.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False, **decoding)
        seen = cache.get_seq_length()
        assert seen >= 79
        for layer in held(run, cache):
            assert len(set(layer[0])) == len(layer[0])
            assert layer[0][-1] == seen - 1
            assert -2 < len(layer[0]) - seen * 0.6 < 1
        if "num_beams" not in decoding:
            first_layer_is_true(model, run, cache, out)


def test_a_second_turn() -> None:
    """It reads what is left at true positions, and merges once more."""
    model, first, second = tiny(), tokens(1, 40), tokens(1, 30, 5)
    with elision.apply(model, "elastic_cache", ratio=0.5, merge=False) as run, torch.no_grad():
        cache = run.cache()
        model(first, past_key_values=cache)
        before = run.kept(cache)
        logits = model(second, past_key_values=cache).logits
        assert cache.get_seq_length() == 70
        for i, layer in enumerate(held(run, cache)):
            assert len(layer[0]) == 34
            assert layer[0][0] == 0
            assert layer[0][-1] == 69
            assert {p for p in layer[0] if p < 40} <= set(before[i][0, 0].tolist())
    kept = {i: k[0].expand(2, -1) for i, k in before.items()}
    torch.testing.assert_close(logits, masked(model, first, second, kept), atol=1e-4, rtol=1e-4)


def test_a_second_turn_merges_into_the_nearest_after_deletions() -> None:
    """Decoding reuses slots, so they are not in the order of time when the next prompt comes."""
    total, rig = 110, Rig(ElasticCache(budget=0.5))
    q, v = torch.randn(1, 2, total, 8), torch.randn(1, 2, total, 8)
    k = torch.arange(float(total))[:, None].expand(1, 2, total, 8)
    rig.feed(0, q[:, :, :60], k[:, :, :60], v[:, :, :60], "prompt_end")
    for t in range(60, 90):
        rig.feed(0, q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
    store = rig.book.stores[0]
    before = {int(p): float(x) for p, x in zip(store.positions()[0, 0], store.dense["k"][0, 0, :, 0], strict=True)}
    rig.feed(0, q[:, :, 90:], k[:, :, 90:], v[:, :, 90:], "prompt_end")
    before |= {p: float(p) for p in range(90, total)}
    kept = store.positions()[0, 0].tolist()
    assert kept == sorted(kept)
    anchors, buckets = kept[1:-1], {p: [before[p]] for p in kept}
    for u in sorted(before.keys() - set(kept)):
        buckets[min(anchors, key=lambda a: (abs(a - u), a))].append(before[u])
    means = torch.tensor([sum(buckets[p]) / len(buckets[p]) for p in kept])
    torch.testing.assert_close(store.dense["k"][0, 0, :, 0], means)


@pytest.mark.parametrize("distance", [0, -3, 5])
def test_only_a_positive_distance_is_an_absolute_index(distance: int) -> None:
    assert ElasticCache(distance=distance).plan(60, 60, 0.5, 0)[1] == (5 if distance == 5 else 30 + distance)


@pytest.mark.parametrize("length", [8, 20, 60])
def test_a_budget_in_tokens_is_kept_to(length: int) -> None:
    model = tiny()
    with elision.apply(model, "elastic_cache", budget=20) as run:
        model.generate(tokens(1, length), max_new_tokens=40, do_sample=False)
        assert set(run.report().slots.values()) == {20}
    assert sum(run.report().evicted.values()) > 0
