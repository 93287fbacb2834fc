"""RegionE against the recorded official runs, closed forms, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import elision
from elision.denoise.methods.regione import PRESETS, Course, RegionE, decays, factor
from elision.denoise.report import DenoiseReport
from elision.errors import OptionError, ProfileError, UnsupportedTarget
from tests.conformance.settings import GAMMAS, STEPS
from tests.denoise.editors import Editor, Table, applied
from tests.models import Loop, draw


def test_the_course_of_the_paper() -> None:
    course = Course(28, 6, 2, (15,))
    assert [n for n in range(28) if course.is_region(n)] == [*range(6, 15), *range(16, 26)]
    assert course.jumps == {5: 15, 15: 26}
    assert Course(28, 3, 0, (9, 17)).jumps == {2: 9, 9: 17, 17: 28}
    assert Course(28, 6, 2, ()).jumps == {5: 26}
    for whole in (Course(28, 28, 2, (15,)), Course(28, 26, 2, (15,)), Course(8, 1, 9, ())):
        assert whole.jumps == {}
        assert not any(whole.is_region(n) for n in range(whole.total))


@pytest.mark.parametrize("delta", [0.0, 0.01, 0.04, 0.2])
def test_decays_by_a_scalar_simulation(delta: float) -> None:
    """Lengths of reused stretches obey 1 - product <= delta, and delta = 0 computes everything."""
    rng = np.random.default_rng(0)
    course = Course(20, 3, 2, (9,))
    for _ in range(20):
        gammas = rng.uniform(0.95, 1.08, 19).tolist()
        sigmas = np.sort(np.concatenate([[0.0, 1.0], rng.uniform(0, 1, 19)]))[::-1].tolist()
        found, kept, scale = decays(sigmas, gammas, course, delta), 1.0, 1.0
        for n in range(20):
            d = gammas[n - 1] * (1 - (sigmas[n - 1] - sigmas[n])) if n else 2.0
            kept *= d
            reuse = 4 <= n < 18 and n != 9 and d < 1 and 1 - kept <= delta
            assert (found[n] is not None) == reuse
            kept = kept if reuse else 1.0
            scale = scale * d if reuse else 1.0
            assert factor(found, n, "product") == pytest.approx(scale)
            assert factor(found, n, "last") == pytest.approx(d if reuse else 1.0)
            assert 1 - scale <= delta + 1e-12
        assert delta or found == [None] * 20


def course_editor(velocity: Callable[[float, Tensor, Tensor], Tensor], steps: int = 12) -> tuple[Editor, Table]:
    model = Table(velocity, 6)
    sigmas = torch.linspace(1, 0, steps + 1)
    x, ref = draw(1, 36, 4, seed=1), draw(1, 36, 4, seed=2)
    ref[:, :18] = x[:, :18] - 1  # with a velocity of 1 the upper half becomes the picture
    return Editor(model, x, ref, (6, 6), sigmas), model


def test_a_jump_is_exact_where_velocity_is_constant() -> None:
    editor, model = course_editor(lambda time, where, x: torch.ones_like(x))
    plain = editor()[-1]
    model.calls.clear()
    with applied(editor, delta=0, eta=0.9, warmup_steps=3, post_steps=1, forced=(7,), keep_kv=False) as run:
        out = editor()[-1]
    edited = run.report().last.extra["regione"]["edited"][0]  # type: ignore[union-attr]
    assert 0 < edited < 36
    assert torch.allclose(out, plain, atol=1e-6)
    assert [tokens for _, tokens in model.calls] == [36] * 3 + [edited] * 3 + [36] + [edited] * 4 + [36]


def test_gamma_one_is_reuse_of_the_residual() -> None:
    """The supplement: x plus the kept v - x, over any stretch."""

    def velocity(time: float, where: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x * (1 + time)) + 0.3 * where[None, :, None] / 36

    editor, model = course_editor(velocity)
    options: dict[str, Any] = {"gammas": (1.0,) * 11, "delta": 0.2, "eta": 2, "warmup_steps": 2, "post_steps": 1}
    with applied(editor, forced=(6,), keep_kv=False, **options) as run:
        out = editor()[-1]
    strip = run.report().strip()
    assert strip.count("p") >= 4
    x, sigmas, residual = editor.x, editor.sigmas, torch.empty(0)
    for n, letter in enumerate(strip):
        if letter != "p":
            v = velocity(float(sigmas[n]), torch.arange(36), x)
            residual = v - x
        x = x + (sigmas[n + 1] - sigmas[n]) * (x + residual)
    assert torch.allclose(out, x[0], atol=1e-5)
    assert len(model.calls) == sum(letter != "p" for letter in strip)


quiet = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")


@quiet
@pytest.mark.parametrize("kind", ["kontext", "qwen"])
@pytest.mark.parametrize("mode", ["distilled", "sequential", "batched"])
def test_nothing_elided_is_bit_identical(kind: str, mode: str) -> None:
    loop = Loop(kind)
    plain = loop(steps=STEPS, mode=mode)
    for warmup, post in ((STEPS, 2), (STEPS - 2, 2), (1, STEPS - 1)):
        with applied(loop, preset="kontext", warmup_steps=warmup, post_steps=post) as run:
            out = loop(steps=STEPS, mode=mode, name=run.step)
        assert torch.equal(out, plain)
        assert run.report().strip() == "C" * STEPS


@pytest.mark.parametrize("mode", ["distilled", "sequential", "batched"])
def test_delta_zero_calls_the_network_at_every_step(mode: str) -> None:
    loop = Loop("kontext")
    with applied(loop, delta=0, eta=0.7, warmup_steps=2, forced=()) as run:
        loop(steps=STEPS, mode=mode, name=run.step)
    report = run.report()
    assert report.calls_elided == 0
    assert report.strip() == "CCmmmmCC"
    assert report.reasons()["regione"]["edited tokens"] == 4


def test_a_region_of_everything_differs_by_the_stale_picture_only() -> None:
    """The picture's keys and values keep the modulation of the last full step; nothing else is approximate."""
    loop = Loop("kontext")
    plain = loop(steps=STEPS)
    options: dict[str, Any] = {"delta": 0, "eta": 2, "warmup_steps": 2, "post_steps": 1}
    with applied(loop, forced=(), **options) as run:
        out = loop(steps=STEPS)
    assert run.report().last.extra["regione"]["edited"] == [16]  # type: ignore[union-attr]
    with applied(loop, forced=(), keep_kv=False, **options):
        without = loop(steps=STEPS)
    assert 0 < (out - plain).norm() < 0.5 * (without - plain).norm()
    with applied(loop, delta=0, eta=2, warmup_steps=2, post_steps=5, forced=()):  # one region step, straight after
        short = loop(steps=STEPS)
    assert (short - plain).norm() < (out - plain).norm()


def test_a_region_of_nothing_never_calls_the_network_between_full_steps() -> None:
    loop = Loop("kontext")
    ran: list[int] = []
    loop.model.x_embedder.register_forward_hook(lambda *_: ran.append(1))  # type: ignore[union-attr, operator]
    with applied(loop, delta=0, eta=-2, warmup_steps=2, post_steps=1, forced=(5,)) as run:
        out = loop(steps=STEPS, mode="sequential", name=run.step)
    assert torch.isfinite(out).all()
    assert len(ran) == 2 * 4
    assert run.report().strip() == "CCppCppC"
    assert run.report().reasons()["regione"]["nothing is edited"] == 4


class Pictures(Loop):
    """A loop that edits the given pictures [B, L, 4] from the given noise [B, L, 4]."""

    def __init__(self, kind: str, model: nn.Module, pictures: Tensor, noise: Tensor) -> None:
        super().__init__(kind, model=model)
        self.pictures, self.noise = pictures, noise

    def call(self, x: Tensor, t: Tensor, inputs: Any, **more: Any) -> Tensor:
        whole = torch.cat([x, self.pictures.repeat(len(x) // len(self.pictures), 1, 1)], dim=1)
        out: Tensor = self.model(whole, timestep=(t / 1000).expand(len(x)), return_dict=False, **inputs, **more)[0]
        return out[:, : x.shape[1]]

    @torch.no_grad()
    def edit(self, mode: str, name: Any) -> Tensor:
        x = self.noise
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            v = self.predict(x, t, mode, name, ("cond", "uncond"), 6)
            x = self.scheduler.step(v, t, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize("kind", ["kontext", "qwen"])
@pytest.mark.parametrize("mode", ["distilled", "sequential", "batched"])
def test_images_of_a_batch_are_as_if_alone(kind: str, mode: str) -> None:
    """With regions of unequal size, none at all among them."""
    model = Loop(kind).model
    noise = 6 * draw(4, 36, 4, seed=1)  # so large that the first estimates are about the noise
    pictures = noise.clone()
    for image, side in enumerate((3, 4, 5, 0)):  # what is edited: a corner where the picture is the opposite
        pictures[image].unflatten(0, (6, 6))[:side, :side] *= -1
    options: dict[str, Any] = {"gammas": GAMMAS, "delta": 0.25, "eta": 0.5, "warmup_steps": 2, "forced": (5,)}

    def run(rows: slice) -> tuple[Tensor, list[int]]:
        loop = Pictures(kind, model, pictures[rows], noise[rows])
        with applied(loop, **options) as session:
            out = loop.edit(mode, session.step)
        report = session.report()
        assert report.last is not None
        return out, report.last.extra["regione"]["edited"]

    together, sizes = run(slice(0, 4))
    assert len(set(sizes)) == 4, sizes
    for row in range(4):
        single, size = run(slice(row, row + 1))
        assert size == sizes[row : row + 1]
        assert torch.allclose(together[row], single[0], atol=1e-4)


def test_equal_regions_go_through_the_network_together() -> None:
    loop = Loop("kontext")
    rows: list[int] = []
    loop.model.x_embedder.register_forward_hook(lambda m, a, o: rows.append(len(o)))  # type: ignore[union-attr, operator]
    with applied(loop, delta=0, eta=2, warmup_steps=1, forced=()):
        loop(steps=4, batch=3)
    assert rows == [3, 3, 3, 3]


def test_the_report_shows_the_region() -> None:
    loop = Loop("kontext")
    with applied(loop, delta=0, eta=0.3, warmup_steps=2, post_steps=1, forced=()) as run:
        loop(steps=STEPS, batch=2)
        loop(seed=3, steps=STEPS)
    report = run.report()
    shown = [one.extra["regione"] for one in report.runs]
    assert [len(one["mask"]) for one in shown] == [2, 1]
    for one in shown:
        assert one["grid"] == [4, 4]
        assert one["edited"] == [sum(map(sum, mask)) for mask in one["mask"]]
        assert all(len(mask) == 4 and all(len(row) == 4 for row in mask) for mask in one["mask"])
    assert report.to_dict()["runs"][0]["extra"]["regione"] == shown[0]


def test_kept_keys_count_as_bytes_and_are_freed() -> None:
    """4 attentions, keys and values of 3 + 32 tokens, width 16, float32; then the velocity and the mask."""
    loop = Loop("kontext")
    held: list[int] = []
    with applied(loop, delta=0, eta=2, warmup_steps=2, post_steps=2, forced=()) as run:
        loop(steps=STEPS, each=lambda n: held.append(run.report().bytes_held))
        assert run.report().bytes_held == 0
    kv, velocity, mask = 4 * 2 * 35 * 16 * 4, 16 * 4 * 4, 16
    assert held[3] == kv + velocity + mask
    assert held[-1] == velocity + mask
    assert run.report().bytes_peak == kv + velocity + mask


def run_on(loop: Loop, **options: Any) -> DenoiseReport:
    with applied(loop, **{"delta": 0, **options}) as run:
        loop(steps=STEPS)
    return run.report()


def test_pictures_are_needed() -> None:
    with pytest.raises(UnsupportedTarget, match=r"called with 0 .*editing pipeline"):
        run_on(Loop("flux"))


def test_a_picture_of_another_size_is_refused() -> None:
    loop = Loop("kontext")
    loop.picture = lambda tokens: draw(1, 9, 4, seed=0)  # type: ignore[method-assign]
    side = torch.arange(4).float()
    other = torch.cartesian_prod(torch.ones(1), side[:3], side[:3])
    ids = torch.cat([torch.cartesian_prod(torch.zeros(1), side, side), other])
    real = loop.call
    loop.call = lambda x, t, inputs, **more: real(x, t, {**inputs, "img_ids": ids}, **more)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedTarget, match="4 x 4 tokens, with the picture that is edited, and that has 3 x 3"):
        run_on(loop)


def test_one_of_several_pictures() -> None:
    """The second reference of a call is compared with."""
    loop = Loop("qwen")
    pictures = draw(1, 72, 4, seed=1)
    loop.picture = lambda tokens: pictures  # type: ignore[method-assign]
    real = loop.call

    def call(x: Tensor, t: Tensor, inputs: Any, **more: Any) -> Tensor:
        return real(x, t, {**inputs, "img_shapes": [[(1, 6, 6)] * 3] * len(x)}, **more)

    loop.call = call  # type: ignore[method-assign]
    masks = []
    for which in (1, 2):
        with applied(loop, delta=0, eta=0.6, warmup_steps=2, forced=(), reference=which) as run:
            loop(steps=STEPS, size=6)
        masks.append(run.report().last.extra["regione"]["mask"])  # type: ignore[union-attr]
    assert masks[0] != masks[1]
    with pytest.raises(UnsupportedTarget, match="called with 2"), applied(loop, delta=0, reference=3):
        loop(steps=STEPS, size=6)


def test_what_is_left_to_say_is_asked_for() -> None:
    loop = Loop("kontext")
    with pytest.raises(ProfileError, match="regione needs a profile"):
        elision.apply(loop, "regione")
    with pytest.raises(OptionError, match="gammas are for runs of 28 steps, this one has 8"):
        run_on(loop, preset="kontext", delta=None, warmup_steps=2, forced=())
    with pytest.raises(OptionError, match=r"forced=\(16,\).*between 4 and 5"):
        run_on(loop, warmup_steps=2)
    with pytest.raises(UnsupportedTarget, match="bare denoiser"):
        elision.apply(loop.model, "regione", delta=0, steps=8)
    with pytest.raises(
        UnsupportedTarget, match="SD3Transformer2DModel cannot be: it cuts its latent into tokens itself; known: Flux"
    ):
        applied(Loop("sd3"), delta=0)


def test_it_runs_uncompiled() -> None:
    loop = Loop("kontext")
    run = applied(loop, delta=0, warmup_steps=2, forced=())
    with pytest.raises(UnsupportedTarget, match="run it uncompiled"):
        run.compile(backend="eager")
    run.remove()
    loop.model.transformer_blocks[0].compile(backend="eager")  # type: ignore[index, union-attr, operator]
    with pytest.raises(UnsupportedTarget, match=r"transformer_blocks\.0 is compiled"):
        applied(loop, delta=0)


def test_a_run_that_begins_inside_is_computed_and_says_so() -> None:
    loop = Loop("kontext")
    with applied(loop, delta=0, eta=0.5, warmup_steps=2, forced=()) as run:
        loop(steps=STEPS, each=lambda n: run.reset() if n == 4 else None)
    assert run.report().strip() == "CCCC"
    assert any("the region was not found" in note for note in run.report().notes)


def test_the_image_sees_what_guidance_made_of_parked_tokens() -> None:
    """Qwen's rescaled guidance divides 0 by 0 where tokens were not live; nothing of it reaches the latent."""
    loop = Loop("qwen")
    seen: list[bool] = []

    def rescaled(x: Tensor, t: Tensor, mode: str, name: Any, order: Any, size: int) -> Tensor:
        v = {}
        for branch, seed in (("cond", 10), ("uncond", 20)):
            with loop.name(branch):
                v[branch] = loop.call(x, t, loop.kind.inputs(len(x), size, seed))
        both = v["uncond"] + 3 * (v["cond"] - v["uncond"])
        out = both * (v["cond"].norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))
        seen.append(bool(out.isnan().any()))
        return out

    loop.predict = rescaled  # type: ignore[method-assign]
    with applied(loop, gammas=GAMMAS, delta=0.25, eta=0.7, warmup_steps=2, forced=(5,)) as run:
        out = loop(steps=STEPS, size=6)
    assert any(seen)
    assert torch.isfinite(out).all()
    assert "not finite" not in str(run.report())
    assert set(run.report().strip()) == {"C", "m", "p"}


def test_a_velocity_that_is_not_finite_is_not_reused() -> None:
    """The step after the broken one is computed, with the edited tokens only, and named."""
    loop, at = Loop("kontext"), 4
    step = loop.scheduler.step
    loop.scheduler.step = lambda v, *args, **kwargs: step(torch.nan_to_num(v), *args, **kwargs)
    spoil = lambda m, a, out: out.fill_(torch.nan) if loop.called == at + 1 else None  # noqa: E731
    loop.model.proj_out.register_forward_hook(spoil)  # type: ignore[union-attr, operator]
    with applied(loop, gammas=GAMMAS, delta=0.15, eta=2, warmup_steps=2, post_steps=1, forced=()) as run:
        out = loop(steps=STEPS)
    report = run.report()
    assert torch.isfinite(out).all()
    assert any(f"step {at + 1}: what was kept is not finite" in note for note in report.notes)
    assert report.strip() == "CCmpmmmC"
    found = [None, None, 0.9, 0.8, 0.7]
    assert [factor(found, 4, "product", n) for n in (-1, 1, 2, 3)] == pytest.approx([0.504, 0.504, 0.56, 0.7])
    assert [factor(found, 4, "last", n) for n in (-1, 3)] == [0.7, 0.7]


def test_options_are_data() -> None:
    method = RegionE(preset="qwen", eta=0.7)
    assert not method.wants_profile
    assert RegionE().wants_profile
    assert not RegionE(delta=0).wants_profile
    assert {name: (p.eta, p.delta) for name, p in PRESETS.items()} == {
        "kontext": (0.93, 0.04),
        "step1x-v1p1": (0.88, 0.02),
        "step1x-v1p2": (0.88, 0.02),
        "qwen": (0.80, 0.03),
        "qwen-2509": (0.80, 0.03),
    }
