from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision.kv.methods.prefixkv import PrefixKV
from elision.kv.threshold import rescale, search, threshold
from elision.profile import Profile
from tests.kv.given import feed, same
from tests.kv.models import decode, llama
from tests.kv.rig import Rig, recorded
from tests.kv.tiny import (
    chunks_are_one_prompt,
    first_layer_is_true,
    held,
    left_padded,
    masked,
    rows_are_single_runs,
    tiny,
    tokens,
)

CASES = recorded("prefixkv")
DECODED = [n for n, c in CASES.items() if "kept_after_step" in c.tensors]


@pytest.mark.parametrize("name", DECODED)
def test_recorded_selections_and_deletions(name: str) -> None:
    """Given ratios: kept sets after the prompt, deletion points, and what is held after every step."""
    case = CASES[name]
    options = {k: case.options[k] for k in ("start_size", "distance")}
    weights = case["attentions"]
    layers, b, heads, length, _ = weights.shape
    rig = Rig(PrefixKV(ratios=tuple(case.options["ratios"]), **options), layers)
    for i in range(layers):
        feed(rig, i, weights[i])
        assert torch.equal(rig.order(i), rig.kept(i)), "original order"
        assert same(rig.kept(i).expand(b, 1, -1), case["kept_pos"][i])
        assert rig.book.stores[i].state["point"] == case["fixed_index"][i]
    for step, expected in enumerate(case["kept_after_step"]):
        for i in range(layers):
            feed(rig, i, torch.zeros(b, heads, 1, length + step + 1))
            assert same(rig.kept(i).expand(b, 1, -1), expected[i])


def test_recorded_profile_of_one_prompt() -> None:
    """Threshold, counts before and after rescaling, and the kept sets of the mode without a profile."""
    case = CASES["profile_gqa_free"]
    score = case["score"][:, 0]
    p, forget = threshold(list(score), case.scalars["target"], 2, 5)
    assert p == case.scalars["threshold_p"]
    assert torch.equal(forget, case["forget_raw"])
    ratios = search(list(score), 0.5, score.shape[1], 2, 5)
    assert ratios.tolist() == case.scalars["ratios"]
    rig = Rig(PrefixKV(ratio=0.5), len(score))
    for i, weights in enumerate(case["attentions"]):
        feed(rig, i, weights)
        assert rig.book.stores[i].intact == (i < len(score) - 1), "nothing is cut before the last layer"
    for i in range(len(score)):
        assert same(rig.kept(i), case["kept_pos"][i][None])
        assert rig.book.stores[i].state["point"] == case["fixed_index"][i]


def test_recorded_searches() -> None:
    case = CASES["search_sweep"]
    score = case["score"]
    layers, length = score.shape
    for i, rho in enumerate(case.options["rhos"]):
        p, forget = threshold(list(score), rho * layers * length, 2, 5)
        assert p == case.scalars["threshold_p"][i]
        assert torch.equal(forget, case["forget_raw"][i])
        limits = torch.full((layers,), length - 2)
        assert torch.equal(rescale(forget, rho * layers * length, limits), case["forget"][i])


@pytest.mark.parametrize("position", ["true", "compressed"])
def test_recorded_logits(position: str) -> None:
    """A tiny Llama under the released cache, with true and with the release's positions."""
    case = CASES["e2e"]
    model = llama(case)
    full = decode(model, case["prompt_ids"], case["forced_ids"])
    torch.testing.assert_close(full, case["logits_full"].view_as(full), atol=1e-4, rtol=0)
    with elision.apply(model, "prefixkv", ratios=tuple(case.options["ratios"]), position=position) as run:
        cache = run.cache()
        logits = decode(model, case["prompt_ids"], case["forced_ids"], cache)
        kept = run.kept(cache)
    torch.testing.assert_close(logits, case[f"logits_{position}"].view_as(logits), atol=1e-4, rtol=0)
    for i, expected in enumerate(case["final_kept"]):
        assert same(kept[i], expected[None])


def _curves(score: Tensor) -> Tensor:
    ranked = score.sort(-1, descending=True).values
    return (ranked / ranked.sum(-1, keepdim=True)).cumsum(-1)


@pytest.mark.parametrize("drop", [0.2, 0.5, 0.8])
def test_the_threshold_against_a_grid(drop: float) -> None:
    """The total is met within the tolerance, no layer keeps less than p, and higher thresholds drop less."""
    score = torch.rand(6, 200, generator=torch.Generator().manual_seed(3)).pow(torch.arange(1.0, 7)[:, None] * 2)
    target = drop * 6 * 200
    p, forget = threshold(list(score), target, 2, 5)
    assert abs(int(forget.sum()) - target) < 5
    curve = _curves(score)
    kept = 200 - 2 - forget
    for layer in range(6):
        if forget[layer]:
            assert curve[layer, kept[layer] - 1] >= p
            assert kept[layer] == 1 or curve[layer, kept[layer] - 2] < p
    last = torch.zeros(6, dtype=torch.long)
    for q in torch.cat([torch.linspace(0.001, 0.999, 999), 1 - torch.logspace(-3, -7, 200)]).tolist():
        counts = (curve < q).sum(-1) + 1
        assert (counts >= last).all(), "what a layer keeps never shrinks as p grows"
        last = counts
        total = int((200 - counts - 2).clamp(min=0).sum())
        assert total >= int(forget.sum()) if q <= p else total <= int(forget.sum())


def test_flat_layers_keep_their_share_and_peaked_ones_little() -> None:
    peaked = torch.full((100,), 1e-6)
    peaked[[3, 40, 77]] = 1.0
    p, forget = threshold([torch.ones(100), peaked], 100.0, 2, 5)
    assert abs(100 - 2 - int(forget[0]) - 100 * p) <= 1
    assert 100 - 2 - int(forget[1]) <= 3


def test_equal_layers_get_equal_ratios() -> None:
    score = torch.rand(150)
    ratios = search([score] * 5, 0.4, 150, 2, 5)
    assert ratios.unique().numel() == 1
    assert abs(float(ratios[0]) - 0.4) <= 1 / 150


def test_ties_that_the_released_search_never_leaves() -> None:
    """All layers jump at once past the tolerance: the closest threshold is taken and rescaled."""
    ratios = search([torch.ones(200)] * 32, 0.503, 200, 2, 5)
    assert torch.equal(ratios, torch.full((32,), 100 / 200, dtype=torch.float64))


def test_counts_that_no_layer_can_drop_are_spread() -> None:
    forget, limits = torch.tensor([90, 50, 10]), torch.tensor([98, 98, 98])
    counts = rescale(forget, 240.0, limits)
    assert counts[0] == 98
    assert (counts <= limits).all()
    assert 237 <= int(counts.sum()) <= 240
    assert counts[1] > counts[2]
    assert rescale(forget, 500.0, limits).tolist() == [98, 98, 98]
    assert rescale(torch.zeros(3, dtype=torch.long), 4.0, limits).tolist() == [1, 1, 1]
    assert search([torch.rand(3)] * 4, 0.9, 3, 2, 5).tolist() == [0.9] * 4


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_equal_ratios_are_the_uniform_baseline(kind: str) -> None:
    """Per layer the best of a common number by eager column sums, the head and the last token, in their order."""
    model, prompt = tiny(kind), tokens(2, 50)
    with torch.no_grad():
        full = model(prompt).logits
        model.set_attn_implementation("eager")
        weights = model(prompt, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
    with elision.apply(model, "prefixkv", ratios=(0.6,) * 3, start_size=2) as run, torch.no_grad():
        cache = run.cache()
        assert torch.equal(model(prompt, past_key_values=cache).logits, full), "the prompt itself is dense"
        kept = run.kept(cache)
        store = cache.layers[0].store.dense
        assert sum(layer.store.dense[x].untyped_storage().nbytes() for layer in cache.layers for x in "kv") == (
            2 * 3 * 2 * 20 * store["k"].shape[1] * 8 * 4
        )
    for layer, attention in enumerate(weights):
        for row in range(2):
            score = attention[row].mean(0).sum(0)
            best = sorted(range(2, 49), key=lambda j: -float(score[j]))[:17]
            assert kept[layer][row, 0].tolist() == [0, 1, *sorted(best), 49]


def test_nothing_dropped_is_the_full_cache() -> None:
    model, prompt = tiny(), tokens(2, 40)
    full = model.generate(prompt, max_new_tokens=12, do_sample=False)
    for options in ({"ratios": (0.0,) * 3}, {"ratio": 0.0}, {"budget": 4000}):
        run = elision.apply(model, "prefixkv", **options)
        assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), full)
        with pytest.warns(elision.ElisionWarning, match="left nothing out"):
            run.remove()


def test_length_stays_at_its_share_while_decoding() -> None:
    """Per layer the length keeps to the share of all tokens; only the fixed place is emptied."""
    model, prompt, rest, ratios = tiny(), tokens(1, 60), tokens(1, 40, 2), (0.3, 0.55, 0.8)
    with elision.apply(model, "prefixkv", ratios=ratios) as run, torch.no_grad():
        cache = run.cache()
        model(prompt, past_key_values=cache)
        before = [layer[0] for layer in held(run, cache)]
        points = [layer.store.state["point"] for layer in cache.layers]
        assert points == [17, 2, 6]
        for t in range(40):
            model(rest[:, t : t + 1], past_key_values=cache)
            for i, layer in enumerate(held(run, cache)):
                assert abs(len(layer[0]) - (61 + t) * (1 - ratios[i])) <= 1
                before[i].append(60 + t)
                gone = [p for p in before[i] if p not in layer[0]]
                assert gone == before[i][points[i] : points[i] + len(gone)]
                assert len(gone) <= 1
                before[i] = layer[0]


def test_points_are_set_although_nothing_was_dropped() -> None:
    """The release fails at the first deletion after a prompt of which every layer rounded to nothing."""
    rig = Rig(PrefixKV(ratios=(0.02,)))
    feed(rig, 0, torch.rand(1, 1, 20, 20).tril())
    assert rig.book.stores[0].intact
    for step in range(60):
        feed(rig, 0, torch.zeros(1, 1, 1, 21 + step))
    assert rig.kept()[0, 0].tolist() == [j for j in range(80) if j != 10]


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("options", [{"ratios": (0.9,) * 3}, {"budget": 0.1}, {"budget": 2}])
def test_short_prompts(length: int, options: dict[str, Any]) -> None:
    model = tiny()
    with elision.apply(model, "prefixkv", **options) as run:
        out = model.generate(tokens(1, length), max_new_tokens=30, do_sample=False)
        assert out.shape[1] == length + 30
        assert run.report().tokens_seen == length + 29
        most = 3 if isinstance(options.get("budget"), int) else 0.1 * (length + 29) + 1
        assert max(run.report().slots.values()) <= most


@pytest.mark.parametrize("options", [{"ratios": (0.3, 0.55, 0.8)}, {"budget": 0.4}, {"budget": 14}])
@pytest.mark.parametrize("position", ["true", "compressed"])
def test_rows_of_a_batch_are_single_runs(options: dict[str, Any], position: str) -> None:
    """With ratios for all, and with each row's own."""
    rows_are_single_runs(tiny(), "prefixkv", (60, 37, 58, 7), position=position, **options)


@pytest.mark.parametrize("options", [{"ratios": (0.3, 0.6)}, {"budget": 0.4}])
def test_sliding_layers_are_left_alone(options: dict[str, Any]) -> None:
    rows_are_single_runs(tiny("Gemma3"), "prefixkv", (60, 37, 12), **options)


@pytest.mark.parametrize("options", [{"ratios": (0.3, 0.55, 0.8)}, {"budget": 0.4}])
def test_chunks_are_one_prompt(options: dict[str, Any]) -> None:
    chunks_are_one_prompt(tiny(), "prefixkv", **options)


@pytest.mark.parametrize("options", [{"ratios": (0.3, 0.55, 0.8)}, {"budget": 0.45}])
@pytest.mark.parametrize("decoding", [{"prompt_lookup_num_tokens": 4}, {"num_beams": 3}, {}])
def test_ways_of_decoding(decoding: dict[str, Any], options: dict[str, Any]) -> None:
    model, prompt = tiny(), tokens(1, 12).repeat(1, 5)
    with elision.apply(model, "prefixkv", **options) as run:
        cache = run.cache()
        out = model.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False, **decoding)
        seen = cache.get_seq_length()
        total = 0
        for layer in held(run, cache):
            assert len(set(layer[0])) == len(layer[0])
            assert (layer[0][0], layer[0][-1]) == (0, seen - 1)
            total += len(layer[0])
        assert abs(total - 0.45 * 3 * seen) <= 6
        if "num_beams" not in decoding:
            first_layer_is_true(model, run, cache, out)


def test_steps_of_several_tokens_delete_as_single_ones() -> None:
    """Accepted guesses arrive together: each counts as if it had come alone."""
    one, many = Rig(PrefixKV(ratios=(0.6,))), Rig(PrefixKV(ratios=(0.6,)))
    q, k = torch.randn(1, 2, 90, 8), torch.randn(1, 2, 90, 8)
    for rig in (one, many):
        rig.feed(0, q[:, :, :60], k[:, :, :60], phase="prompt_end")
    start = 60
    for size in (3, 1, 5, 4, 1, 6, 10):
        many.feed(0, q[:, :, start : start + size], k[:, :, start : start + size])
        for t in range(start, start + size):
            one.feed(0, q[:, :, t : t + 1], k[:, :, t : t + 1])
        start += size
        assert torch.equal(one.kept(), many.kept())


@pytest.mark.parametrize("options", [{"ratios": (0.3, 0.5, 0.8)}, {"budget": 0.5}])
def test_a_second_turn(options: dict[str, Any]) -> None:
    """It reads what each layer left at true positions, and is cut to the share of all tokens."""
    model, first, second = tiny(), tokens(1, 40), tokens(1, 30, 5)
    with elision.apply(model, "prefixkv", **options) as run, torch.no_grad():
        cache = run.cache()
        model(first, past_key_values=cache)
        before = run.kept(cache)
        logits = model(second, past_key_values=cache).logits
        after = held(run, cache)
        for i, layer in enumerate(after):
            assert (layer[0][0], layer[0][-1]) == (0, 69)
            assert {p for p in layer[0] if p < 40} <= set(before[i][0, 0].tolist())
            if "ratios" in options:
                assert len(layer[0]) == 70 - round(70 * options["ratios"][i])
        assert (
            abs(sum(len(layer[0]) for layer in after) - sum(70 * (1 - r) for r in options.get("ratios", (0.5,) * 3)))
            < 5
        )
    kept = {i: k[0].expand(2, -1) for i, k in before.items()}
    torch.testing.assert_close(logits, masked(model, first, second, kept), atol=1e-4, rtol=1e-4)


def test_fit(tmp_path: Path) -> None:
    """A profile is the mean of the prompts' own ratios; what is applied with it is what they say."""
    model = tiny()
    prompts = [tokens(1, n, 20 + n) for n in (40, 55, 70)]
    profile = elision.fit(model, "prefixkv", budget=0.35, calls=[*prompts[:2], {"input_ids": prompts[2]}])
    drops = [round(float(d), 6) for d in profile.tensors["drops"]]
    assert drops == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9]
    assert profile.facts["prompts"] == 3
    means = profile.tensors["ratios"].mean(1)
    torch.testing.assert_close(means, profile.tensors["drops"], atol=0.03, rtol=0)
    own = []
    for prompt in prompts:
        with elision.apply(model, "prefixkv", budget=0.35) as run:
            cache = run.cache()
            model(prompt, past_key_values=cache)
            own.append([1 - len(layer[0]) / prompt.shape[1] for layer in held(run, cache)])
    torch.testing.assert_close(profile.tensors["ratios"][6], torch.tensor(own).double().mean(0), atol=1e-6, rtol=0)
    path = profile.save(tmp_path / "tiny.safetensors")
    for budget, row in ((0.35, 6), (0.2, 8)):
        with elision.apply(model, "prefixkv", budget=budget, profile=path) as run:
            cache = run.cache()
            model(prompts[2], past_key_values=cache)
            lengths = [len(layer[0]) for layer in held(run, cache)]
        assert lengths == [70 - round(70 * r) for r in profile.tensors["ratios"][row].tolist()]
    with elision.apply(model, "prefixkv", budget=0.25, profile=path) as run:
        cache = run.cache()
        model(prompts[2], past_key_values=cache)
        between = (profile.tensors["ratios"][7] + profile.tensors["ratios"][8]) / 2
        assert [len(layer[0]) for layer in held(run, cache)] == [70 - round(70 * r) for r in between.tolist()]


def test_fit_on_a_padded_batch_is_fit_on_its_rows() -> None:
    model, prompts = tiny(), [tokens(1, n, n)[0] for n in (50, 38)]
    ids, mask = left_padded(prompts)
    batch = elision.fit(model, "prefixkv", calls=[{"input_ids": ids, "attention_mask": mask}])
    single = elision.fit(model, "prefixkv", calls=[p[None] for p in prompts])
    torch.testing.assert_close(batch.tensors["ratios"], single.tensors["ratios"])


def test_what_does_not_fit() -> None:
    model = tiny()
    with pytest.raises(elision.errors.OptionError, match="2 entries for 3 managed layers"):
        elision.apply(model, "prefixkv", ratios=(0.5, 0.5))
    with pytest.raises(elision.errors.OptionError, match="a drop ratio lies between 0 and 1"):
        PrefixKV(ratios=(0.5, 1.5))
    profile = elision.fit(model, "prefixkv", calls=[tokens(1, 40)])
    with pytest.raises(elision.errors.ProfileMismatch):
        elision.apply(tiny(seed=1), "prefixkv", profile=profile)
    for layers in (2, 5):  # also where a profile of another model is forced
        with pytest.raises(elision.errors.ProfileError, match=f"and {layers} managed layers"):
            elision.apply(tiny(num_hidden_layers=layers), "prefixkv", profile=profile, force=True)
    for tensors in ({}, {"ratios": profile.tensors["ratios"]}, {**profile.tensors, "ratios": torch.full((9, 3), 1.5)}):
        with pytest.raises(elision.errors.ProfileError, match="one between 0 and 1 for each"):
            elision.apply(model, "prefixkv", profile=Profile(profile.fingerprint, tensors))
    other = tiny(seed=1)
    with elision.apply(other, "prefixkv", profile=profile, force=True):
        other(tokens(1, 40))
    with pytest.raises(elision.errors.ProfileError, match="nothing to fit"):
        elision.fit(model, "prefixkv", calls=[lambda m: None])
    with pytest.raises(elision.errors.OptionError, match="branches belong to diffusion models"):
        elision.fit(model, "prefixkv", calls=[tokens(1, 40)], branches=("cond",))


@pytest.mark.parametrize(("distance", "point"), [(0, 30), (-3, 27), (5, 5), (-40, 15)])
def test_only_a_positive_distance_is_an_absolute_index(distance: int, point: int) -> None:
    assert PrefixKV(distance=distance).plan(60, 60, 0.5, 0)[:2] == (30, point)


@pytest.mark.parametrize("parts", [[41], [12, 41], [5, 20, 37, 41]])
def test_the_head_of_a_row_that_begins_in_a_later_part_stays(parts: list[int]) -> None:
    """The first parts of a prompt may be nothing but padding for a short row."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, 41, 8, generator=g) for _ in "qk")
    k[1, :, 34:38] -= 5 * q[1].mean(1, keepdim=True)  # nobody looks at the head of the short row
    valid = torch.ones(2, 41, dtype=torch.bool)
    valid[1, :34] = False
    rig = Rig(PrefixKV(ratios=(0.3,), start_size=4), heads=2, groups=2)
    for start, stop in zip([0, *parts], parts, strict=False):
        phase = "prompt_end" if stop == 41 else "prompt_chunk"
        at = slice(start, stop)
        rig.feed(0, q[:, :, at], k[:, :, at], phase=phase, starts=start == 0, valid=valid[:, at])
    assert rig.book.stores[0].state["pads"].flatten().tolist() == [0, 34]
    assert {34, 35, 36, 37, 40} <= set(rig.kept()[1, 0].tolist())


@pytest.mark.parametrize("lengths", [(2, 7, 3), (2, 3, 41), (1, 1, 2)])
@pytest.mark.parametrize("distance", [0, 5])
def test_points_beyond_what_a_short_row_holds(lengths: tuple[int, ...], distance: int) -> None:
    """Rows of a batch that let nothing go have no slot at their deletion point."""
    rows_are_single_runs(tiny(), "prefixkv", lengths, steps=6, ratio=0.3, distance=distance)
    rows_are_single_runs(tiny(), "elastic_cache", lengths, steps=6, ratio=0.3, distance=distance, start_size=0)
