"""The site `guided`: the prediction that the scheduler is given, after guidance made one of several.

It is decided once per step, at the first call of the denoiser; where it stands in, no branch is computed, and what the
sampling loop makes of the zeros that it gets instead is replaced when it reaches `scheduler.step`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elision.denoise.acting import Args, GroupRuntime, Kwargs, SiteRuntime
from elision.denoise.live import put
from elision.denoise.sites import Call, Site, argument
from elision.denoise.steps import Step, step_names
from elision.errors import UnsupportedTarget
from elision.hooks.diffusers import Form
from elision.hooks.taps import Inner

if TYPE_CHECKING:
    from elision.denoise.policy import Decision


class GuidedRuntime(SiteRuntime):
    """The site `guided` of one denoiser during one run."""

    def __init__(self, site: Site, group: GroupRuntime) -> None:
        super().__init__(site, group)
        self._blanks: dict[Any, tuple[Form, torch.Size, torch.dtype]] = {}
        self._open: tuple[Step, Decision, Call] | None = None  # the step that was decided and has not ended
        if self.host.session.target.scheduler is None:
            raise UnsupportedTarget(
                f"{group.group.name} acts on what guidance makes of the predictions, and a bare denoiser has no "
                "scheduler to see it at: apply it to the pipeline"
            )

    def restart(self) -> None:
        """Forget the last run."""
        super().restart()
        self._blanks, self._open = {}, None

    @property
    def _branch(self) -> str:
        return ""

    # -- the denoiser's calls ------------------------------------------------------------------------------------

    def on_tail(self, path: str) -> Callable[[Inner, Args, Kwargs], Any]:
        """A call of the denoiser: it runs, or its output is zero."""

        def wrap(inner: Inner, args: Args, kwargs: Kwargs) -> Any:
            host, step = self.host, self.host.step
            if host.passive:
                return inner(*args, **kwargs)
            decision = self._begin(path, args, kwargs)
            call = self._call
            assert call is not None
            if self._open is None or self._open[0].n != step.n or step.leads:
                self._open = (step, decision, call)
            key = (step.branch, call.get("return_dict", True))
            if not decision.stand_in or key not in self._blanks:
                out = inner(*args, **kwargs)
                value, form = Form.split(out)
                value = host.host.adapter.show(value)
                self._blanks[key] = (form, value.shape, value.dtype)
                return out
            host.book.stood_in[host.signature, self.site] += 1
            if host.shadow:
                with host.session.steering.peeking():
                    return inner(*args, **kwargs)
            form, shape, dtype = self._blanks[key]
            return form.join(host.host.adapter.give(call.x.new_zeros(shape, dtype=dtype)))

        return wrap

    # -- scheduler.step ------------------------------------------------------------------------------------------

    def on_step(self, inner: Inner, args: Args, kwargs: Kwargs) -> Any:
        """The end of a step: the guided prediction is seen, or replaced."""
        clock = self.host.session.clock
        pending, opened = clock.pending, self._open
        if pending is None or opened is None or (opened[0].run, opened[0].n) != (pending.run, pending.n):
            return inner(*args, **kwargs)
        self._open = None
        step, decision, call = opened
        names = step_names(clock.scheduler)
        call = replace(call, x=argument(names, args, kwargs, "sample"))
        truth: Tensor = argument(names, args, kwargs, "model_output")
        if decision.stand_in:
            value = self._replace(step, call, truth)
            args, kwargs = put(names, args, kwargs, "model_output", value)
        else:
            self._see(call, truth)
        return inner(*args, **kwargs)

    def _see(self, call: Call, value: Tensor) -> None:
        host, started = self.host, perf_counter()
        self._observe(call, {"": value}, computed=True)
        now = perf_counter()
        host.seconds.standing_in += now - started
        self._update(call, {"": value}, computed=True)
        host.session.weigh()
        host.seconds.deciding += perf_counter() - now
        host.tally(self.group.group.name).computed += 1

    def _replace(self, step: Step, call: Call, truth: Tensor) -> Tensor:
        host, started = self.host, perf_counter()
        predictor = self.predictors["", ""]
        value = predictor.predict(step, call.x, call)
        if any(value is kept for kept in predictor.tensors()):
            value = value.clone()  # the scheduler may write into what it is given
        self._observe(call, {"": value}, computed=False)
        host.seconds.standing_in += perf_counter() - started
        self._update(call, {"": value}, computed=False)
        if host.shadow:
            norm = torch.linalg.vector_norm(truth.float()).clamp_min(1e-30)
            error = torch.linalg.vector_norm(value.float() - truth.float()) / norm
            host.shadow_errors.append((step.run, step.n, "", self.site.key, error))
        tally = host.tally(self.group.group.name)
        setattr(tally, predictor.kind, getattr(tally, predictor.kind) + 1)
        return value
