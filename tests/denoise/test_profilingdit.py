"""ProfilingDiT against recorded runs of the official code, closed forms, synthetic attention, and on every denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import elision
from elision.denoise.adapters import ADAPTERS
from elision.denoise.adapters._base import Adapter, BlockSpec
from elision.denoise.engine import DenoiseApplied
from elision.denoise.fit._attention import received
from elision.denoise.fit.profilingdit import (
    foreground_ratio,
)
from elision.denoise.flops import FlopBook
from elision.denoise.methods.profilingdit import PRESETS, RELEASED_LIST, ProfilingDiT, runs_of
from elision.denoise.schedules import Refresh, interval_at, shrinking
from elision.errors import OptionError, ProfileError, ProfileMismatch, UnsupportedTarget
from tests.golden import Case, cases
from tests.models import KINDS, Loop, changed, draw, snapshot

GOLDEN = cases("profilingdit")
BLOCKED = [kind for kind, about in KINDS.items() if about.blocks and not about.edits]
STEPS = 9
EARLY: dict[str, Any] = {"warmup_steps": 2, "schedule": "uniform", "interval": 3}  # refresh 2, 5, 8
idle = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


@pytest.fixture(autouse=True)
def no_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting FLOPs takes longer than a tiny run, and conformance checks them."""
    monkeypatch.setattr(FlopBook, "totals", lambda self: None)


# -- recorded runs -------------------------------------------------------------------------------------------------


class SingleToy(nn.Module):
    """h + 0.5 tanh(h W + b + e[s]), with the counts of the blocks that ran."""

    def __init__(self, w: Tensor, b: Tensor, owner: Any) -> None:
        super().__init__()
        self.w, self.b, self.owner, self.ran = w, b, [owner], 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.ran += 1
        return hidden_states + 0.5 * torch.tanh(hidden_states @ self.w + self.b + self.owner[0].now)


class DoubleToy(nn.Module):
    """Both streams from the block's inputs."""

    def __init__(self, case: Case, i: int, owner: Any) -> None:
        super().__init__()
        self.weights, self.owner, self.ran = [case[name][i] for name in "WUVZ"], [owner], 0

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        self.ran += 1
        w, u, v, z = self.weights
        img, txt, now = hidden_states, encoder_hidden_states, self.owner[0].now
        other_txt, other_img = txt.mean(1, keepdim=True), img.mean(1, keepdim=True)
        return (
            img + 0.5 * torch.tanh(img @ w + other_txt @ u + now),
            txt + 0.5 * torch.tanh(txt @ v + other_img @ z + now),
        )


class ToyStack(nn.Module):
    """Two-stream blocks, then single-stream blocks on the image stream; returns what the blocks leave."""

    def __init__(self) -> None:
        super().__init__()
        self.twin, self.single = nn.ModuleList(), nn.ModuleList()
        self.now = torch.zeros(1)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor | None = None) -> Any:
        for block in self.twin:
            hidden_states, text = block(hidden_states, encoder_hidden_states=text)
        for block in self.single:
            hidden_states = block(hidden_states)
        return hidden_states, text

    def take(self) -> int:
        """How many blocks ran since the last call."""
        blocks: list[Any] = [*self.twin, *self.single]
        ran = sum(block.ran for block in blocks)
        for block in blocks:
            block.ran = 0
        return ran

    def which(self) -> list[int]:
        """Numbers of the blocks that ran since the last `take`."""
        return [i for i, block in enumerate([*self.twin, *self.single]) if block.ran]  # type: ignore[operator]


@contextmanager
def adapter(*lists: str) -> Iterator[None]:
    """The toy's adapter, for as long as it is needed."""
    specs = {
        "SingleToy": BlockSpec(("hidden_states",), ()),
        "DoubleToy": BlockSpec(("hidden_states", "encoder_hidden_states"), ()),
    }
    ADAPTERS["ToyStack"] = Adapter("ToyStack", lists=lists, blocks=specs, head=lists[-1])
    try:
        yield
    finally:
        del ADAPTERS["ToyStack"]


def singles(case: Case) -> ToyStack:
    model = ToyStack()
    model.single.extend(SingleToy(w, b, model) for w, b in zip(case["W"], case["b"], strict=True))
    return model


def deltas(run: DenoiseApplied, branch: str) -> Tensor:
    """What is kept, run by run."""
    kept = [[p for (b, _), p in site.predictors.items() if b == branch] for site in run.hosts[0].sites]
    return torch.stack([next(iter(p.tensors())) for (p,) in kept])


def official(case: Case) -> ProfilingDiT:
    """The options of a recorded single-stream case."""
    o = case.options
    if o.get("schedule", "list") == "list":
        how: dict[str, Any] = {"refresh": tuple(o["refresh_steps"])}
    else:
        how = {"schedule": "uniform", "interval": 6}
    return ProfilingDiT(blocks=tuple(o["cached_blocks"]), warmup_steps=o["step_start"], **how)


@pytest.mark.parametrize(
    "name", ["hunyuan_single_blocks", "wan_cfg_batch2", "small_first_and_last_block", "run_starting_at_block_0"]
)
def test_golden_single_stream(name: str) -> None:
    """Outputs, executed blocks and deltas of the released single-stream cache, CFG branches among them."""
    case = GOLDEN[name]
    o, model = case.options, singles(case)
    x, y = (case[key] if case[key].ndim == 5 else case[key][None] for key in "xy")
    names = ["cond", "uncond"][: len(x)]
    with adapter("single"), elision.apply(model, official(case), steps=o["num_steps"]) as run:
        assert isinstance(run, DenoiseApplied)
        for n in range(o["num_steps"]):
            model.now = case["e"][n]
            for b, branch in enumerate(names):
                with run.step(branch):
                    out, _ = model(x[b, n], torch.tensor(1.0 - n / 100))
                torch.testing.assert_close(out, y[b, n], **case.tolerance)
                if n not in case.expected["full_steps"]:
                    assert model.which() == case.expected["executed_on_reuse_steps"]
                assert model.take() == case.expected["num_executed"][n]
        runs = [list(map(int, site.site.key.removeprefix("run.").split("-"))) for site in run.hosts[0].sites]
        assert runs == case.expected["runs"]
        if "delta" in case.tensors:
            for b, branch in enumerate(names):
                torch.testing.assert_close(deltas(run, branch), case["delta"][b], **case.tolerance)
        states = [n for n, state in enumerate(run.report().last.states()) if state == "computed"]  # type: ignore[union-attr]
    assert states == case.expected["full_steps"]


def test_golden_double_stream() -> None:
    case = GOLDEN["hunyuan_double_blocks"]
    o, model = case.options, ToyStack()
    model.twin.extend(DoubleToy(case, i, model) for i in range(o["num_blocks"]))
    first, last = o["cached_run"]
    method = ProfilingDiT(
        blocks=tuple(range(first, last + 1)),
        warmup_steps=o["step_start"],
        schedule="uniform",
        interval=o["step_interval"],
    )
    with adapter("twin"), elision.apply(model, method, steps=o["num_steps"]) as run:
        assert isinstance(run, DenoiseApplied)
        for n in range(o["num_steps"]):
            model.now = case["e"][n]
            img, txt = model(case["img"][n], torch.tensor(1.0 - n / 100), case["txt"][n])
            torch.testing.assert_close(img, case["img_out"][n], **case.tolerance)
            torch.testing.assert_close(txt, case["txt_out"][n], **case.tolerance)
            assert model.take() == case.expected["num_executed"][n]
        (site,) = run.hosts[0].sites
        for stream, key in (("hidden_states", "delta_img"), ("encoder_hidden_states", "delta_txt")):
            (kept,) = site.predictors["", stream].tensors()
            torch.testing.assert_close(kept, case[key], **case.tolerance)


def test_preset_of_hunyuan_renews_its_two_lists_apart() -> None:
    """At step 26 the single-stream deltas are renewed on top of reused two-stream blocks, at 12 the other way round."""
    double, single = GOLDEN["hunyuan_double_blocks"], GOLDEN["hunyuan_single_blocks"]
    model = ToyStack()
    model.twin.extend(DoubleToy(double, i, model) for i in range(20))
    model.single.extend(SingleToy(w[:5, :5], b[:5], model) for w, b in zip(single["W"], single["b"], strict=True))
    ran = []
    with adapter("twin", "single"), elision.apply(model, "profilingdit", preset="hunyuan-video", steps=50) as run:
        for n in range(50):
            model.now = single["e"][n, :5]
            model(draw(1, 4, 5, seed=n), torch.tensor(1.0 - n / 100), draw(1, 3, 5, seed=99 + n))
            which = model.which()
            ran.append((sum(i < 20 for i in which), sum(i >= 20 for i in which)))
            model.take()
        assert len(run.hosts[0].sites) == 1 + len(single.expected["runs"])  # type: ignore[attr-defined]
    assert [d for d, _ in ran] == [20 if n < 6 or n % 6 == 0 else 6 for n in range(50)]
    assert [s for _, s in ran] == single.expected["num_executed"]
    assert ran[26] == (6, 40)
    assert ran[12] == (20, 16)


def test_golden_intervals() -> None:
    case = GOLDEN["interval_formula"]
    for i, (start, total, longest, shortest) in enumerate(case.options["sets"]):
        values = [interval_at(s, start, total, longest, shortest) for s in range(start, total + 1)]
        torch.testing.assert_close(torch.tensor(values), case[f"interval_{i}"], **case.tolerance)
        assert shrinking(start, total, longest, shortest) == case.expected[f"generated_{i}"]
        assert values[0] == longest
        assert values[-1] == shortest


def test_golden_profiling() -> None:
    """Column means, R and the lists from the paper's formulas; the same from queries and keys, without N x N."""
    case = GOLDEN["profiling_ratio"]
    mean = case["attention"].mean(dim=(1, 2))
    torch.testing.assert_close(mean, case["abar"], **case.tolerance)
    ratio = foreground_ratio(mean, case["foreground"], case.options["threshold"])
    torch.testing.assert_close(ratio, case["ratio"], **case.tolerance)
    tau = case.options["tau_b"]
    assert list(ProfilingDiT(tau=tau).chosen(ratio[None])) == case.expected["background_blocks"]
    assert list(ProfilingDiT(tau=tau, cached="foreground").chosen(ratio[None])) == case.expected["foreground_blocks"]
    # softmax(q k) with k the identity has any row sums of products that we like: q = log P
    eye = torch.eye(18).expand(5, 2, 18, 18)
    streamed = received(case["attention"].clamp_min(1e-30).log(), eye, scale=1.0, chunk=5)
    torch.testing.assert_close(streamed, case["abar"], **case.tolerance)


# -- lists ---------------------------------------------------------------------------------------------------------


def test_published_lists() -> None:
    assert [b - a for a, b in pairwise(RELEASED_LIST)] == [12, 8, 6, 6, 4, 4, 2]
    assert len(RELEASED_LIST) == 8
    double, single = PRESETS["hunyuan-video"]
    (wan,) = PRESETS["wan2.1-14b"]
    assert (len(single.blocks), single.depth, len(wan.blocks), wan.depth) == (24, 40, 28, 40)
    foreground = [1, 3, 8, 9, 22, 24, 28, 29, 30, 32, 34, 35, 36, 37, 38, 39]
    assert sorted({*range(40)} - {*single.blocks}) == foreground
    assert (double.blocks[0], len(double.blocks)) == (6, 14)
    full = [n for n in range(50) if n < 6 or wan.refresh.due(n, 50)]
    assert len(full) == 14
    assert round(50 * 40 / (14 * 40 + 36 * 12), 2) == 2.02


@given(blocks=st.sets(st.integers(0, 30)))
def test_runs_partition_the_list(blocks: set[int]) -> None:
    runs = runs_of(tuple(blocks))
    assert [i for first, last in runs for i in range(first, last + 1)] == sorted(blocks)
    assert all(b[0] > a[1] + 1 for a, b in pairwise(runs))


@given(start=st.integers(0, 10), more=st.integers(1, 60), ends=st.tuples(st.integers(1, 15), st.integers(1, 15)))
def test_generated_steps(start: int, more: int, ends: tuple[int, int]) -> None:
    total = start + more
    steps = shrinking(start, total, *ends)
    rule = Refresh("formula", start, ends=ends)
    assert steps[0] == start
    assert steps[-1] < total
    assert [n for n in range(start, total) if rule.due(n, total)] == steps
    gaps = [b - a for a, b in pairwise(steps)]
    assert gaps == sorted(gaps, reverse=ends[0] >= ends[1])
    assert shrinking(total, total, *ends) == []


# -- on denoisers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKED)
@idle
def test_limits_are_exact(kind: str) -> None:
    loop = Loop(kind)
    plain = loop(steps=STEPS, mode="batched")
    every = tuple(range(KINDS[kind].blocks))
    for options in (
        {"blocks": ()},
        {"blocks": every, "warmup_steps": STEPS, "schedule": "uniform"},
        {"blocks": every, "warmup_steps": 1, "schedule": "uniform", "interval": 1},
        {"blocks": every, "warmup_steps": 1, "refresh": tuple(range(1, STEPS))},
        {"blocks": every, "warmup_steps": 1, "schedule": "formula", "longest": 1, "shortest": 1},
    ):
        with elision.apply(loop, "profilingdit", **options) as run:
            assert torch.equal(loop(steps=STEPS, mode="batched"), plain), options
        assert run.report().outputs_stood_in == 0  # type: ignore[attr-defined]
    with elision.apply(loop, "profilingdit", blocks=()) as run:
        assert any("no block is cached" in note for note in run.report().notes)


@pytest.mark.parametrize("kind", BLOCKED)
def test_at_a_frozen_input_what_stands_in_is_the_truth(kind: str) -> None:
    loop = Loop(kind)
    x, t = draw(*loop.kind.latent(1, 4), seed=4), torch.tensor(300.0)
    blocks = tuple(i for i in range(loop.kind.blocks) if i != 1)
    with torch.no_grad(), elision.apply(loop, "profilingdit", blocks=blocks, **EARLY) as run:
        loop.scheduler.set_timesteps(STEPS)
        outs = []
        for time in loop.scheduler.timesteps:
            outs.append(loop.call(x, t, loop.kind.inputs(1, 4, 10)))
            loop.scheduler.step(outs[-1], time, x)
    assert run.report().outputs_stood_in > 0  # type: ignore[attr-defined]
    assert all(torch.allclose(out, outs[0], rtol=1e-4, atol=1e-4) for out in outs)


def test_a_run_keeps_the_sum_of_its_blocks_deltas() -> None:
    """One tensor for a run, and the same output as one for every block of it."""
    case = GOLDEN["small_first_and_last_block"]
    together, apart = singles(case), singles(case)
    blocks = tuple(range(2, 7))
    how: dict[str, Any] = {"warmup_steps": 2, "refresh": (2, 5)}
    with adapter("single"):
        one = elision.apply(together, "profilingdit", steps=12, blocks=blocks, **how)
        assert isinstance(one, DenoiseApplied)
        inputs: dict[int, Tensor] = {}
        sums = torch.zeros(0)
        for n in range(12):
            together.now = apart.now = case["e"][n]
            x = case["x"][0, n]
            out, _ = together(x, torch.tensor(1.0 - n / 100))
            h = x  # by hand: every cached block with a delta of its own
            for i, block in enumerate(apart.single):
                if i in blocks and n not in (0, 1, 2, 5):
                    h = h + inputs[i]
                else:
                    after = block(h)
                    if i in blocks:
                        inputs[i] = after - h
                    h = after
            torch.testing.assert_close(out, h)
            if n == 5:
                sums = torch.stack([inputs[i] for i in blocks]).sum(0)
        (kept,) = deltas(one, "")
        torch.testing.assert_close(kept, sums)
        assert one.report().bytes_held == kept.numel() * 4
        one.remove()


def test_all_blocks_in_one_run_is_a_closed_form() -> None:
    """head(embed(x) + D): the blocks are not there."""
    loop = Loop("wan")
    model: Any = loop.model
    with elision.apply(loop, "profilingdit", blocks=(0, 1), **EARLY) as run:
        assert isinstance(run, DenoiseApplied)
        for n, kept in _calls(loop, run):
            x, t, out = kept
            if n not in (3, 4, 6, 7):
                continue
            (delta,) = deltas(run, "")
            with run.hosts[0].muted():
                hooks = [
                    model.blocks[0].register_forward_hook(lambda m, a, o, delta=delta: a[0] + delta),
                    model.blocks[1].register_forward_hook(lambda m, a, o: a[0]),
                ]
                want = loop.call(x, t, loop.kind.inputs(1, 4, 10))
                for hook in hooks:
                    hook.remove()
            torch.testing.assert_close(out, want)


def _calls(loop: Loop, run: DenoiseApplied) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
    """The steps of a plain loop: latent, time, prediction."""
    x = draw(*loop.kind.latent(1, 4), seed=0)
    loop.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for n, t in enumerate(loop.scheduler.timesteps):
            out = loop.call(x, t, loop.kind.inputs(1, 4, 10))
            yield n, (x, t, out)
            x = loop.scheduler.step(out, t, x, return_dict=False)[0]


def test_nothing_is_kept_before_the_first_refresh() -> None:
    loop = Loop("sd3")
    held = []
    blocks = (0, 1)
    with elision.apply(loop, "profilingdit", blocks=blocks, **EARLY) as run:
        loop(steps=STEPS, each=lambda n: held.append(run.report().bytes_held))
    assert held[:3] == [0, 0, 0]
    assert held[3] == 4 * (16 * 4 + 16 * 3)  # one delta for 4 image tokens and one for 3 text tokens, of width 16
    assert held[3:] == [held[3]] * (STEPS - 3)


@pytest.mark.parametrize("kind", BLOCKED)
def test_guidance_branches_keep_their_own(kind: str) -> None:
    loop = Loop(kind)
    how: dict[str, Any] = {"blocks": (1,), **EARLY}
    outs, held = [], []
    for mode in ("sequential", "batched"):
        with elision.apply(loop, "profilingdit", **how) as run:
            outs.append(loop(steps=STEPS, mode=mode, name=run.step))  # type: ignore[attr-defined]
        held.append(run.report().bytes_peak)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-3)
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_steps": 5}, "lacks step warmup_steps=5, the first refresh"),
        ({"refresh": (7, 9)}, "lacks step warmup_steps=6"),
        ({"refresh": (6.5,)}, "refresh="),
        ({"refresh": [6]}, "refresh="),
        ({"blocks": (-1,)}, "blocks="),
        ({"blocks": "hunyuan"}, "blocks="),
        ({"interval": 3}, "interval has no meaning for schedule='list'"),
        ({"schedule": "uniform", "refresh": (6,)}, "refresh has no meaning for schedule='uniform'"),
        ({"schedule": "uniform", "longest": 9.0}, "longest has no meaning for schedule='uniform'"),
        ({"preset": "wan2.1-14b", "blocks": (1,)}, "blocks has no meaning for preset='wan2.1-14b'"),
        ({"preset": "wan2.1-14b", "warmup_steps": 4, "refresh": (4,)}, "warmup_steps has no meaning"),
        ({"blocks": (1,), "share": 0.3}, "share has no meaning for given blocks"),
    ],
)
def test_rules_between_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        ProfilingDiT(**options)


def test_lists_belong_to_their_model() -> None:
    loop = Loop("wan")
    loop(steps=1)
    before = snapshot(loop.model)
    with pytest.raises(UnsupportedTarget, match=r"preset='wan2\.1-14b' is for lists of 40 blocks, Wan.* has 2"):
        elision.apply(loop, "profilingdit", preset="wan2.1-14b")
    with pytest.raises(UnsupportedTarget, match=r"lists of 20\+40 blocks, FluxTransformer2DModel has 2\+2"):
        elision.apply(Loop("flux"), "profilingdit", preset="hunyuan-video")
    with pytest.raises(OptionError, match="block 2 does not exist, the denoiser has 2"):
        elision.apply(loop, "profilingdit", blocks=(2,))
    with pytest.raises(ProfileError, match="needs a profile"):
        elision.apply(loop, "profilingdit")
    profile = elision.fit(loop, "profilingdit", calls=[{"steps": STEPS}], **EARLY)
    with pytest.raises(ProfileMismatch, match="config"):
        elision.apply(Loop("wan_i2v"), "profilingdit", profile=profile)
    with pytest.raises(ProfileMismatch, match="2 blocks"):
        elision.apply(Loop("dit"), "profilingdit", profile=profile, force=True)
    with pytest.raises(OptionError, match="must know the number of steps"):
        elision.apply(loop.model, "profilingdit", blocks=(1,), schedule="formula")
    assert changed(before, snapshot(loop.model)) == []


def test_a_profile_serves_other_choices(tmp_path: Any) -> None:
    loop = Loop("flux")
    path = elision.fit(loop, "profilingdit", calls=[{"steps": STEPS}], **EARLY).save(tmp_path / "p.safetensors")
    outs = []
    for options in ({"share": 0.25}, {"share": 0.75}, {"share": 0.25, "cached": "foreground"}, {"tau": 0.5}):
        with elision.apply(loop, "profilingdit", profile=path, **EARLY, **options) as run:
            outs.append(loop(steps=STEPS))
        assert run.report().strip() == "CCCrrCrrC"  # type: ignore[attr-defined]
    assert all(not torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])
