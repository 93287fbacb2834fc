"""ERTACache: the offline part against brute force, the step sizes and the correction against their formulas."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import elision
from elision.denoise.fit.ertacache import Moments, factor, line
from elision.denoise.methods.ertacache import ERTACache, StepSizes, bounded
from elision.denoise.steps import Step
from elision.profile import Profile
from tests.denoise.erta import T, fit, run
from tests.models import Loop, draw

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


KEPT = ("flux", "sd3", "dit", "pixart", "wan", "wan_i2v", "unet")


PLAIN: dict[str, Any] = {"adjust": False, "rectify": "off"}


class Hand:
    """A sampling loop of our own that can do at every step what the method does."""

    def __init__(self, loop: Loop, seed: int, mode: str = "sequential") -> None:
        self.loop = loop
        loop.scheduler.set_timesteps(T)
        self.sigmas = [float(s) for s in loop.scheduler.sigmas]
        self.x = draw(*loop.kind.latent(1, 4), seed=seed)
        self.branches = ("cond", "uncond") if mode == "sequential" else ("cond",)
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def network(self, sigma: float) -> dict[str, Tensor]:
        t, kind = torch.tensor(1000 * sigma), self.loop.kind
        prompts = {"cond": 10, "uncond": 20}
        return {b: self.loop.call(self.x, t, kind.inputs(1, 4, prompts[b])) for b in self.branches}

    def cached(self) -> dict[str, Tensor]:
        return {b: self.x + r for b, r in self.kept.items()}

    def keep(self, v: dict[str, Tensor]) -> None:
        self.kept = {b: out - self.x for b, out in v.items()}

    def go(self, v: dict[str, Tensor], dt: float) -> None:
        guided = v["cond"] if len(v) == 1 else v["uncond"] + 2.0 * (v["cond"] - v["uncond"])
        self.x = self.x + dt * guided


def brute_force(loop: Loop, seeds: tuple[int, ...], lam: float, mode: str) -> tuple[list[int], list[list[float]]]:
    """Step by step on all runs at once: the list, and the relative errors [runs][T]."""
    norms: list[list[float]] = []
    for seed in seeds:
        hand = Hand(loop, seed, mode)
        norms.append([])
        for n in range(T):
            v = hand.network(hand.sigmas[n])
            norms[-1].append(float((v["cond"] - hand.x).abs().sum()))
            hand.go(v, hand.sigmas[n + 1] - hand.sigmas[n])
    hands = [Hand(loop, seed, mode) for seed in seeds]
    listed: list[int] = []
    errors: list[list[float]] = [[] for _ in seeds]
    for n in range(T):
        truths = [hand.network(hand.sigmas[n]) for hand in hands]
        if n:
            for hand, v, row, norm in zip(hands, truths, errors, norms, strict=True):
                row.append(float((hand.kept["cond"] - (v["cond"] - hand.x)).abs().sum()) / norm[n])
            if n < T - 1 and np.mean([row[-1] for row in errors]) < lam:
                listed.append(n)
        for hand, v in zip(hands, truths, strict=True):
            out = hand.cached() if n in listed else v
            if n not in listed:
                hand.keep(v)
            hand.go(out, hand.sigmas[n + 1] - hand.sigmas[n])
    return listed, errors


@pytest.mark.parametrize(("kind", "mode"), [("flux", "sequential"), ("sd3", "distilled"), ("wan", "sequential")])
@pytest.mark.parametrize(("seeds", "lam"), [((5,), 0.35), ((5, 6, 7), 0.4)])
def test_the_list_equals_brute_force(kind: str, mode: str, seeds: tuple[int, ...], lam: float) -> None:
    loop = Loop(kind, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0))
    listed, errors = brute_force(loop, seeds, lam, mode)
    profile = fit(loop, seeds, mode, threshold=lam)
    assert profile.tensors["reused"].tolist() == listed
    assert 0 < len(listed) < T - 2
    np.testing.assert_allclose(profile.tensors["relative_errors"][:, 1:].numpy(), errors, rtol=1e-3)
    assert profile.facts["passes"] <= T


def test_the_order_of_guidance_calls_and_batching_do_not_matter() -> None:
    loop = Loop("flux")
    first = fit(loop, threshold=0.4)
    calls = [{"seed": s, "steps": T, "mode": "sequential", "order": ("uncond", "cond")} for s in (5, 6)]
    for other in (elision.fit(loop, "ertacache", calls=calls, threshold=0.4), fit(loop, mode="batched", threshold=0.4)):
        assert other.tensors.keys() == first.tensors.keys()
        for key, value in first.tensors.items():
            torch.testing.assert_close(other.tensors[key], value, rtol=1e-3, atol=2e-3)
    assert {"K.cond.scalar", "K.rest.channel"} <= first.tensors.keys()


@pytest.mark.parametrize("kind", KEPT)
def test_limits_of_the_threshold(kind: str) -> None:
    """0 skips nothing and is bit-identical with everything on; infinity leaves the first and the last step."""
    loop = Loop(kind)
    plain = loop(steps=T, mode="sequential")
    nothing = fit(loop, (5,), threshold=0.0)
    out, report = run(loop, nothing, mode="sequential")
    assert nothing.tensors["reused"].tolist() == []
    assert torch.equal(out, plain)
    assert report.strip() == "C" * T
    all_but_ends = fit(loop, (5,), threshold=1e9)
    calls = loop.called
    out, report = run(loop, all_but_ends, PLAIN, mode="sequential")
    assert report.strip() == "C" + "r" * (T - 2) + "C"
    assert report.calls - report.calls_elided == 4
    assert loop.called - calls == 2 * T
    assert not torch.equal(out, plain)


def test_more_steps_are_skipped_as_the_threshold_grows() -> None:
    loop = Loop("flux")
    counts = [len(fit(loop, (5, 6, 7), threshold=lam).tensors["reused"]) for lam in (0.0, 0.2, 0.35, 0.5, 0.8)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] > counts[2] > 0


grids = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=30).map(
    lambda gaps: [sum(gaps[i:]) / sum(gaps) for i in range(len(gaps))] + [0.0]
)


def walk(sigmas: list[float], phi: dict[int, float], skipped: set[int]) -> list[float | None]:
    control, total = StepSizes(phi), len(sigmas) - 1
    return [control.dt(Step(n, n, total, 0.0, sigmas[n]), sigmas, n in skipped) for n in range(total)]


@given(grids, st.data())
@settings(max_examples=100, deadline=None)
def test_the_step_sizes_use_the_whole_time(sigmas: list[float], data: st.DataObject) -> None:
    total = len(sigmas) - 1
    phi = {n: data.draw(st.floats(0, 1)) for n in range(total)}
    skipped = data.draw(st.sets(st.integers(0, total - 1)))
    sizes = [sigmas[n + 1] - sigmas[n] if dt is None else dt for n, dt in enumerate(walk(sigmas, phi, skipped))]
    assert sum(sizes) == pytest.approx(-1.0, abs=1e-6)
    assert all(size <= 1e-12 for size in sizes)
    left, weights = 1.0, [sigmas[n] - sigmas[n + 1] for n in range(total)]
    for n, size in enumerate(sizes):  # the formula as it is printed: the time left times w_n over the weights to come
        f = phi[n] if n in skipped and n < total - 1 else 1.0
        assert -size == pytest.approx(left * weights[n] / sum(weights[n:]) * f, abs=1e-6)
        left += size
    assert walk(sigmas, dict.fromkeys(range(total), 1.0), skipped) == [None] * total
    assert walk(sigmas, phi, set()) == [None] * total


def test_uniform_grids_share_what_is_left_evenly() -> None:
    sizes = walk([1.0, 0.75, 0.5, 0.25, 0.0], {1: 0.0}, {1})
    assert sizes[0] is None
    assert sizes[1:] == pytest.approx([0.0, -0.375, -0.375])


def test_the_factor() -> None:
    assert factor(0.0, 3.0) == 1.0
    assert factor(0.75, 3.0) == 0.75
    assert factor(4.0, 3.0) == 0.0
    assert factor(0.0, 0.0) == 1.0
    assert factor(0.1, 0.0) == 0.0


def test_standing_still_is_bounded() -> None:
    still = dict.fromkeys(range(10), 0.0)
    assert bounded(frozenset(range(1, 8)), still, 2) == {1, 2, 4, 5, 7}
    assert bounded(frozenset(range(1, 8)), {**still, 2: 0.5}, 2) == {1, 2, 3, 4, 6, 7}
    assert bounded(frozenset({1, 3, 5}), still, 0) == frozenset()
    assert bounded(frozenset({1, 2, 3}), {}, 0) == {1, 2, 3}
    loop = Loop("flux")
    _, report = run(loop, None, {"reused": (1, 2, 3, 4, 5), "phi": 0.0, "rectify": "off", "max_frozen": 2})
    assert report.strip() == "CrrCrrCC"
    assert any("computes steps [3]" in note for note in report.notes)


def test_the_line_is_least_squares() -> None:
    """K and B of the linearised sigmoid are numpy's affine fit; the residual has no mean and a smaller square."""
    v = draw(3, 400, seed=1).double()
    e = 0.3 * v + 0.1 + 0.2 * draw(3, 400, seed=2).double()
    moments = Moments()
    moments.add(v[:, :150].float(), e[:, :150].float())
    moments.add(v[:, 150:].float(), e[:, 150:].float())
    for pooled, rows in ((True, [slice(None)]), (False, [0, 1, 2])):
        K, B = moments.line(pooled)
        for i, row in enumerate(rows):
            x, y = v[row].flatten(), e[row].flatten()
            slope, shift = np.polyfit(x.numpy(), y.numpy(), 1)
            assert float(K[i]) / 4 == pytest.approx(slope, rel=1e-5)
            assert float(B[i]) / 4 + 0.5 == pytest.approx(shift, rel=1e-5)
            left = y - (K[i] * x + B[i]) / 4 - 0.5
            assert float(left.mean()) == pytest.approx(0, abs=1e-6)
            assert float(left.square().mean()) < float(y.square().mean())
            covariance = float(((x - x.mean()) * (y - y.mean())).mean())
            assert float(K[i]) == pytest.approx(4 * covariance / float(x.var(correction=0)), rel=1e-5)
            assert float(B[i]) == pytest.approx(4 * (float(y.mean()) - 0.5) - float(K[i] * x.mean()), rel=1e-5)


def test_a_constant_output_has_no_slope() -> None:
    two, one = torch.tensor([2.0]).double(), torch.tensor([0.25]).double()
    K, B = line(two, one, two * two, two * one)
    assert (float(K), float(B)) == (0.0, -1.0)
    K, B = line(0 * two, 0 * one, 0 * two, 0 * one)
    assert (float(K), float(B)) == (0.0, -2.0)  # no correction


SETTINGS: list[dict[str, Any]] = [
    {"adjust": False, "rectify": "off"},
    {"rectify": "off"},
    {"rectify": "off", "feed": "nominal"},
    {"adjust": False},
    {"adjust": False, "granularity": "channel"},
    {"adjust": False, "rectify": "sigmoid"},
    {"granularity": "channel"},
]


def by_hand(loop: Loop, profile: Profile, options: dict[str, Any], mode: str) -> Tensor:
    """The method as its algorithm box has it."""
    o = ERTACache(**options)
    reused = profile.tensors["reused"].tolist()
    hand, reached = Hand(loop, 0, mode), 1.0
    for n in range(T):
        here, following = hand.sigmas[n], hand.sigmas[n + 1]
        if n not in reused:
            v = hand.network(reached if o.adjust and o.feed == "reached" else here)
            hand.keep(v)
        else:
            v = hand.cached()
            for b in v if o.rectify != "off" else ():
                key = f"{'cond' if b == 'cond' else 'rest'}.{o.granularity}"
                K, B = (profile.tensors[f"{name}.{key}"][n].float() for name in "KB")
                if o.granularity == "channel" and v[b].ndim > 3:
                    K, B = (c[: v[b].shape[1]].view(-1, *[1] * (v[b].ndim - 2)) for c in (K, B))
                z = K * v[b] + B
                v[b] = v[b] - (torch.sigmoid(z) if o.rectify == "sigmoid" else z / 4 + 0.5)
        share = reached * (here - following) / here
        phi = float(profile.tensors["phi"][n]) if n in reused else 1.0
        dt = (share * phi) if o.adjust else here - following
        reached -= dt
        hand.go(v, -dt)
    return hand.x


@pytest.mark.parametrize("kind", KEPT)
def test_the_method_equals_its_algorithm_box(kind: str) -> None:
    """Every part alone and together, on every adapter; predictions that carry their variance included."""
    loop = Loop(kind, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0))
    profile = fit(loop, threshold=0.5)
    phi = profile.tensors["phi"].clone()
    for n in profile.tensors["reused"].tolist():  # whatever was measured, factors that do something
        phi[n] = 0.35 + 0.05 * n
    profile = Profile(profile.fingerprint, {**profile.tensors, "phi": phi}, profile.facts)
    assert 0 < len(profile.tensors["reused"]) < T - 1
    outs, mode = [], "distilled" if kind == "unet" else "sequential"
    for options in SETTINGS:
        out, report = run(loop, profile, options, mode=mode)
        want = by_hand(loop, profile, options, mode)
        torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()), msg=f"{options}")
        assert report.outputs_stood_in == len(profile.tensors["reused"]) * (2 if mode == "sequential" else 1)
        outs.append(out)
    assert all(not torch.allclose(a, outs[0], atol=1e-4) for a in outs[1:])


def test_guidance_in_one_call_takes_the_same_profile() -> None:
    loop = Loop("flux")
    profile = fit(loop, threshold=0.5)
    for options in ({"max_frozen": 99}, {"granularity": "channel", "adjust": False}):
        one, _ = run(loop, profile, options, mode="sequential", batch=2)
        two, _ = run(loop, profile, options, mode="batched", batch=2)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


class Field(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.f(hidden_states)


class Flow(SimpleNamespace):
    """A pipeline around a field."""

    def __call__(self, seed: int = 0, scale: float = 1.0, **_: Any) -> Tensor:
        x = scale * draw(2, 5, 3, seed=seed)
        self.scheduler.set_timesteps(T)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(hidden_states=x, timestep=t[None]), t, x, return_dict=False)[0]
        return cast(Tensor, x)


def flow(f: Callable[[Tensor], Tensor]) -> Flow:
    return Flow(transformer=Field(f), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5))


@torch.no_grad()
def test_a_field_with_a_constant_residual_is_cached_exactly() -> None:
    toy = flow(lambda x: x + torch.tensor([1.0, -0.5, 0.25]))
    plain = toy(seed=3)
    for reused in ((1, 2, 3, 4, 5, 6), (2, 5), (6,)):
        profile = elision.fit(toy, "ertacache", calls=[{"seed": 1}, {"seed": 2}], reused=reused)
        torch.testing.assert_close(profile.tensors["phi"], torch.ones(T).double(), rtol=0, atol=1e-5)
        K, B = profile.tensors["K.cond.scalar"], profile.tensors["B.cond.scalar"]
        assert (K.abs().max(), (B + 2).abs().max()) < (1e-5, 1e-5)
        out, report = run(toy, profile, seed=3)
        assert report.steps_predicted == len(reused)
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_linear_field_is_corrected_exactly() -> None:
    """v = c x: the error is (c - 1) (x_c - x_i), proportional to what is cached, so that least squares removes it."""
    c = -0.6
    toy = flow(lambda x: c * x)
    plain, reused = toy(seed=3), (2, 5)  # K and B are measured uncorrected, so in a row it is not exact
    profile = elision.fit(toy, "ertacache", calls=[{"seed": 1}, {"seed": 2, "scale": 2.0}], reused=reused)
    out, _ = run(toy, profile, {"adjust": False}, seed=3)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    uncorrected, _ = run(toy, profile, PLAIN, seed=3)
    assert (uncorrected - plain).abs().max() > 1e-2
    toy.scheduler.set_timesteps(T)
    s = [float(v) for v in toy.scheduler.sigmas]
    x1, x2 = 1.0, 1 + c * (s[2] - s[1])
    error = (c - 1) * (x1 - x2) / (x2 + (c - 1) * x1)
    assert float(profile.tensors["K.cond.scalar"][2]) / 4 == pytest.approx(error, rel=1e-4)
