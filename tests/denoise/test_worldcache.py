"""WorldCache against the recorded official runs, its closed forms, and independent reimplementations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elision
from elision.denoise.engine import DenoiseApplied
from elision.denoise.methods.worldcache import (
    CHAOTIC,
    LINEAR,
    STABLE,
    WorldCache,
    WorldState,
    curvature,
    damping,
    token_groups,
)
from elision.denoise.predictors import Taylor
from elision.denoise.tokens import TokenView
from elision.errors import OptionError, UnsupportedTarget
from tests.golden import Case, cases
from tests.models import Loop, draw

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
GOLDEN = cases("worldcache")
RUNS = [name for name, case in GOLDEN.items() if "num_steps" in case.options]


class Recorded(nn.Module):
    """Returns the recorded output of a step, if it is called."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs
        self.calls: list[int] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        self.calls.append(int(timestep))
        return self.outputs[int(timestep)].clone()


class Played:
    """One run over given outputs, with the state after every step."""

    def __init__(self, outputs: Tensor, **options: Any) -> None:
        model = Recorded(outputs)
        total = len(outputs)
        self.out: list[Tensor] = []
        self.drift: list[float] = []
        self.kappa: dict[int, Tensor] = {}
        self.groups: dict[int, Tensor] = {}
        run = elision.apply(model, "worldcache", steps=total, **{"site": "model", **options})
        assert isinstance(run, DenoiseApplied)
        for n in range(total):
            self.out.append(model(hidden_states=torch.zeros_like(outputs[0]), timestep=torch.tensor(float(n))))
            state = run.hosts[0].groups[0].schedule
            assert isinstance(state, WorldState)
            state._close()
            self.drift.append(state.drift)
            branch = state.branches["", ""]
            if n in model.calls and branch.kappa is not None:
                state._regroup(n)
                assert branch.group is not None
                self.kappa[n], self.groups[n] = branch.kappa.clone(), branch.group.clone()
        self.full = model.calls
        self.held = sum(t.numel() for t in state.tensors())
        self.report = run.report()
        run.remove()


def options_of(case: Case) -> dict[str, Any]:
    o = case.options
    named = {
        "stable": o["percentile_stable"],
        "chaotic": o["percentile_chaotic"],
        "n_max": o["n_max"],
        "threshold": o["error_threshold"],
        "eps": o["eps"],
        "warmup_steps": o["warmup_steps"],
    }
    if case["y"].ndim == 6:
        named["modalities"] = (16, 16, 24)
    return named


@pytest.mark.parametrize("name", RUNS)
def test_golden(name: str) -> None:
    case = GOLDEN[name]
    played = Played(case["y"], **options_of(case))
    near = {key: case.tolerance[key] for key in ("rtol", "atol")}
    assert played.full == case.expected["full_steps"]
    torch.testing.assert_close(torch.stack(played.out), case["out"], **near)
    drift = torch.tensor(played.drift)
    torch.testing.assert_close(drift, case["E_after"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.cat([torch.zeros(1), drift[:-1]]), case["E_before"], rtol=1e-3, atol=1e-5)
    assert sorted(played.kappa) == case.expected["kappa_steps"]
    for i, n in enumerate(case.expected["kappa_steps"]):
        torch.testing.assert_close(played.kappa[n], case["kappa"][i], rtol=case.tolerance["kappa_rtol"], atol=1e-6)
        assert torch.equal(played.groups[n].long(), case["groups"][i]), n


WORDS = {"warmup": "warm-up", "cache": "scheduled", "n_max": "streak over", "last": "last steps"}
WORDS |= {"no_curvature": "no curvature", "drift": "drift"}


@pytest.mark.parametrize("name", [n for n in RUNS if "reason" in GOLDEN[n].expected])
def test_golden_reasons(name: str) -> None:
    case = GOLDEN[name]
    (run,) = Played(case["y"], **options_of(case)).report.runs
    reasons = [next(iter(step.groups["worldcache"].reasons)) for step in run.steps]
    assert reasons == [WORDS[reason] for reason in case.expected["reason"]]


@pytest.mark.parametrize("name", [n for n in RUNS if "paper" in GOLDEN[n].expected])
def test_golden_drift_in_the_papers_wording(name: str) -> None:
    case = GOLDEN[name]
    played = Played(case["y"], **options_of(case), drift="chaotic")
    assert played.full == case.expected["paper"]["full_steps"]
    before = torch.tensor([0.0, *played.drift[:-1]])
    torch.testing.assert_close(before, case["paper_E_before"], rtol=1e-3, atol=1e-5)


def test_golden_groups() -> None:
    case = GOLDEN["groups"]
    for row, kappa in enumerate(case["kappa"]):
        for pair, (stable, chaotic) in enumerate(case.options["pairs"]):
            group = token_groups(kappa, stable, chaotic)
            hot = case["chaotic"][row, pair].bool()
            assert torch.equal(group == CHAOTIC, hot)
            assert torch.equal(group == STABLE, case["stable"][row, pair].bool() & ~hot)
            assert torch.equal(group == LINEAR, case["linear"][row, pair].bool() & ~hot)


def test_golden_curvature_and_damping() -> None:
    case = GOLDEN["curvature"]
    a, b, c = case["outputs"]
    for row, (s0, s1, s2) in enumerate(case.options["steps"]):
        kappa = curvature((c - b) / (s2 - s1), (b - a) / (s1 - s0), s2 - s1, case.options["eps"])
        torch.testing.assert_close(kappa, case["kappa"][row], **case.tolerance)
    for n_max, alphas in case.expected["alpha_by_n_max"].items():
        mine = [damping(k, int(n_max)) for k in range(1, int(n_max) + 1)]
        assert mine == pytest.approx(alphas)
        assert mine == sorted(mine)
    assert damping(3, 6) == 0.5
    assert damping(6, 6) == damping(9, 6) == damping(1, 0) == 1.0


# -- closed forms ----------------------------------------------------------------------------------------------------

S = torch.arange(24.0)[:, None, None, None]


def test_affine_tokens_are_exact_among_others() -> None:
    """Linear and damped predictions of an affine token equal the truth; reuse errs by k v."""
    curved = torch.sin(S * draw(1, 1, 12, 4, seed=1).abs()) * 3
    v = draw(1, 1, 6, 4, seed=2)
    y = torch.cat([draw(1, 1, 6, 4, seed=3) + S * v, curved], dim=2)
    for groups in ("linear", "chaotic"):
        played = Played(y, groups=groups, n_max=3, warmup_steps=3, threshold=1e9)
        torch.testing.assert_close(torch.stack(played.out)[:, :, :6], y[:, :, :6], rtol=1e-4, atol=1e-4)
        assert (torch.stack(played.out) - y)[:, :, 6:].abs().max() > 0.1
    reused = torch.stack(Played(y, groups="stable", n_max=3, warmup_steps=3, threshold=1e9).out)
    torch.testing.assert_close(reused[5, :, :6], y[5, :, :6] - 3 * v[0], rtol=1e-4, atol=1e-4)  # last computed: 2


def test_quadratic_tokens_err_by_the_closed_form() -> None:
    """(k^2 + k gap) / 2 y'' with the slope measured over `gap` steps."""
    bend = draw(1, 1, 5, 3, seed=4)
    y = 0.5 * bend * S**2
    played = Played(y, groups="linear", n_max=3, warmup_steps=3, threshold=1e9)
    assert played.full[:5] == [0, 1, 2, 6, 10]
    for n, last, gap in ((4, 2, 1), (5, 2, 1), (8, 6, 4), (9, 6, 4)):
        k = n - last
        torch.testing.assert_close(y[n] - played.out[n], (k * k + k * gap) / 2 * bend[0], rtol=1e-3, atol=1e-3)


def wavy(seed: int = 5, total: int = 24) -> Tensor:
    """Smooth trajectories [T, 2, 40, 6] of different bends."""
    steps = torch.arange(float(total))[:, None, None, None]
    return torch.sin(steps * draw(1, 2, 40, 1, seed=seed).abs() * 0.6 + draw(1, 2, 40, 6, seed=seed + 1))


def test_scale_and_order_of_tokens_do_not_matter() -> None:
    y, order = wavy(), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    base = Played(y, warmup_steps=3, threshold=0.4)
    for changed, undo in ((y * 256, lambda t: t), (y[:, :, order], lambda t: t[:, order.argsort()])):
        other = Played(changed, warmup_steps=3, threshold=0.4)
        assert other.full == base.full
        assert other.drift == pytest.approx(base.drift, rel=1e-3)
        assert all(torch.equal(undo(other.groups[n]), base.groups[n]) for n in base.groups)
    assert "drift" in base.report.reasons()["worldcache"]


@pytest.mark.parametrize(("stable", "chaotic"), [(0.3, 0.6), (0.2, 0.8), (0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_sizes_of_the_groups(stable: float, chaotic: float) -> None:
    kappa = draw(4, 250, seed=6).abs()
    group = token_groups(kappa, stable, chaotic)
    assert (group == STABLE).sum() == pytest.approx(1000 * stable, abs=1)
    assert (group == CHAOTIC).sum() == pytest.approx(1000 * (1 - chaotic), abs=1)
    assert int((group == LINEAR).sum()) == 1000 - int((group != LINEAR).sum())
    low, high = torch.quantile(kappa, torch.tensor([stable, chaotic]))
    assert torch.equal(group == CHAOTIC, kappa >= high)
    assert torch.equal((group == STABLE), (kappa < low) & ~(kappa >= high))


def test_all_linear_is_taylorseer_of_first_order() -> None:
    """stable=0, chaotic=1: everything but the token of the largest curvature is extrapolated linearly."""
    y = wavy()
    played = Played(y, stable=0.0, chaotic=1.0, n_max=2, warmup_steps=3, threshold=1e9)
    taylor = Taylor(1)
    for n in range(len(y)):
        if n in played.full:
            taylor.update(n, y[n])
            hot = played.groups.get(n, torch.zeros(2, 40)) == CHAOTIC
        else:
            assert hot.sum() == 1
            torch.testing.assert_close(played.out[n][~hot], taylor.forecast(n)[~hot], rtol=1e-5, atol=1e-5)
    reuse = Played(y, stable=1.0, chaotic=1.0, n_max=2, warmup_steps=3, threshold=1e9)
    assert torch.equal(reuse.out[4][reuse.groups[2] == STABLE], y[2][reuse.groups[2] == STABLE])
    assert (reuse.groups[2] == STABLE).sum() == 79


@pytest.mark.parametrize("threshold", [0.05, 0.3, 1.0, 1e9])
@pytest.mark.parametrize("n_max", [1, 3, 6])
def test_decisions_follow_the_rules(n_max: int, threshold: float) -> None:
    """An independent replay of the decisions from the reported drift."""
    played = Played(wavy(seed=9), n_max=n_max, threshold=threshold, warmup_steps=4, tail_steps=2)
    last = -1
    for n in range(24):
        before = played.drift[n - 1] if n else 0.0
        forced = n < 4 or n >= 22 or before >= threshold or n - last > n_max
        assert (n in played.full) == forced
        last = n if forced else last
        assert n - last <= n_max
        assert played.drift[n] == 0 if forced else played.drift[n] >= before


def test_random_groups_keep_their_sizes() -> None:
    y = wavy()
    mine, random = (Played(y, groups=g, n_max=2, warmup_steps=3, threshold=1e9) for g in ("curvature", "random"))
    assert mine.full == random.full
    assert torch.equal(mine.groups[2].flatten().sort().values, random.groups[2].flatten().sort().values)
    assert not torch.equal(mine.groups[2], random.groups[2])
    assert not torch.equal(mine.out[3], random.out[3])


def test_memory_is_an_output_and_two_slopes() -> None:
    y = wavy()
    assert Played(y, warmup_steps=3).held == 3 * y[0].numel() + 2 * y[0][..., 0].numel()


def test_guidance_in_two_calls_pools_groups_and_drift() -> None:
    """One decision per step; equal to one call of twice the batch (outputs: conformance)."""
    loop, strips, reasons = Loop("flux"), [], []
    for mode in ("sequential", "batched"):
        with elision.apply(loop, "worldcache", warmup_steps=3, threshold=0.8, n_max=4) as run:
            loop(steps=16, mode=mode, batch=2)
        report: Any = run.report()
        strips.append(report.strip())
        reasons.append(report.reasons())
    assert strips[0] == strips[1]
    assert reasons[0] == reasons[1]
    assert "drift" in reasons[0]["worldcache"]


def test_a_drift_that_is_not_a_number_computes() -> None:
    y = wavy()
    y[2, 0, 3] = 1e38  # the next difference overflows
    played = Played(y, warmup_steps=3, chaotic=0.0, stable=0.0, threshold=1e9)
    assert all(torch.isfinite(played.out[n]).all() for n in played.full)


# -- token views -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 3, 4), (2, 5, 2, 3, 4)])
def test_view_without_modalities(shape: tuple[int, ...]) -> None:
    x, view = draw(*shape, seed=1), TokenView()
    tokens = view.split(x)
    assert tokens.ndim == 3
    assert torch.equal(view.join(tokens), x)
    if len(shape) == 4:
        assert torch.equal(tokens[1, 6], x[1, :, 1, 2])


@pytest.mark.parametrize("shape", [(2, 9, 3, 4), (2, 9, 2, 3, 4), (2, 2, 9, 3, 4), (2, 7, 9)])
def test_view_with_modalities(shape: tuple[int, ...]) -> None:
    """A token per modality and place, all of the first one first, padded with zeros."""
    x, view = draw(*shape, seed=2), TokenView((4, 2, 3))
    tokens = view.split(x)
    places = x.numel() // (2 * 9)
    assert tokens.shape == (2, 3 * places, 4)
    assert torch.equal(view.join(tokens), x)
    assert (tokens[:, places : 2 * places, 2:] == 0).all()
    assert (tokens[:, 2 * places :, 3:] == 0).all()


def test_modalities_are_checked() -> None:
    with pytest.raises(OptionError, match="site='model'"):
        WorldCache(modalities=(2, 2))
    with pytest.raises(UnsupportedTarget, match=r"6 channels, and the prediction of shape .* has 5"):
        TokenView((4, 2)).split(draw(1, 5, 3, 3, seed=0))
    with pytest.raises(UnsupportedTarget, match="9 channels"):
        Played(wavy()[..., :5], modalities=(4, 5), warmup_steps=3)


class Scenes(nn.Module):
    """The exact flow of a data set of small scenes: RGB squares over a ramp, with a depth that jumps at their edges.

    For x = (1 - t) x0 + t noise the best velocity is (x - E[x0 | x]) / t, an average over the data set.
    """

    def __init__(self, side: int = 8) -> None:
        super().__init__()
        scenes = []
        for top in range(side - 2):
            for left in range(side - 2):
                depth = torch.linspace(-0.6, 0.6, side)[:, None].repeat(1, side)
                colour = torch.stack([depth * 0.3, -depth * 0.3, depth * 0.1])
                depth[top : top + 3, left : left + 3] = -1.0
                colour[:, top : top + 3, left : left + 3] = torch.tensor([1.0, -0.5, 0.8])[:, None, None]
                scenes.append(torch.cat([colour, depth[None]]))
        self.data = torch.stack(scenes)  # [N, 4, side, side]

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep.reshape(-1)[0] / 1000).clamp_min(1e-3)
        flat, data = hidden_states.flatten(1), self.data.flatten(1)
        scores = -((flat[:, None] - (1 - t) * data[None]) ** 2).sum(-1) / (2 * t * t)
        mean = scores.softmax(-1) @ data
        return ((flat - mean) / t).view_as(hidden_states)


def test_two_modalities_of_an_exact_flow() -> None:
    """Curvature singles out moving tokens, and decisions replay; RGB and depth of a place are tokens of their own."""
    model = Scenes()
    total = 20
    run = elision.apply(
        model, "worldcache", steps=total, site="model", modalities=(3, 1), warmup_steps=3, n_max=3, threshold=1e9
    )
    assert isinstance(run, DenoiseApplied)
    x = draw(4, 4, 8, 8, seed=0)
    for n in range(total):
        t, following = 1 - n / total, 1 - (n + 1) / total
        x = x + (following - t) * model(hidden_states=x, timestep=torch.tensor([1000 * t]))
        state = run.hosts[0].groups[0].schedule
        assert isinstance(state, WorldState)
    branch = state.branches["", ""]
    assert branch.kappa is not None
    assert branch.kappa.shape == (4, 2 * 64)
    run.remove()
    assert run.report().strip().count("C") < total / 2  # type: ignore[attr-defined]
