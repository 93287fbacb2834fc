"""Control: step sizes, network time and live tokens, through an unmodified sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import elision
from elision.denoise.control import Control, _check_time, euler
from elision.denoise.engine import DenoiseApplied
from elision.denoise.methods.uniform import Uniform
from elision.denoise.policy import Claims, DenoiseMethod, Group, Host, Plan, Schedule
from elision.denoise.predictors import Reuse
from elision.denoise.schedules import Interval
from elision.denoise.steps import Step
from elision.errors import Conflict, OptionError, UnsupportedTarget
from elision.profile import Profile
from tests.models import KINDS, Loop, changed, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
ALL = frozenset({"dt", "time", "tokens"})


class Told(Control):
    """Answers by functions, and remembers what it was asked."""

    def __init__(self, schedules: Sequence[Schedule], answers: dict[str, Callable[..., Any]]) -> None:
        self.schedules = schedules
        self.answers = answers
        self.asked: list[tuple[str, int, bool | None]] = []

    def _ask(self, what: str, step: Step, stood_in: bool | None = None, *more: Any) -> Any:
        self.asked.append((what, step.n, stood_in))
        return self.answers[what](step, *more) if what in self.answers else None

    def dt(self, step: Step, sigmas: Sequence[float], stood_in: bool) -> float | Tensor | None:
        return self._ask("dt", step, stood_in, sigmas)  # type: ignore[no-any-return]

    def time(self, step: Step) -> float | None:
        return self._ask("time", step)  # type: ignore[no-any-return]

    def tokens(self, step: Step) -> Tensor | None:
        return self._ask("tokens", step)  # type: ignore[no-any-return]

    def tensors(self) -> Iterable[Tensor]:
        return (torch.zeros(25),)

    def notes(self) -> Iterable[str]:
        return (f"asked {len(self.asked)} times",)


@dataclass(frozen=True)
class Steer(DenoiseMethod):
    name: ClassVar[str] = "steer"
    description: ClassVar[str] = "test"
    answers: dict[str, Callable[..., Any]] = field(default_factory=dict, hash=False)
    interval: int = 1
    holds: frozenset[str] = ALL
    made: list[Told] = field(default_factory=list, hash=False)

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        sites = host.site("model", self.name)
        group = Group(self.name, sites, lambda: Interval(self.interval), Reuse)
        return Plan([group], Claims(frozenset(sites), self.holds), control=self._control)

    def _control(self, schedules: Sequence[Schedule]) -> Control:
        self.made.append(Told(schedules, self.answers))
        return self.made[-1]


@dataclass(frozen=True)
class Other(Steer):
    name: ClassVar[str] = "other"

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        return Plan([], Claims(frozenset(), self.holds), control=self._control)


def steer(holds: frozenset[str] = frozenset({"dt"}), interval: int = 1, **answers: Callable[..., Any]) -> Steer:
    return Steer(answers, interval, holds)


def apply(target: Any, method: Any) -> DenoiseApplied:
    run = elision.apply(target, method)
    assert isinstance(run, DenoiseApplied)
    return run


def nominal(step: Step, sigmas: Sequence[float]) -> float:
    return sigmas[step.i + 1] - sigmas[step.i]


KEPT = ("flux", "sd3", "dit", "pixart", "wan", "wan_i2v", "unet")


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("answer", [None, nominal], ids=["None", "nominal"])
def test_nominal_steps_are_bit_identical(kind: str, answer: Any) -> None:
    loop = Loop(kind, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    plain = loop(steps=6, mode="sequential")
    holds = frozenset({"dt", "time"})
    method = steer(holds, dt=answer, time=lambda step: step.sigma) if answer else steer(holds)
    with apply(loop, method) as run:
        out = loop(steps=6, mode="sequential", name=run.step)
    assert torch.equal(out, plain)
    asked = [(what, n) for what, n, _ in method.made[0].asked]
    assert asked == [pair for n in range(6) for pair in [("time", n), ("time", n), ("dt", n)]]


def test_the_latent_goes_as_far_as_it_is_told() -> None:
    """Half steps, against a loop of our own; `stood_in` tells what happened in the step."""
    loop = Loop("flux")
    method = steer(interval=2, dt=lambda step, sigmas: 0.5 * nominal(step, sigmas))
    with apply(loop, method):
        out = loop(steps=4)
    loop.scheduler.set_timesteps(4)
    x, v = loop_noise(loop), torch.zeros(())
    with torch.no_grad():
        for n, t in enumerate(loop.scheduler.timesteps):
            if n % 2 == 0:
                v = loop.call(x, t, loop.kind.inputs(1, 4, 10))
            x = x + 0.5 * (loop.scheduler.sigmas[n + 1] - loop.scheduler.sigmas[n]) * v
    assert torch.allclose(out, x, atol=1e-6)
    assert [s for _, _, s in method.made[0].asked] == [False, True, False, True]
    assert isinstance(method.made[0].schedules[0], Interval)


def loop_noise(loop: Loop, seed: int = 0) -> Tensor:
    from tests.models import draw

    return draw(*loop.kind.latent(1, 4), seed=seed)


@pytest.mark.parametrize("kind", [k for k in KEPT if k != "unet"])
def test_the_network_is_told_another_time(kind: str) -> None:
    """In its own unit: Flux is given t / 1000, the others t."""
    loop = Loop(kind)
    seen: list[float] = []
    handle = loop.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(float(k["timestep"][0])), with_kwargs=True
    )
    with apply(loop, steer(frozenset({"time"}), time=lambda step: 0.25 if step.n else None)):
        loop(steps=3)
    handle.remove()
    unit = 1000.0 / KINDS[kind].scale
    assert seen == pytest.approx([unit, 0.25 * unit, 0.25 * unit], rel=1e-5)


def test_other_conventions_of_time_are_refused() -> None:
    loop = Loop("sd3")
    real = loop.call
    loop.call = lambda x, t, inputs, **more: real(x, 1000 - t, inputs, **more)  # type: ignore[method-assign]
    with apply(loop, steer(frozenset({"time"}))), pytest.raises(UnsupportedTarget, match="not proportional"):
        loop(steps=3)
    for whole in (500, torch.tensor([500])):
        with pytest.raises(UnsupportedTarget, match="not proportional"):
            _check_time(whole, 0.5, "Model", "steer")
    _check_time(torch.tensor([500.0, 0.0]), 0.5, "Model", "steer")  # a time for every token, some of them done


def test_live_tokens_alone_reach_the_network() -> None:
    """The output is that of a call with those rows, zero elsewhere; the others stay where they are."""
    loop = Loop("flux")
    live = torch.tensor([1, 4, 5, 11])
    rest = [i for i in range(16) if i not in live.tolist()]
    x, inputs = loop_noise(loop), loop.kind.inputs(1, 4, 10)
    with torch.no_grad():
        want = loop.call(x[:, live], torch.tensor(1000.0), {**inputs, "img_ids": inputs["img_ids"][live]})
    with apply(loop, steer(frozenset({"tokens"}), tokens=lambda step: live)):
        out = loop(steps=1)
    assert torch.allclose(out[:, live], x[:, live] - want, atol=1e-6)
    assert torch.equal(out[:, rest], x[:, rest])


def test_a_step_size_for_every_token() -> None:
    """[1, L, 1]: edited tokens go on step by step while the others jump to the end at once."""
    loop = Loop("flux")
    with torch.no_grad():
        v = loop.call(loop_noise(loop), torch.tensor(1000.0), loop.kind.inputs(1, 4, 10))
    done = torch.arange(16) < 10

    def dt(step: Step, sigmas: Sequence[float]) -> Tensor:
        jump = sigmas[-1] - sigmas[0] if step.n == 0 else 0.0
        return torch.where(done, jump, nominal(step, sigmas)).view(1, -1, 1)

    live = torch.nonzero(~done).flatten()
    with apply(loop, steer(ALL, dt=dt, tokens=lambda step: live if step.n else None)) as run:
        out = loop(steps=4)
    x = loop_noise(loop)
    assert torch.allclose(out[:, :10], (x - v)[:, :10], atol=1e-5)
    assert not torch.allclose(out[:, 10:], (x - v)[:, 10:], atol=1e-3)
    assert run.report().bytes_peak >= 100
    assert any("asked" in note for note in run.report().notes)


def test_every_run_has_a_control_of_its_own() -> None:
    loop = Loop("flux")
    method = steer()
    with apply(loop, method) as run:
        loop(steps=3)
        loop(steps=2)
        run.reset()
        loop(steps=2)
    assert [len(told.asked) for told in method.made] == [3, 2, 2]
    assert len({id(told) for told in method.made}) == 3


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_form_of_the_scheduler_output_is_kept(return_dict: bool) -> None:
    loop = Loop("flux")
    with apply(loop, steer(dt=lambda step, sigmas: -0.125)):
        loop.scheduler.set_timesteps(2)
        x, t = loop_noise(loop), loop.scheduler.timesteps[0]
        v = loop.call(x, t, loop.kind.inputs(1, 4, 10))
        out = loop.scheduler.step(v, t, sample=x, return_dict=return_dict)
        value = out.prev_sample if return_dict else out[0]
        assert torch.allclose(value, x - 0.125 * v)
        assert loop.scheduler.step_index == 1


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        DDIMScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("what", ["dt", "time"])
def test_other_schedulers_are_refused_by_name(scheduler: Any, what: str) -> None:
    loop = Loop("flux", scheduler=scheduler)
    before = snapshot(loop.model, loop.scheduler, loop)
    with pytest.raises(
        UnsupportedTarget, match=rf"flow-matching Euler, not for {type(scheduler).__name__}.*from_config"
    ):
        apply(loop, steer(frozenset({what})))
    assert changed(before, snapshot(loop.model, loop.scheduler, loop)) == []


def test_a_scheduler_swapped_in_later_is_checked_and_followed() -> None:
    loop = Loop("flux")
    method = steer(dt=lambda step, sigmas: -0.1)
    with apply(loop, method):
        loop.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
        loop(steps=3)
        loop(steps=3)
        assert [len(told.asked) for told in method.made] == [3, 3]
        loop.scheduler = FlowMatchHeunDiscreteScheduler()
        with pytest.raises(UnsupportedTarget, match="FlowMatchHeun"):
            loop(steps=3)


def test_a_bare_denoiser_has_no_steps_to_change() -> None:
    with pytest.raises(UnsupportedTarget, match="bare denoiser has no scheduler"):
        elision.apply(Loop("flux").model, steer(), steps=4)


def test_tokens_need_an_adapter_that_knows_them() -> None:
    loop = Loop("sd3")
    before = snapshot(loop.model, loop.scheduler, loop)
    with pytest.raises(UnsupportedTarget, match="SD3Transformer2DModel"):
        apply(loop, steer(frozenset({"tokens"})))
    assert changed(before, snapshot(loop.model, loop.scheduler, loop)) == []


@pytest.mark.parametrize("what", sorted(ALL))
def test_a_control_is_held_once(what: str) -> None:
    loop = Loop("flux")
    one, two = Steer(holds=frozenset({what})), Other(holds=frozenset({what}))
    with pytest.raises(Conflict, match=f"both hold {what}"):
        elision.apply(loop, [one, two])
    apply(loop, [one, Other(holds=ALL - {what})]).remove()


def test_two_methods_can_hold_different_controls() -> None:
    loop = Loop("flux")
    one = Steer({"dt": lambda step, sigmas: 0.0}, 1, frozenset({"dt"}))
    two = Other({"time": lambda step: 0.5}, 1, frozenset({"time"}))
    with apply(loop, [one, two]):
        out = loop(steps=3)
    assert torch.equal(out, loop_noise(loop))
    assert {what for what, *_ in one.made[0].asked} == {"dt"}
    assert {what for what, *_ in two.made[0].asked} == {"time"}


def test_sites_inside_act_as_ever() -> None:
    """The control's tap is inside the site `model`, and blocks see what it passes on."""
    loop = Loop("flux")
    with apply(loop, [steer(dt=lambda step, sigmas: 0.9 * nominal(step, sigmas)), Uniform(interval=2)]) as run:
        out = loop(steps=4)
    assert torch.isfinite(out).all()
    assert run.report().strip() == "CmCm"


def test_a_step_size_of_a_wrong_shape_is_refused() -> None:
    with pytest.raises(OptionError, match=r"\(1, 3, 1\) does not broadcast"):
        euler(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), torch.zeros(1, 3, 1))


def test_half_precision_keeps_the_type_of_the_scheduler() -> None:
    x, v = loop_noise(Loop("flux")).bfloat16(), loop_noise(Loop("flux"), 1).bfloat16()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    want = scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)[0]
    dt = float(scheduler.sigmas[1] - scheduler.sigmas[0])
    assert torch.equal(euler(x, v, dt), want)
    per_token = euler(x, v, torch.full((1, 16, 1), dt))
    assert per_token.dtype == torch.bfloat16
    assert torch.allclose(per_token.float(), want.float(), atol=0.03)


def test_nan_in_a_step_size_leaves_the_scheduler_its_own() -> None:
    """Bit for bit, also in half precision, where the scheduler rounds differently."""
    loop = Loop("flux")
    x, v = loop_noise(loop).bfloat16(), loop_noise(loop, 1).bfloat16()
    loop.scheduler.set_timesteps(4)
    plain = loop.scheduler.step(v, loop.scheduler.timesteps[0], x, return_dict=False)[0]
    stand = torch.arange(16).ge(10)
    size = torch.where(stand, 0.0, torch.nan).view(1, -1, 1)
    with apply(loop, steer(dt=lambda step, sigmas: size)):
        loop.scheduler.set_timesteps(4)
        loop.model(x.float(), timestep=torch.ones(1), **loop.kind.inputs(1, 4, 10))
        out = loop.scheduler.step(v, loop.scheduler.timesteps[0], x, return_dict=False)[0]
    assert torch.equal(out[:, :10], plain[:, :10])
    assert torch.equal(out[:, 10:], x[:, 10:])
