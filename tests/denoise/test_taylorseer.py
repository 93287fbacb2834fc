"""TaylorSeer against the recorded official and diffusers runs, its closed forms, and diffusers' own hook."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, TaylorSeerCacheConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import elision
from elision.denoise.adapters import ADAPTERS
from elision.denoise.adapters._base import Adapter, BlockSpec, BranchSpec
from elision.denoise.methods.taylorseer import TaylorSeer
from elision.denoise.policy import Schedule
from elision.denoise.predictors import Taylor
from elision.denoise.sites import Call, Site
from elision.denoise.steps import Step
from elision.errors import OptionError
from elision.zoo.garments_flux import condition
from tests.golden import Case, cases

GOLDEN = cases("taylorseer")
CORE = ["flux_default", "flux_order2_interval3", "dit_default", "hidream_default", "reuse_order0", "short_run_all_full"]
SITE = Site("x", "branch", "x")
CALL = Call(torch.zeros(1), (), (), {}, nn.Identity())
idle = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


def official(case: Case) -> TaylorSeer:
    o = case.options
    return TaylorSeer(interval=o["interval"], max_order=o["max_order"], first_enhance=o["first_enhance"])


def full_steps(schedule: Schedule, total: int) -> list[int]:
    return [n for n in range(total) if not schedule.decide(Step(n, n, total, 0.0), SITE, CALL).stand_in]


@pytest.mark.parametrize("name", CORE)
def test_golden_core(name: str) -> None:
    """Schedule, factors and forecasts of the released code, site by site."""
    case = GOLDEN[name]
    method, features = official(case), case["features"]
    full = full_steps(method._schedule(), len(features))
    assert full == case.expected["full_steps"]
    for s in range(features.shape[1]):
        predictor = method._predictor()
        assert isinstance(predictor, Taylor)
        for n in range(len(features)):
            if n in full:
                predictor.update(n, features[n, s])
                factors, row = case["factors"][full.index(n), s], predictor.factors
                torch.testing.assert_close(torch.stack(row), factors[: len(row)], **case.tolerance)
                assert not factors[len(row) :].any()
                value = features[n, s]
            else:
                value = predictor.forecast(n)
            torch.testing.assert_close(value, case["outputs"][n, s], **case.tolerance)
            assert len(predictor.factors) - 1 == case.expected["available_order_after_step"][n]


def test_golden_schedules() -> None:
    rows = GOLDEN["schedules"].expected
    for row in rows["official"]:
        method = TaylorSeer(interval=row["interval"], max_order=row["max_order"], first_enhance=row["first_enhance"])
        full, predictor, orders = full_steps(method._schedule(), row["num_steps"]), method._predictor(), []
        assert full == row["full_steps"]
        assert isinstance(predictor, Taylor)
        for n in full:
            predictor.update(n, torch.zeros(1))
            orders.append(len(predictor.factors) - 1)
        assert orders == row["order_at_full_step"]
    for row in rows["diffusers"]:
        method = TaylorSeer(
            interval=row["cache_interval"],
            first_enhance=row["disable_cache_before_step"],
            compute_after=row["disable_cache_after_step"],
            schedule="diffusers",
        )
        if isinstance(row["full_steps"], list):
            assert full_steps(method._schedule(), row["num_steps"]) == row["full_steps"]


@pytest.mark.parametrize("name", [n for n in GOLDEN if n.startswith("diffusers_")])
def test_golden_diffusers(name: str) -> None:
    """`schedule="diffusers"` on recorded modules, through `apply`: tuples, contexts, bf16 factors."""
    case = GOLDEN[name]
    o = case.options
    contexts = o["contexts"] or [""]
    sites = len(o["tuple_elements"])

    class Recorded(nn.Module):
        def __init__(self, site: int) -> None:
            super().__init__()
            self.site = site

        def forward(self, x: Tensor) -> Any:
            suffix = f"_{model.context}" if model.context else ""
            keys = [f"site{self.site}{suffix}"]
            if o["tuple_elements"][self.site] > 1:
                keys = [f"{keys[0]}_element{e}" for e in range(o["tuple_elements"][self.site])]
            values = tuple(case[f"features_{key}"][model.n] for key in keys)
            return values[0] if len(values) == 1 else values

    class ToyDiffusers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Recorded(s)}) for s in range(sites))
            self.n, self.context, self.outputs = 0, "", {}

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            for s, block in enumerate(self.blocks):
                self.outputs[self.context, self.n, s] = block["attn"](hidden_states)
            return hidden_states

    model = ToyDiffusers()
    spec = BlockSpec(("hidden_states",), (BranchSpec("attn", "self", streams=("a", "b")),))
    ADAPTERS["ToyDiffusers"] = _Toy("ToyDiffusers", lists=("blocks",), blocks={"ModuleDict": spec}, head="blocks")
    try:
        run = elision.apply(
            model,
            "taylorseer",
            schedule="diffusers",
            interval=o["cache_interval"],
            first_enhance=o["disable_cache_before_step"],
            compute_after=o["disable_cache_after_step"],
            max_order=o["max_order"],
            factors_dtype=o["taylor_factors_dtype"],
        )
        for model.n in range(o["num_steps"]):
            for model.context in contexts:
                with run.step(model.context):
                    model(torch.zeros(1, 2, 3), torch.tensor(1.0 - model.n / 100))
        assert [n for n, s in enumerate(run.report().last.states()) if s == "computed"] == case.expected["full_steps"]
        run.remove()
    finally:
        del ADAPTERS["ToyDiffusers"]
    for (context, n, s), out in model.outputs.items():
        suffix = f"_{context}" if context else ""
        many = isinstance(out, tuple)
        for e, value in enumerate(out if many else (out,)):
            key = f"outputs_site{s}{suffix}" + (f"_element{e}" if many else "")
            torch.testing.assert_close(value, case[key][n], **case.tolerance)


class _Toy(Adapter):
    """Finds branches in a ModuleDict."""

    def _branches(self, model: nn.Module, path: str) -> list[Site]:
        return [
            Site(f"{path}.{b.tail}", "branch", f"{path}.{b.tail}", streams=b.streams, kind=b.kind)
            for b in self.spec(model, path).branches
        ]


class _Play(nn.Module):
    """A sub-block that returns a recorded tensor."""

    def __init__(self, pick: Any) -> None:
        super().__init__()
        self.pick = pick
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.pick()  # type: ignore[no-any-return]


class ToyBlock(nn.Module):
    """x = x + gate * branch, for every branch; gates are fresh at every step."""

    def __init__(self, owner: Any, layer: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.owner, self.layer, self.names = [owner], layer, names
        for b, name in enumerate(names):
            self.add_module(name, _Play(lambda b=b: owner.branch(layer, b)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for b, name in enumerate(self.names):
            gate = self.owner[0].gate(self.layer, b)
            out = self.get_submodule(name)(hidden_states)
            hidden_states = hidden_states + (out if gate is None else gate[:, None] * out)
        return hidden_states


class ToyDiT(nn.Module):
    def __init__(self, case: Case, names: tuple[str, ...]) -> None:
        super().__init__()
        self.case, self.n, self.b = case, 0, 0
        self.blocks = nn.ModuleList(ToyBlock(self, i, names) for i in range(case.options["layers"]))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states

    def branch(self, layer: int, b: int) -> Tensor:
        if "attn" in self.case.tensors:
            return self.case["attn" if b == 0 else "mlp"][self.n, layer]
        return self.case["branch_outputs"][self.n, self.b, layer, b]

    def gate(self, layer: int, b: int) -> Tensor | None:
        if "attn" in self.case.tensors:
            return self.case["gates"][self.n, layer, b]
        return {0: self.case["gates"][self.n, self.b, 0], 2: self.case["gates"][self.n, self.b, 1]}.get(b)


@pytest.mark.parametrize(
    ("name", "names"), [("dit_blocks_fresh_gates", ("attn", "mlp")), ("wan_two_branches", ("attn1", "attn2", "ffn"))]
)
def test_golden_blocks(name: str, names: tuple[str, ...]) -> None:
    """Whole blocks through `apply`: forecasts before fresh gates, factors per branch, modules really skipped."""
    case = GOLDEN[name]
    branches = case.options.get("branches", [""])
    model = ToyDiT(case, names)
    spec = BlockSpec(("hidden_states",), tuple(BranchSpec(n, "self") for n in names))
    ADAPTERS["ToyDiT"] = Adapter("ToyDiT", lists=("blocks",), blocks={"ToyBlock": spec}, head="blocks")
    x_in = case["x_in"] if len(branches) > 1 else case["x_in"][:, None]
    x_out = case["x_out"] if len(branches) > 1 else case["x_out"][:, None]
    try:
        with elision.apply(model, official(case)) as run:
            for model.n in range(case.options["num_steps"]):
                for model.b, branch in enumerate(branches):
                    with run.step(branch):
                        out = model(x_in[model.n, model.b], torch.tensor(1.0 - model.n / 100))
                    torch.testing.assert_close(out, x_out[model.n, model.b], **case.tolerance)
            states = run.report().last.states()
    finally:
        del ADAPTERS["ToyDiT"]
    assert [n for n, s in enumerate(states) if s == "computed"] == case.expected["full_steps"]
    calls = [block.get_submodule(n).calls for block in model.blocks for n in names]
    assert set(calls) == {len(case.expected["full_steps"]) * len(branches)}


# -- closed forms --------------------------------------------------------------------------------------------------


def forecasts(f: Any, full: list[int], ask: int, **options: Any) -> float:
    taylor = Taylor(**options)
    for n in full:
        taylor.update(n, torch.tensor([f(n)], dtype=torch.float64))
    return float(taylor.forecast(ask))


@given(n=st.integers(1, 9), x=st.integers(1, 20), a=st.floats(-3, 3), b=st.floats(-3, 3), m=st.integers(1, 4))
def test_linear_is_exact(n: int, x: int, a: float, b: float, m: int) -> None:
    f = lambda s: a + b * s  # noqa: E731
    assert forecasts(f, [0, n], n + x, order=m) == pytest.approx(f(n + x), abs=1e-9)


@given(n=st.integers(1, 6), x=st.integers(1, 12), c=st.floats(-2, 2))
def test_quadratic_error(n: int, x: int, c: float) -> None:
    """F'' = 2c: the error is -c x (N + x) for m = 1 and -c N x for m >= 2; the Newton basis is exact."""
    f = lambda s: c * s * s - s + 1  # noqa: E731
    full = [0, n, 2 * n]
    true = f(2 * n + x)
    assert forecasts(f, full, 2 * n + x, order=1) - true == pytest.approx(-c * x * (n + x), abs=1e-9)
    for m in (2, 3):
        assert forecasts(f, full, 2 * n + x, order=m) - true == pytest.approx(-c * n * x, abs=1e-9)
    assert forecasts(f, full, 2 * n + x, order=2, basis="newton") == pytest.approx(true, abs=1e-9)


@settings(deadline=None)
@given(
    gaps=st.lists(st.integers(1, 5), min_size=3, max_size=6),
    coefficients=st.lists(st.floats(-1, 1), min_size=1, max_size=4),
    x=st.integers(1, 6),
)
def test_newton_is_exact_on_any_grid(gaps: list[int], coefficients: list[float], x: int) -> None:
    order = min(len(coefficients) - 1, len(gaps) - 1)
    f = lambda s: sum(c * s**i for i, c in enumerate(coefficients[: order + 1]))  # noqa: E731
    full = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    value = forecasts(f, full, full[-1] + x, order=order, basis="newton")
    assert value == pytest.approx(f(full[-1] + x), rel=1e-9, abs=1e-9)


def test_the_update_does_not_depend_on_forecasts_in_between() -> None:
    a, b = Taylor(2), Taylor(2)
    for n, value in ((0, 1.0), (3, 4.0), (7, 2.0)):
        for ask in range(n + 1, n + 3):
            if a.factors:
                a.forecast(ask)
        a.update(n, torch.tensor([value]))
        b.update(n, torch.tensor([value]))
    assert all(torch.equal(x, y) for x, y in zip(a.factors, b.factors, strict=True))
    assert math.isclose(float(a.forecast(9)), float(b.forecast(9)))


def test_a_new_shape_restarts_the_expansion() -> None:
    taylor = Taylor(1)
    taylor.update(0, torch.ones(2, 3))
    taylor.update(1, torch.ones(2, 5))
    assert [tuple(f.shape) for f in taylor.factors] == [(2, 5)]


# -- real models ---------------------------------------------------------------------------------------------------


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.1)
    return model


@torch.no_grad()
def sample(model: nn.Module, steps: int, names: tuple[str, ...] = ("cond", "uncond")) -> Tensor:
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(3))
    for n in range(steps):
        sigma = 1 - n / steps
        vs = []
        for b, name in enumerate(names):
            with model.cache_context(name):  # type: ignore[operator]
                args = condition(torch.tensor([1, 2]) if b == 0 else torch.tensor([10, 10]))
                vs.append(model(x, timestep=torch.full((2,), sigma), return_dict=False, **args)[0])
        v = vs[-1] + 2.0 * (vs[0] - vs[-1])
        x = x - v / steps
    return x


OURS = {
    "branch": {
        "cache_identifiers": [
            r"^transformer_blocks\.\d+\.(attn|ff|ff_context)$",
            r"^single_transformer_blocks\.\d+\.proj_out$",
        ],
        "skip_predict_identifiers": [r"^single_transformer_blocks\.\d+\.(attn|proj_mlp)$"],
    },
    "head": {"use_lite_mode": True},
}


@pytest.mark.parametrize("site", ["branch", "head"])
@pytest.mark.parametrize(("interval", "before", "order"), [(5, 3, 1), (3, 2, 2), (4, 1, 0)])
def test_parity_with_diffusers(site: str, interval: int, before: int, order: int) -> None:
    """Same sites, same schedule, float32 factors: the same sample as `TaylorSeerCacheConfig`."""
    model = flux()
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=before,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        **OURS[site],
    )
    model.enable_cache(config)
    theirs = sample(model, 16)
    model.disable_cache()
    with elision.apply(
        model,
        "taylorseer",
        schedule="diffusers",
        site=site,
        interval=interval,
        first_enhance=before,
        max_order=order,
        factors_dtype="float32",
    ) as run:
        ours = sample(model, 16)
    assert run.report().outputs_stood_in > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("site", ["branch", "stack", "head"])
@idle
def test_interval_one_and_long_warmup_are_bit_identical(site: str) -> None:
    model = flux()
    expected = sample(model, 6)
    for options in ({"interval": 1}, {"first_enhance": 6, "interval": 4}):
        with elision.apply(model, "taylorseer", steps=6, site=site, max_order=2, **options):
            assert torch.equal(sample(model, 6), expected)


def test_order_zero_is_uniform_reuse() -> None:
    model = flux()
    with elision.apply(model, "taylorseer", interval=3, first_enhance=2, max_order=0):
        a = sample(model, 12)
    with elision.apply(model, "uniform", interval=3, warmup_steps=2):
        b = sample(model, 12)
    assert torch.equal(a, b)


def test_a_predicted_step_runs_gates_and_head_but_no_branch() -> None:
    model = flux()
    counts: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda *_: counts.__setitem__(name, counts.get(name, 0) + 1)

    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(count(name))
    with elision.apply(model, "taylorseer", interval=4, first_enhance=1):
        sample(model, 9, ("cond",))
    full, steps = 3, 9
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff", "single_transformer_blocks.0.proj_mlp"):
        assert counts[name] == full
    for name in ("transformer_blocks.0.norm1", "single_transformer_blocks.1.norm", "proj_out", "x_embedder"):
        assert counts[name] == steps


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match=r"interval=0.*at least 1"):
        TaylorSeer(interval=0)
    with pytest.raises(OptionError, match="first_enhance=0"):
        TaylorSeer(first_enhance=0)
    with pytest.raises(OptionError, match="compute_after belongs to schedule='diffusers'"):
        TaylorSeer(compute_after=4)
    with pytest.raises(OptionError, match=r"interval=2\.5 is not a whole number"):
        TaylorSeer(interval=2.5)  # type: ignore[arg-type]
