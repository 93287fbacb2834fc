"""Control: steering the sampler without owning it.

A method may change three things of a step that is not its own: the step size (`dt`), the noise level that the network
is told (`time`), and the image tokens that the network is given (`tokens`). The sampling loop stays the pipeline's.
Taps on its scheduler's `step` and inside the denoiser's call ask a `Control` and put its answers in; where it answers
None everything is as it was, bit for bit.

A changed step is `sample + dt * velocity`, which is what flow-matching Euler does and no other scheduler: those are
refused by name. The scheduler's own `step` still runs, for its counters, and its result is dropped. The time argument
is scaled by the ratio of noise levels, which is right for denoisers whose time is proportional to it (in whatever
unit); at the first call of a run that is checked. With live tokens the network is called on those alone (see `live`),
and what reaches the scheduler is zero elsewhere, whatever guidance made of it, so that an Euler step leaves the other
tokens where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from elision.denoise.acting import Args, Kwargs
from elision.denoise.live import Live, LiveCalls, put
from elision.denoise.policy import Plan
from elision.denoise.sites import argument, parameter_names
from elision.denoise.steps import Step, step_names
from elision.errors import OptionError, UnsupportedTarget
from elision.hooks.diffusers import Form
from elision.hooks.taps import Inner, Tap, tap_call, tap_method

if TYPE_CHECKING:
    from elision.denoise.engine import DenoiseApplied
    from elision.denoise.runtime import HostRuntime

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
            A number, or a tensor that broadcasts against the latent: [1, L, 1] is a step size for every token, and
            NaN in it leaves the scheduler's own.
        """
        return None

    def time(self, step: Step) -> float | None:
        """The noise level that the network is told in this call; None leaves what the pipeline says."""
        return None

    def tokens(self, step: Step) -> Live | None:
        """Indices [N] of the image tokens that the network is given in this call; None gives it all.

        A list of such tensors, one for each image, has the network called with one image at a time.
        """
        return None

    def keeps(self, step: Step) -> bool:
        """Whether keys and values of all tokens are kept in this call, for the attention of calls with live tokens."""
        return False

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
        self._lives: list[LiveCalls] = []
        self._cut: tuple[int, Live | None] = (-1, None)  # the step and the live tokens of the last call

    def holds(self, what: What) -> str | None:
        """The method that holds one of the controls; there is at most one."""
        return next((name for name, plan in self._plans.items() if what in plan.claims.controls), None)

    def forget(self) -> None:
        """Drop the controls of the run."""
        self._controls, self._run, self._cut = {}, -1, (-1, None)
        for live in self._lives:
            live.forget()

    def tensors(self) -> Iterable[Tensor]:
        """What the controls keep."""
        for control in self._controls.values():
            yield from control.tensors()
        for live in self._lives:
            yield from live.tensors()

    @contextmanager
    def peeking(self) -> Iterator[None]:
        """While entered, calls with live tokens leave no trace in what is kept."""
        for live in self._lives:
            live.peeking = True
        try:
            yield
        finally:
            for live in self._lives:
                live.peeking = False

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

    def blanking(self, scheduler: Any) -> list[Tap]:
        """The tap that sets to zero what guidance made of tokens that were not live (0 / 0, where it is rescaled)."""
        return [] if self.holds("tokens") is None else [tap_method(scheduler, "step", self._on_blank)]

    def _on_blank(self, inner: Inner, args: Args, kwargs: Kwargs) -> Any:
        step, (n, live) = self._session.clock.pending, self._cut
        if step is None or step.n != n or live is None:
            return inner(*args, **kwargs)
        names = step_names(self._session.clock.scheduler)
        velocity = argument(names, args, kwargs, "model_output")
        alive = torch.zeros(len(velocity), velocity.shape[1], 1, dtype=torch.bool, device=velocity.device)
        for rows, mine in [(alive, live)] if isinstance(live, Tensor) else zip(alive[:, None], live, strict=True):
            rows.index_fill_(1, mine, True)
        blank = torch.where(alive, velocity, velocity.new_zeros(()))
        args, kwargs = put(names, args, kwargs, "model_output", blank)
        return inner(*args, **kwargs)

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
        names = step_names(clock.scheduler)
        if argument(names, args, kwargs, "per_token_timesteps") is not None:
            raise UnsupportedTarget(
                f"{self.holds('dt')} changes the sampler's steps, and this pipeline gives every token a time of its "
                "own (per_token_timesteps): turn that part of the method off"
            )
        nominal, form = Form.split(out)
        sample, velocity = (argument(names, args, kwargs, name) for name in ("sample", "model_output"))
        moved = euler(sample, velocity, dt)
        if isinstance(dt, Tensor):
            moved = torch.where(dt.to(moved.device).isnan(), nominal.to(moved.dtype), moved)
        return form.join(moved)

    # -- the denoiser's call -------------------------------------------------------------------------------------

    def tap_call(self, host: HostRuntime) -> list[Tap]:
        """The tap in a denoiser's call; inside all others, so that only the network sees what is changed."""
        if self.holds("time") is None and self.holds("tokens") is None:
            return []
        adapter, name = host.host.adapter, type(host.model).__name__
        if self.holds("time") is not None and adapter.timestep is None:
            raise UnsupportedTarget(f"{self.holds('time')} changes the network's time, and {name} takes none")
        holder, live = self.holds("tokens"), None
        if holder is not None:
            if not adapter.token_axes:
                raise UnsupportedTarget(
                    f"{holder} calls the denoiser with some of its tokens, which {name} cannot be: it {adapter.whole}"
                )
            live = LiveCalls(host, holder)
            self._lives.append(live)
            host.below |= live.paths
        return [tap_call(host.outer, self._on_call(host, live)), *(live.taps() if live else ())]

    def _on_call(self, host: HostRuntime, lives: LiveCalls | None) -> Callable[[Inner, Args, Kwargs], Any]:
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
            if cutting is None or lives is None:
                return inner(*args, **kwargs)
            live = cutting.tokens(step)
            self._cut = (step.n, live)
            if live is None:
                return lives.whole(inner, args, kwargs, cutting.keeps(step))
            if not lives.peeking:
                self._session.tally(step, lives.holder).partial += 1
            return lives.cut(inner, args, kwargs, live)

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
