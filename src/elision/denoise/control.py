"""Control: steering the sampler without owning it.

A method may change three things of a step that is not its own: the step size (`dt`), the noise level that the network
is told (`time`), and the image tokens that the network is given (`tokens`). The sampling loop stays the pipeline's.
Taps on its scheduler's `step` and inside the denoiser's call ask a `Control` and put its answers in; where it answers
None everything is as it was, bit for bit.

A changed step is `sample + dt * velocity`, which is what flow-matching Euler does and no other scheduler: those are
refused by name. The scheduler's own `step` still runs, for its counters, and its result is dropped. The time argument
is scaled by the ratio of noise levels, which is right for denoisers whose time is proportional to it (in whatever
unit); at the first call of a run that is checked. With live tokens the network is called on those rows of its token
arguments (named by the adapter), and its output is zero elsewhere, so that an Euler step leaves the other tokens where
they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from elision.denoise.policy import Plan
from elision.denoise.sites import argument, parameter_names
from elision.denoise.steps import Step
from elision.errors import OptionError, UnsupportedTarget
from elision.hooks.diffusers import Form
from elision.hooks.taps import Inner, Tap, tap_call, tap_method

if TYPE_CHECKING:
    from elision.denoise.engine import DenoiseApplied
    from elision.denoise.runtime import HostRuntime

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
What = Literal["dt", "time", "tokens"]
EULER = "FlowMatchEulerDiscreteScheduler"


class Control:
    """What a method changes of the sampler, for the length of one run. It is asked what its plan's claims hold.

    The order within a step is: `time` and `tokens` at every call of the denoiser, then `dt` once.
    """

    def dt(self, step: Step, sigmas: Sequence[float], stood_in: bool) -> float | Tensor | None:
        """The change of noise level in this step (negative, as sigma falls); None leaves the scheduler's own.

        Args:
            step: the step that ends.
            sigmas: noise levels of the full grid; the scheduler would go from entry `step.i` to the next.
            stood_in: whether a group of the same plan stood in for anything in this step.

        Returns:
            A number, or a tensor that broadcasts against the latent: [1, L, 1] is a step size for every token.
        """
        return None

    def time(self, step: Step) -> float | None:
        """The noise level that the network is told in this call; None leaves what the pipeline says."""
        return None

    def tokens(self, step: Step) -> Tensor | None:
        """Indices [N] of the image tokens that the network is given in this call; None gives it all."""
        return None

    def tensors(self) -> Iterable[Tensor]:
        """Tensors kept between steps, for the byte count."""
        return ()

    def notes(self) -> Iterable[str]:
        """What happened in this run that the report should say."""
        return ()


class Steering:
    """The controls of a session: made anew for every run, and asked through taps."""

    def __init__(self, plans: Mapping[str, Plan], session: DenoiseApplied) -> None:
        self._plans = {name: plan for name, plan in plans.items() if plan.control is not None}
        self._session = session
        self._controls: dict[str, Control] = {}
        self._run = -1

    def holds(self, what: What) -> str | None:
        """The method that holds one of the controls; there is at most one."""
        return next((name for name, plan in self._plans.items() if what in plan.claims.controls), None)

    def forget(self) -> None:
        """Drop the controls of the run."""
        self._controls, self._run = {}, -1

    def tensors(self) -> Iterable[Tensor]:
        """What the controls keep."""
        for control in self._controls.values():
            yield from control.tensors()

    def notes(self) -> Iterable[str]:
        """Notes of the controls, with the name of their method."""
        return [f"{name}: {note}" for name, control in self._controls.items() for note in control.notes()]

    def check(self, scheduler: Any) -> None:
        """Refuse a scheduler whose steps cannot be changed."""
        holder = self.holds("dt") or self.holds("time")
        if holder is None:
            return
        if scheduler is None:
            raise UnsupportedTarget(
                f"{holder} changes the sampler's steps, and a bare denoiser has no scheduler to change them in: "
                "apply it to the pipeline, or turn that part of the method off"
            )
        name = type(scheduler).__name__
        source = next((cls.__name__ for cls in type(scheduler).__mro__ if "step" in vars(cls)), "")
        config = getattr(scheduler, "config", None)
        stochastic = bool(getattr(config, "stochastic_sampling", False))
        if source != EULER or stochastic:
            what = f"{name} with stochastic_sampling" if source == EULER else name
            raise UnsupportedTarget(
                f"{holder} changes the sampler's steps, which is defined for flow-matching Euler, not for {what}: set "
                f"pipe.scheduler = {EULER}.from_config(pipe.scheduler.config, stochastic_sampling=False) if the model "
                "is a flow, or turn that part of the method off"
            )

    def _control(self, what: What, step: Step) -> Control | None:
        name = self.holds(what)
        if name is None:
            return None
        if self._run != step.run:
            self.forget()
            self._run = step.run
        if name not in self._controls:
            plan = self._plans[name]
            make = plan.control
            assert make is not None
            schedules = {g.group.name: g.schedule for host in reversed(self._session.hosts) for g in host.groups}
            self._controls[name] = make([schedules[group.name] for group in plan.groups])
        return self._controls[name]

    # -- scheduler.step ------------------------------------------------------------------------------------------

    def taps(self, scheduler: Any) -> list[Tap]:
        """The taps on this scheduler; inside the clock's, so that a step is not over before it was changed."""
        return [] if self.holds("dt") is None else [tap_method(scheduler, "step", self._on_step)]

    def _on_step(self, inner: Inner, args: Args, kwargs: Kwargs) -> Any:
        clock = self._session.clock
        step = clock.pending
        control = None if step is None else self._control("dt", step)
        if step is None or control is None or not clock.sigmas:
            return inner(*args, **kwargs)
        groups = self._plans[self.holds("dt") or ""].groups
        dt = control.dt(step, clock.sigmas, any(self._session.stood_in(group.name) for group in groups))
        out = inner(*args, **kwargs)
        if dt is None:
            return out
        given = inspect.signature(inner).bind(*args, **kwargs).arguments
        if given.get("per_token_timesteps") is not None:
            raise UnsupportedTarget(
                f"{self.holds('dt')} changes the sampler's steps, and this pipeline gives every token a time of its "
                "own (per_token_timesteps): turn that part of the method off"
            )
        _, form = Form.split(out)
        return form.join(euler(given["sample"], given["model_output"], dt))

    # -- the denoiser's call -------------------------------------------------------------------------------------

    def tap_call(self, host: HostRuntime) -> list[Tap]:
        """The tap in a denoiser's call; inside all others, so that only the network sees what is changed."""
        if self.holds("time") is None and self.holds("tokens") is None:
            return []
        adapter, name = host.host.adapter, type(host.model).__name__
        if self.holds("time") is not None and adapter.timestep is None:
            raise UnsupportedTarget(f"{self.holds('time')} changes the network's time, and {name} takes none")
        if self.holds("tokens") is not None and not adapter.token_axes:
            raise UnsupportedTarget(
                f"{self.holds('tokens')} calls the denoiser with some of its tokens, which {name} cannot be: it "
                f"{adapter.whole}"
            )
        return [tap_call(host.outer, self._on_call(host))]

    def _on_call(self, host: HostRuntime) -> Callable[[Inner, Args, Kwargs], Any]:
        adapter, names = host.host.adapter, parameter_names(host.model)
        checked = [-1]

        def wrap(inner: Inner, args: Args, kwargs: Kwargs) -> Any:
            step = host.step
            timing, cutting = self._control("time", step), self._control("tokens", step)
            if timing is not None and step.sigma is not None:
                assert adapter.timestep is not None
                given = argument(names, args, kwargs, adapter.timestep)
                if checked[0] != step.run:
                    _check_time(given, step.sigma, type(host.model).__name__, self.holds("time"))
                    checked[0] = step.run
                wanted = timing.time(step)
                if wanted is not None:
                    args, kwargs = put(names, args, kwargs, adapter.timestep, given * (wanted / step.sigma))
            live = None if cutting is None else cutting.tokens(step)
            if live is None:
                return inner(*args, **kwargs)
            count = argument(names, args, kwargs, adapter.latent).shape[adapter.token_axes[adapter.latent]]
            for name, axis in adapter.token_axes.items():
                value = argument(names, args, kwargs, name)
                if isinstance(value, Tensor):
                    args, kwargs = put(names, args, kwargs, name, value.index_select(axis, live))
            value, form = Form.split(inner(*args, **kwargs))
            return form.join(scatter(value, live, count))

        return wrap


def euler(sample: Tensor, velocity: Tensor, dt: float | Tensor) -> Tensor:
    """`sample + dt * velocity` in float32, in the velocity's type, as diffusers' scheduler has it."""
    size = torch.as_tensor(dt, dtype=torch.float32, device=sample.device)
    if size.ndim:
        try:
            size.expand(sample.shape)
        except RuntimeError as error:
            raise OptionError(
                f"a step size of shape {tuple(size.shape)} does not broadcast against a latent of shape "
                f"{tuple(sample.shape)}: give a number, or [1, L, 1] for a latent of L tokens"
            ) from error
        velocity = velocity.float() if velocity.dtype != size.dtype else velocity
        return (sample.float() + size * velocity).to(sample.dtype)
    return (sample.float() + size * velocity).to(velocity.dtype)


def scatter(rows: Tensor, live: Tensor, count: int) -> Tensor:
    """Tokens [B, N, C] at the places `live` [N] of `count` tokens, zero elsewhere."""
    full = rows.new_zeros(rows.shape[0], count, *rows.shape[2:])
    return full.index_copy_(1, live, rows)


def put(names: tuple[str, ...], args: Args, kwargs: Kwargs, name: str, value: Any) -> tuple[Args, Kwargs]:
    """The arguments with another value for `name`, wherever it stands in the call."""
    place = names.index(name)
    if name not in kwargs and place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _check_time(given: Any, sigma: float, model: str, holder: str | None) -> None:
    """Refuse a time argument that is not a float proportional to the noise level, in units of 1 or 1/1000."""
    value = float(torch.as_tensor(given).float().max())
    whole = isinstance(given, int) or (isinstance(given, Tensor) and not given.is_floating_point())
    if not whole and any(abs(value - unit * sigma) <= 0.01 * unit * sigma + 1e-6 for unit in (1.0, 1000.0)):
        return
    raise UnsupportedTarget(
        f"{holder} changes the time that the network is told, and {model} is told {value:g} at noise level {sigma:g}, "
        "which is not proportional to it: turn that part of the method off"
    )
