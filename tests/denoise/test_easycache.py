"""EasyCache against the recorded official runs, its closed forms, and an independent replay."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import elision
from elision.denoise.methods.easycache import EasyCache
from elision.denoise.report import DenoiseReport
from elision.errors import OptionError
from tests.golden import Case, cases

GOLDEN = cases("easycache")
idle = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


class Network(nn.Module):
    """A denoiser made of a function of the latent and the time."""

    def __init__(self, f: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.f = f
        self.calls = 0

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        return self.f(hidden_states, float(timestep))


class Recorded(nn.Module):
    """Returns what the official network returned at the same step and branch, if it is called."""

    def __init__(self, net: Tensor) -> None:
        super().__init__()
        self.net = net
        self.at = (0, 0)
        self.calls: list[tuple[int, int]] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        self.calls.append(self.at)
        return self.net[self.at].clone()


def play(case: Case, suffix: str = "", swapped: bool = False) -> tuple[list[int], Tensor, list[float], list[float]]:
    """Feed the recorded latents through `elision.apply`; skipped steps, returned values, k and E."""
    x, net = case["x" + suffix], case["net" + suffix]
    branches = case.options.get("branches", ["cond"])
    if net.ndim == x.ndim:
        net = net[:, None]
    extra = case.tensors.get("y")
    model = Recorded(net)
    options = {"threshold": case.options["threshold"], "warmup_steps": case.options["warmup_steps"]}
    steps, returned, ks, sums = len(x), torch.zeros_like(net), [], []
    with elision.apply(model, "easycache", steps=steps, **options) as run:
        schedule = lambda: run.hosts[0].groups[0].schedule  # noqa: E731
        for n in range(steps):
            latent = x[n] if extra is None else torch.cat([x[n], extra], dim=1)
            order = list(enumerate(branches))
            for b, branch in reversed(order) if swapped else order:
                model.at = (n, b)
                named = run.step(branch) if len(branches) > 1 else contextlib.nullcontext()
                with named:
                    returned[n, b] = model(latent, torch.tensor(1000.0 - n))
            k = schedule().k
            ks.append(float("nan") if k is None else float(k))
            sums.append(schedule().total)
    computed = {n for n, b in model.calls if b == 0}
    assert all((n in computed) == ((n, b) in set(model.calls)) for n in range(steps) for b in range(len(branches)))
    return [n for n in range(steps) if n not in computed], returned, ks, sums


@idle
@pytest.mark.parametrize("name", [n for n in GOLDEN if n != "second_run_state"])
@pytest.mark.parametrize("swapped", [False, True])
def test_golden(name: str, swapped: bool) -> None:
    case = GOLDEN[name]
    skipped, returned, k, e = play(case, swapped=swapped)
    assert skipped == case.expected["skipped_steps"]
    expected = case["returned"].reshape(returned.shape)
    torch.testing.assert_close(returned, expected, **case.tolerance)
    torch.testing.assert_close(torch.tensor(k), case["k"], equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(e), case["E"], rtol=1e-4, atol=1e-5)


@idle
def test_golden_second_run_is_fresh() -> None:
    """The recommended behaviour: a second video does not see the first one's statistics."""
    case = GOLDEN["second_run_state"]
    case.options.setdefault("branches", ["cond", "uncond"])
    skipped, returned, _, _ = play(case, "_fresh")
    assert skipped == case.expected["skipped_steps_fresh"]
    torch.testing.assert_close(returned, case["returned_fresh"], **case.tolerance)


def euler(model: nn.Module, x: Tensor, sigmas: list[float], seen: list[Tensor] | None = None) -> Tensor:
    for sigma, following in itertools.pairwise(sigmas):
        v = model(x, torch.tensor(sigma))
        if seen is not None:
            seen.append(v)
        x = x + (following - sigma) * v
    return x


def grid(steps: int) -> list[float]:
    return [1 - n / steps for n in range(steps)] + [0.0]


@idle
def test_constant_shift_is_exact() -> None:
    """v = x + b: D is constant, so any schedule follows the uncached path, and k is 1."""
    torch.manual_seed(0)
    b, x0 = torch.randn(1, 3, 4, 4, dtype=torch.float64), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    model = Network(lambda x, t: x + b)
    expected = euler(model, x0, grid(30))
    model.calls = 0
    with elision.apply(model, "easycache", steps=30, threshold=1e9, warmup_steps=3) as run:
        out = euler(model, x0, grid(30))
        assert float(run.hosts[0].groups[0].schedule.k) == pytest.approx(1.0, abs=1e-9)
    assert model.calls == 4
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


@idle
@pytest.mark.parametrize("c", [0.5, -1.25, 2.0])
def test_linear_network_has_its_rate(c: float) -> None:
    """v = c x: k is |c| exactly, and the skip set follows the scalar simulation."""
    x0 = torch.full((1, 1, 2, 2), 1.0, dtype=torch.float64)
    steps, warmup, tau = 40, 4, 0.11
    model = Network(lambda x, t: c * x)
    with elision.apply(model, "easycache", steps=steps, threshold=tau, warmup_steps=warmup) as run:
        euler(model, x0, grid(steps))
        assert float(run.hosts[0].groups[0].schedule.k) == pytest.approx(abs(c), abs=1e-9)
        states = run.report().last.states()
    x, x_prev, full, d, total, expected = 1.0, None, [], 0.0, 0.0, []
    for n in range(steps):
        if n < warmup or n == steps - 1:
            skip, total = False, 0.0
        else:
            k = abs(full[-1][1] - full[-2][1]) / abs(full[-1][0] - full[-2][0])
            total += k * abs(x - x_prev) / abs(full[-1][1])
            skip = total < tau
            total = total if skip else 0.0
        x_prev = x
        v = x + d if skip else c * x
        if not skip:
            d = v - x
            full.append((x, v))
        expected.append("reused" if skip else "computed")
        x = x - v / steps
    assert states == expected
    assert "reused" in expected


@idle
def test_reuse_shrinks_the_velocity() -> None:
    """On m skips in a row, Euler without guidance returns v_f times the product of (1 + ds)."""
    torch.manual_seed(1)
    x0 = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    model, seen = Network(lambda x, t: torch.sin(x) * (1 + t)), []
    steps, warmup = 20, 3
    with elision.apply(model, "easycache", steps=steps, threshold=1e9, warmup_steps=warmup):
        euler(model, x0, grid(steps), seen)
    expected = seen[warmup - 1]
    for n in range(warmup, steps - 1):
        expected = expected * (1 - 1 / steps)
        torch.testing.assert_close(seen[n], expected, rtol=0, atol=1e-9)


@idle
@pytest.mark.parametrize(("warmup", "calls"), [(0, 3), (1, 3), (2, 3), (5, 6)])
def test_huge_threshold_computes_the_warmup_and_the_last(warmup: int, calls: int) -> None:
    model = Network(lambda x, t: torch.tanh(x) + t)
    with elision.apply(model, "easycache", steps=12, threshold=1e9, warmup_steps=warmup):
        euler(model, torch.ones(1, 2, 2, 2), grid(12))
    assert model.calls == calls


@idle
@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1e9, "warmup_steps": 12}])
def test_limits_are_bit_identical(options: dict[str, float]) -> None:
    model = Network(lambda x, t: torch.tanh(x) * (0.3 + t))
    x0 = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    expected = euler(model, x0, grid(12))
    with elision.apply(model, "easycache", steps=12, **options):
        assert torch.equal(euler(model, x0, grid(12)), expected)


def replay(log: list[tuple[Tensor, Tensor | None]], tau: float, warmup: int, tail: int) -> list[bool]:
    """The spec's pseudo-code on a log of (latent, output if computed): which steps must have been skipped."""
    x_prev = xf = vf = k = None
    total, skips = 0.0, []
    for n, (x, v) in enumerate(log):
        skip = False
        if n < warmup or n >= len(log) - tail:
            total = 0.0
        elif x_prev is not None and vf is not None and k is not None:
            total += float(k * (x - x_prev).abs().mean() / vf.abs().mean())
            skip = total < tau
            total = total if skip else 0.0
        skips.append(skip)
        x_prev = x
        if v is not None:
            if vf is not None:
                k = (v - vf).abs().mean() / (x - xf).abs().mean()
            xf, vf = x, v
    return skips


@idle
@settings(max_examples=30, deadline=None)
@given(
    tau=st.floats(0.0, 0.6),
    warmup=st.integers(0, 8),
    tail=st.integers(0, 4),
    steps=st.integers(2, 30),
    batch=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
def test_skip_set_equals_the_replay(tau: float, warmup: int, tail: int, steps: int, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, 2, 4, 4, generator=generator, dtype=torch.float64)
    log: list[tuple[Tensor, Tensor | None]] = []
    ran: list[Tensor] = []

    def net(latent: Tensor, t: float) -> Tensor:
        out = torch.tanh(torch.einsum("oc,bchw->bohw", w, latent)) * (0.5 + t)
        ran.append(out)
        return out

    model = Network(net)
    with elision.apply(model, "easycache", steps=steps, threshold=tau, warmup_steps=warmup, tail_steps=tail) as run:
        for n in range(steps):
            ran.clear()
            v = model(x, torch.tensor(1 - n / steps, dtype=torch.float64))
            log.append((x.clone(), ran[0] if ran else None))
            x = x - v / steps
        report = run.report()
    assert isinstance(report, DenoiseReport)
    skipped = [state == "reused" for state in report.last.states()] if report.last else []
    assert skipped == replay(log, tau, warmup, tail)
    assert [v is None for _, v in log] == skipped


@idle
def test_comfyui_variant_skips_no_more_than_the_official_one() -> None:
    """It compares with the last computed latent, so its sum grows faster."""
    skips = {}
    for variant in ("official", "comfyui"):
        model = Network(lambda x, t: torch.tanh(x) * (0.3 + t))
        options = {"warmup_steps": 6, "tail_steps": 2} if variant == "official" else {"subsample": 1}
        with elision.apply(model, "easycache", steps=40, threshold=0.1, variant=variant, **options) as run:
            euler(model, torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8), grid(40))
            skips[variant] = run.report().steps_reused
    assert 0 < skips["comfyui"] < skips["official"]


@idle
def test_comfyui_window_and_subsample() -> None:
    """Nothing is skipped outside the window, and the statistics see every n-th pixel only."""
    model = Network(lambda x, t: torch.tanh(x) * (0.3 + t))
    seen: dict[str, list[bool]] = {}
    x0 = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
    for subsample in (1, 8):
        options = {"variant": "comfyui", "threshold": 1e9, "start": 0.25, "end": 0.75, "subsample": subsample}
        with elision.apply(model, "easycache", steps=20, **options) as run:
            euler(model, x0, grid(20))
            seen[str(subsample)] = [s == "reused" for s in run.report().last.states()]
    # nothing is remembered from before the window, so two of its steps must be computed before k is known
    assert seen["8"] == [7 <= n < 15 for n in range(20)] == seen["1"]
    dotted = Network(lambda x, t: torch.where(torch.arange(16) % 8 == 0, torch.zeros(()), x * (1 + 9 * t)))
    with elision.apply(dotted, "easycache", steps=20, variant="comfyui", threshold=0.01, subsample=1) as run:
        euler(dotted, x0 + 3, grid(20))
        assert run.report().steps_reused < 5


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match=r"threshold=-0\.1.*at least 0"):
        EasyCache(threshold=-0.1)
    with pytest.raises(OptionError, match=r"variant='x'.*'official', 'comfyui'"):
        EasyCache(variant="x")  # type: ignore[arg-type]
