"""BAC against recorded runs of the official code, brute force, closed forms, and on every denoiser class."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import elision
from elision.denoise.fit.bac import similarity_matrix, step_error
from elision.denoise.methods.bac import (
    BAC,
    METRICS,
    bubbling_union,
    consecutive_steps,
    score,
    update_steps,
)
from elision.denoise.policy import Host
from elision.errors import ElisionWarning, OptionError, ProfileError, ProfileMismatch, UnsupportedTarget
from elision.profile import Profile
from tests.denoise.policy import act, counts, policy
from tests.models import KINDS, Loop, changed, snapshot

BLOCKED = [kind for kind, about in KINDS.items() if about.blocks and not about.edits]


STEPS = 8


idle = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


matrices = st.integers(1, 7).flatmap(
    lambda k: hnp.arrays(np.float64, (k, k), elements=st.floats(-4, 4, allow_nan=False, width=16))
)


@settings(deadline=None, max_examples=60)
@given(s=matrices, maximise=st.booleans())
def test_scheduler_equals_brute_force(s: Any, maximise: bool) -> None:
    k = len(s)
    for m in range(1, k + 1):
        steps = update_steps(s, m, maximise)
        assert steps[0] == 0
        assert sorted(set(steps)) == steps
        assert len(steps) == m
        rivals = [score(s, [0, *others]) for others in combinations(range(1, k), m - 1)]
        assert score(s, steps) == pytest.approx(max(rivals) if maximise else min(rivals), abs=1e-9)


def test_scheduler_equals_brute_force_at_twelve_steps() -> None:
    s = np.random.default_rng(0).normal(size=(12, 12))
    for m in (2, 6, 11):
        best = max(score(s, [0, *others]) for others in combinations(range(1, 12), m - 1))
        assert score(s, update_steps(s, m)) == pytest.approx(best)
        worst = min(score(s, [0, *others]) for others in combinations(range(1, 12), m - 1))
        assert score(s, update_steps(s, m, maximise=False)) == pytest.approx(worst)


def test_score_grows_with_the_number_of_updates_where_nothing_serves_a_step_better_than_itself() -> None:
    features = torch.randn(15, 40, generator=torch.Generator().manual_seed(0)).cumsum(0)
    cosine = similarity_matrix(features, "cosine").numpy()
    scores = [score(cosine, update_steps(cosine, m)) for m in range(1, 16)]
    assert all(b >= a - 1e-6 for a, b in pairwise(scores))
    arbitrary = np.random.default_rng(1).normal(size=(9, 9))  # without that condition it need not
    scores = [score(arbitrary, update_steps(arbitrary, m)) for m in range(1, 10)]
    assert any(b < a for a, b in pairwise(scores))


@pytest.mark.parametrize("count", [2, 4, 5, 10])
def test_stationary_concave_decay_gives_even_spacing(count: int) -> None:
    lag = np.abs(np.subtract.outer(np.arange(40), np.arange(40)))
    steps = update_steps(1 - (lag / 40.0) ** 2, count)
    gaps = [b - a for a, b in pairwise([*steps, 40])]
    assert max(gaps) - min(gaps) <= 1


def test_piecewise_stationary_features_are_served_perfectly() -> None:
    starts = [0, 4, 5, 9]
    pieces = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    features = torch.cat([pieces[i].expand(b - a, -1) for i, (a, b) in enumerate(pairwise([*starts, 12]))])
    s = similarity_matrix(features, "cosine").numpy()
    assert update_steps(s, 4) == starts
    assert score(s, starts) == pytest.approx(12, abs=1e-5)
    distance = similarity_matrix(features, "mse").numpy()
    assert update_steps(distance, 4, maximise=False) == starts
    assert score(distance, starts) == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(s=hnp.arrays(np.float64, (8, 8), elements=st.floats(-1, 1, width=16), unique=True), m=st.integers(1, 8))
def test_the_literal_objective_keeps_the_least_similar_steps(s: Any, m: int) -> None:
    steps = consecutive_steps(s, m)
    inside = [s[n - 1, n] for n in steps[1:]]
    outside = [s[n - 1, n] for n in range(1, 8) if n not in steps]
    assert len(steps) == m
    assert not inside or not outside or max(inside) <= min(outside)
    assert consecutive_steps(-s, m, maximise=False) == steps


@pytest.mark.parametrize("count", [0, 6])
@pytest.mark.parametrize("find", [update_steps, consecutive_steps])
def test_more_updates_than_steps_are_refused(find: Any, count: int) -> None:
    with pytest.raises(OptionError, match=f"num_caches={count} does not fit into a run of 5 steps"):
        find(np.eye(5), count)


KEYS = [f"{layer}.{kind}" for layer in range(3) for kind in ("sa", "ca", "ffn")]


LAYERS = {key: int(key[0]) for key in KEYS}


MLPS = [key for key in KEYS if key.endswith("ffn")]


@given(
    steps=st.fixed_dictionaries({key: st.sets(st.integers(0, 15), max_size=5) for key in KEYS}),
    selected=st.lists(st.sampled_from(KEYS), unique=True),
    order=st.randoms(use_true_random=False),
)
def test_union_laws(steps: dict[str, set[int]], selected: list[str], order: Any) -> None:
    out = bubbling_union(steps, LAYERS, MLPS, selected)
    assert all(out[key] >= steps[key] for key in KEYS)
    assert all(out[key] == steps[key] for key in KEYS if key not in selected)
    for u in selected:  # whenever a downstream MLP is computed, so is u
        for v in MLPS:
            if LAYERS[v] >= LAYERS[u]:
                assert out[u] >= out[v]
    shuffled = list(selected)
    order.shuffle(shuffled)
    assert bubbling_union(steps, LAYERS, MLPS, shuffled) == out
    assert bubbling_union(steps, LAYERS, MLPS, []) == steps


def test_distances_mean_what_they_say() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    pairs = x[:, None] - x[None]
    assert torch.allclose(similarity_matrix(x, "l1"), pairs.abs().sum(-1), atol=1e-5)
    assert torch.allclose(similarity_matrix(x, "l2"), pairs.norm(dim=-1), atol=1e-5)
    assert torch.allclose(similarity_matrix(x, "mse"), pairs.square().mean(-1), atol=1e-5)
    moved = [float((a - b).abs().mean()) for a, b in combinations(x, 2)]
    assert step_error(x) == pytest.approx(sum(moved) / len(moved), rel=1e-5)
    assert step_error(x[:1]) == 0


def test_samples_are_averaged_so_that_a_large_one_does_not_dominate() -> None:
    loop = Loop("dit")
    one = elision.fit(loop, "bac", calls=[{"steps": STEPS, "seed": 1}])
    two = elision.fit(loop, "bac", calls=[{"steps": STEPS, "seed": 2}])
    both = elision.fit(loop, "bac", calls=[{"steps": STEPS, "seed": 1}, {"steps": STEPS, "seed": 2}])
    assert (one.facts["samples"], both.facts["samples"]) == (1, 2)
    for name in ("similarity", "error_mean", "error_norm"):
        assert torch.allclose(both.tensors[name], (one.tensors[name] + two.tensors[name]) / 2, atol=1e-6)


def test_fit_measures_the_branch_outputs() -> None:
    """By hand, with hooks; the unconditional branch is not looked at."""
    loop = Loop("wan")
    seen: list[torch.Tensor] = []
    handle = loop.model.blocks[1].ffn.register_forward_hook(lambda m, a, out: seen.append(out.flatten()))  # type: ignore[index, union-attr]
    profile = elision.fit(loop, "bac", calls=[{"steps": STEPS, "mode": "sequential"}])
    handle.remove()
    features = torch.stack(seen[::2])
    i = profile.facts["sites"].index("blocks.1.ffn")
    want = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    assert torch.allclose(profile.tensors["similarity"][i], want, atol=1e-5)
    assert float(profile.tensors["error_mean"][i]) == pytest.approx(step_error(features), rel=1e-5)
    assert float(profile.tensors["error_norm"][i]) == pytest.approx(step_error(features) * features.shape[1], rel=1e-5)


def test_fit_subsamples_without_changing_much() -> None:
    loop = Loop("pixart")
    whole, part = (elision.fit(loop, "bac", calls=[{"steps": STEPS}], subsample=n) for n in (1, 3))
    assert part.tensors["similarity"].shape == whole.tensors["similarity"].shape
    assert not torch.equal(part.tensors["similarity"], whole.tensors["similarity"])
    assert (part.tensors["similarity"] - whole.tensors["similarity"]).abs().mean() < 0.05


def test_sequential_and_batched_guidance_give_one_profile() -> None:
    loop = Loop("flux")
    a, b = (elision.fit(loop, "bac", calls=[{"steps": STEPS, "mode": m}]) for m in ("sequential", "batched"))
    assert a.facts == b.facts
    assert torch.allclose(a.tensors["similarity"], b.tensors["similarity"], atol=1e-4)


def test_fit_refuses() -> None:
    loop = Loop("wan")
    with pytest.raises(OptionError, match=r"ran for \[4, 8\] steps"):
        elision.fit(loop, "bac", calls=[{"steps": 4}, {"steps": 8}])
    with pytest.raises(UnsupportedTarget, match="UNet2DConditionModel"):
        elision.fit(Loop("unet"), "bac", calls=[{"steps": 4}])
    loop.transformer_2 = Loop("wan", seed=1).model  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="2 denoisers"):
        elision.fit(loop, "bac", calls=[{"steps": 4}])


def profiled(kind: str, **options: Any) -> tuple[Loop, Profile]:
    loop = Loop(kind)
    return loop, elision.fit(loop, "bac", calls=[{"steps": STEPS, "mode": "batched"}], **options)


@pytest.mark.parametrize("kind", BLOCKED)
@idle
def test_as_many_updates_as_steps_is_exact_and_one_computes_each_branch_once(kind: str) -> None:
    loop, profile = profiled(kind)
    plain = loop(steps=STEPS, mode="batched")
    with elision.apply(loop, "bac", profile=profile, num_caches=STEPS) as run:
        assert torch.equal(loop(steps=STEPS, mode="batched"), plain)
    assert run.report().outputs_stood_in == 0  # type: ignore[attr-defined]
    with elision.apply(loop, "bac", profile=profile, num_caches=1) as run:
        assert not torch.equal(loop(steps=STEPS, mode="batched"), plain)
    report: Any = run.report()
    assert report.strip() == "C" + "r" * (STEPS - 1)
    assert report.outputs_computed == report.sites["bac"]


@pytest.mark.parametrize("kind", BLOCKED)
@pytest.mark.parametrize(
    "options", [{"union_blocks": 0}, {"union_blocks": 2}, {"union_blocks": 99}, {"schedule": "shared"}]
)
def test_evaluations_are_the_sum_of_the_schedules(kind: str, options: dict[str, Any]) -> None:
    loop, profile = profiled(kind)
    method = BAC(num_caches=3, **options)
    host = Host(loop.model, elision.denoise.adapters.adapter_for(loop.model))
    steps = method.steps_of(host, host.site("branch", "bac"), profile)
    with elision.apply(loop, method, profile=profile) as run:
        first = loop(steps=STEPS, mode="batched", seed=3)
        again = loop(steps=STEPS, mode="batched", seed=3)
    report: Any = run.report()
    assert torch.equal(first, again)
    assert report.outputs_computed == 2 * sum(len(mine) for mine in steps.values())
    if options == {"union_blocks": 0} or "schedule" in options:
        assert {len(mine) for mine in steps.values()} == {3}
    if "schedule" in options:
        assert len({tuple(sorted(mine)) for mine in steps.values()}) == 1
    if options.get("union_blocks") == 99:  # everything above the last MLP is computed with it
        last = [site for site in host.site("branch", "bac") if site.kind in ("mlp", "fused")][-1]
        assert all(mine >= steps[last.key] for mine in steps.values())


@pytest.mark.parametrize("kind", BLOCKED)
def test_at_a_frozen_input_what_stands_in_is_the_truth(kind: str) -> None:
    loop, profile = profiled(kind)
    x, t = torch.randn(*loop.kind.latent(1, 4), generator=torch.Generator().manual_seed(4)), torch.tensor(300.0)
    with torch.no_grad(), elision.apply(loop, "bac", profile=profile, num_caches=3) as run:
        loop.scheduler.set_timesteps(STEPS)
        outs = []
        for time in loop.scheduler.timesteps:
            outs.append(loop.call(x, t, loop.kind.inputs(1, 4, 10)))
            loop.scheduler.step(outs[-1], time, x)
    assert run.report().outputs_stood_in > 0  # type: ignore[attr-defined]
    assert all(torch.allclose(out, outs[0], rtol=1e-4, atol=1e-5) for out in outs)


@idle
def test_a_policy_acts_twice_as_two_fresh_ones() -> None:
    model = policy()
    plain = act(model)
    profile = elision.fit(model, "bac", calls=[lambda m: act(m)])
    assert len(profile.facts["sites"]) == 6
    with elision.apply(model, "bac", steps=12, profile=profile, num_caches=12):
        assert torch.equal(act(model), plain)
    rows = counts(model)
    alone = []
    for seed in (1, 2):
        with elision.apply(model, "bac", steps=12, profile=profile, num_caches=4, union_blocks=2):
            alone.append(act(model, seed=seed))
    with elision.apply(model, "bac", steps=12, profile=profile, num_caches=4, union_blocks=2) as run:
        rows.clear()
        assert torch.equal(act(model, seed=1), alone[0])
        first = rows.copy()
        rows.clear()
        assert torch.equal(act(model, seed=2), alone[1])
        assert rows == first
    assert sum(map(sum, rows)) == run.report().outputs_computed / 2  # type: ignore[attr-defined]
    assert torch.equal(act(model), plain)


@idle
def test_forced_last_step_is_computed() -> None:
    model = policy()
    profile = elision.fit(model, "bac", calls=[lambda m: act(m)])
    rows = counts(model)
    for forced, want in (((), 0), ((-1,), 1), ((11, 99), 1)):
        with elision.apply(model, "bac", steps=12, profile=profile, num_caches=1, forced=forced):
            rows.clear()
            act(model)
        assert [all(row) for row in rows] == [True] + [False] * 10 + [bool(want)]


def test_options_change_the_schedule() -> None:
    loop, profile = profiled("flux")
    host = Host(loop.model, elision.denoise.adapters.adapter_for(loop.model))
    sites = host.site("branch", "bac")
    seen = {
        str(options): str(BAC(num_caches=3, **options).steps_of(host, sites, profile))  # type: ignore[arg-type]
        for options in (
            {"union_blocks": 0},
            {"union_blocks": 1},
            {"union_blocks": 3},
            {"union_blocks": 0, "objective": "consecutive"},
            {"schedule": "shared", "union_blocks": 0},
            {"union_blocks": 0, "forced": (-1,)},
        )
    }
    assert len(set(seen.values())) == len(seen)
    skipped = BAC(num_caches=3, union_blocks=1, union_of_one=False).steps_of(host, sites, profile)
    assert str(skipped) == seen["{'union_blocks': 0}"]
    for metric in METRICS[1:]:
        mine = elision.fit(loop, "bac", calls=[{"steps": STEPS, "mode": "batched"}], metric=metric)
        steps = BAC(num_caches=STEPS, union_blocks=0).steps_of(host, sites, mine)
        assert all(mine == set(range(STEPS)) for mine in steps.values())


def test_the_paper_norm_ranks_by_size_as_well() -> None:
    loop, profile = profiled("flux")
    sizes = profile.tensors["error_norm"] / profile.tensors["error_mean"]
    assert len(set(sizes.round().int().tolist())) > 1  # text and image branches
    flat = torch.linspace(1.0, 1.01, len(sizes)).flip(0)  # the first branch is the noisiest, hardly
    made = replace(profile, tensors={**profile.tensors, "error_mean": flat, "error_norm": flat * sizes})
    host = Host(loop.model, elision.denoise.adapters.adapter_for(loop.model))
    sites = host.site("branch", "bac")
    before = BAC(num_caches=3, union_blocks=0).steps_of(host, sites, made)
    for proxy, ranked in (("mean", flat), ("norm", flat * sizes)):
        method = BAC(num_caches=3, union_blocks=1, proxy=proxy)  # type: ignore[arg-type]
        grown = {key for key, mine in method.steps_of(host, sites, made).items() if mine != before[key]}
        assert grown <= {profile.facts["sites"][int(ranked.argmax())]}
    assert int(flat.argmax()) != int((flat * sizes).argmax())


def test_a_profile_is_for_its_steps_and_its_branches(tmp_path: Any) -> None:
    loop, profile = profiled("dit")
    path = profile.save(tmp_path / "bac.safetensors")
    with elision.apply(loop, "bac", profile=path, num_caches=2) as run:
        with pytest.warns(ElisionWarning, match=r"made for 8 steps and the run has 11: fit one for 11 steps"):
            loop(steps=11, mode="batched")
        assert run.report().strip().endswith("CCC")  # type: ignore[attr-defined]
    with pytest.raises(ProfileMismatch, match="steps"):
        elision.apply(loop.model, "bac", profile=path, steps=11)
    with pytest.raises(ProfileMismatch, match="other branches"):
        elision.apply(Loop("wan"), "bac", profile=path, force=True)
    with pytest.raises(ProfileError, match="needs a profile"):
        elision.apply(loop, "bac")
    with pytest.raises(OptionError, match="num_caches=9 does not fit into a run of 8 steps"):
        elision.apply(loop, "bac", profile=path, num_caches=9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "uniform", "num_caches": 4}, "num_caches has no meaning for schedule='uniform'"),
        ({"interval": 3}, "interval has no meaning for schedule='optimal'"),
        ({"forced": (1.5,)}, "forced="),
        ({"forced": [1]}, "forced="),
    ],
)
def test_rules_between_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        BAC(**options)


def test_a_foreign_layer_class_is_refused_by_name() -> None:
    model = policy()
    model.decoder.layers[1] = nn.Identity()
    with pytest.raises(UnsupportedTarget, match=r"decoder\.layers\.1 of TransformerForDiffusion is a Identity"):
        elision.apply(model, "bac", schedule="uniform")


def test_a_policy_without_a_decoder_is_refused() -> None:
    """The public class also builds encoder-only models, whose `decoder` is None."""
    model = policy()
    model.encoder, model.decoder = model.decoder, None  # type: ignore[assignment]
    before = snapshot(model)
    for name, options in (("bac", {"schedule": "uniform"}), ("uniform", {}), ("taylorseer", {"site": "head"})):
        with pytest.raises(UnsupportedTarget, match=r"this TransformerForDiffusion is built without decoder\.layers"):
            elision.apply(model, name, steps=12, **options)
    with pytest.raises(UnsupportedTarget, match=r"built without decoder\.layers.*at the site 'model'"):
        elision.fit(model, "bac", calls=[lambda m: act(m)])
    assert changed(before, snapshot(model)) == []
    elision.apply(model, "uniform", steps=12, site="model").remove()
