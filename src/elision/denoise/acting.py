"""A site at work: its schedule decides, its module computes, its predictors observe and stand in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from elision.denoise.policy import Decision, Group, Predictor, Schedule
from elision.denoise.sites import (
    Call,
    Site,
    argument,
    first_tensor,
    join_tokens,
    parameter_names,
    split_tokens,
)
from elision.denoise.steps import Step
from elision.errors import UnsupportedTarget
from elision.hooks.diffusers import Form
from elision.hooks.taps import Inner

if TYPE_CHECKING:
    from elision.denoise.runtime import HostRuntime

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
_NO_HISTORY = Decision(False, "no history")
_NOT_FINITE = Decision(False, "not finite")


class GroupRuntime:
    """One group of sites during one run: the schedule, asked once per scope."""

    def __init__(self, group: Group, host: HostRuntime) -> None:
        self.group = group
        self.host = host
        self.schedule: Schedule = group.schedule()
        self.notes: list[str] = []
        self._finite: dict[tuple[Site, str], Tensor | bool] = {}
        self._key: Any = None
        self._decision = _NO_HISTORY

    def restart(self) -> None:
        """Fresh state for a new run."""
        self.schedule = self.group.schedule()
        self.notes = []
        self._finite = {}
        self._key = None

    def predictor(self) -> Predictor:
        """A predictor for one site, branch and stream: a new one, or the schedule where it is its own."""
        if self.group.predictor is not None:
            return self.group.predictor()
        assert isinstance(self.schedule, Predictor)
        return self.schedule

    def observe(self, site: Site, values: Iterable[Tensor]) -> None:
        """Remember whether what a criterion may let stand in is finite."""
        if self.schedule.listens:
            flags = [torch.isfinite(value).all() for value in values]
            self._finite[site, self.host.step.branch] = flags[0] if len(flags) == 1 else torch.stack(flags).all()

    def _kept_is_finite(self, step: Step) -> bool:
        """Whether what would stand in is finite: of all branches where they share the decision."""
        mine = [key for key in self._finite if self.schedule.scope == "step" or key[1] == step.branch]
        open_flags = [flag for key in mine if isinstance(flag := self._finite[key], Tensor)]
        if open_flags:  # read together, so that one wait for the device serves all branches
            together = bool(torch.stack(open_flags).all())
            for key in mine:
                self._finite[key] = together or bool(self._finite[key])
        return all(self._finite[key] for key in mine)

    def decide(self, site: Site, call: Call) -> Decision:
        """The schedule's decision for this call; counted once per scope."""
        step = self.host.step
        scope = self.schedule.scope
        key = step.n if scope == "step" else (step.n, step.branch) if scope == "branch" else (step.n, step.branch, site)
        if key != self._key:
            self._decision = self.schedule.decide(step, site, call)
            if self._decision.stand_in and not self._kept_is_finite(step):
                self._decision = _NOT_FINITE
                self.notes.append(f"step {step.n}: what was kept is not finite, so the step was computed")
            self._key = key
            self.host.tally(self.group.name).reasons[self._decision.reason] += 1
        return self._decision


class SiteRuntime:
    """One site during one run: its predictors, and the wraps around its modules."""

    def __init__(self, site: Site, group: GroupRuntime) -> None:
        self.site = site
        self.group = group
        self.host = group.host
        self.predictors: dict[tuple[str, str], Predictor] = {}
        self._forms: dict[Any, Any] = {}
        self._visit = -1
        self._done = -1
        self._decision = _NO_HISTORY
        self._call: Call | None = None
        self._modules = {path: self.host.module(path) for path in sorted(site.modules)}
        self._names = {path: parameter_names(module) for path, module in self._modules.items()}

    def restart(self) -> None:
        """Forget the predictors of the last run."""
        self.predictors = {}
        self._forms = {}
        self._visit = self._done = -1
        self._call = None

    def tensors(self) -> Iterable[Tensor]:
        """What the predictors keep."""
        for predictor in self.predictors.values():
            yield from predictor.tensors()

    # -- wraps ---------------------------------------------------------------------------------------------------

    def on_feeder(self, path: str) -> Callable[[Inner, Args, Kwargs], Any]:
        """A module that only feeds the tail: zero width on a stand-in, in the form of its last output."""
        forms: dict[str, tuple[bool, list[torch.Size | None]]] = {}

        def wrap(inner: Inner, args: Args, kwargs: Kwargs) -> Any:
            branch = self.host.step.branch
            if self.host.passive or not self._begin(path, args, kwargs).stand_in or branch not in forms:
                out = inner(*args, **kwargs)
                several = out if isinstance(out, tuple) else (out,)
                shapes = [part.shape[:-1] if isinstance(part, Tensor) else None for part in several]
                forms[branch] = isinstance(out, tuple), shapes
                return out
            if self.host.shadow:
                with self.host.muted():  # the truth of this site; what lies inside it is not reached
                    return inner(*args, **kwargs)
            x, (is_tuple, shapes) = first_tensor(args, kwargs), forms[branch]
            empty = tuple(None if shape is None else x.new_empty((*shape, 0)) for shape in shapes)
            return empty if is_tuple else empty[0]

        return wrap

    def on_block(self, path: str) -> Callable[[Inner, Args, Kwargs], Any]:
        """A block before the tail: hands its streams through on a stand-in."""
        streams = self.host.host.adapter.spec(self.host.model, path).streams
        names = self._names[path]

        def wrap(inner: Inner, args: Args, kwargs: Kwargs) -> Any:
            if self.host.passive or not self._begin(path, args, kwargs).stand_in:
                return inner(*args, **kwargs)
            if self.host.shadow:
                with self.host.muted():  # the truth of this site; what lies inside it is not reached
                    return inner(*args, **kwargs)
            through = tuple(argument(names, args, kwargs, name) for name in streams)
            return through[0] if len(through) == 1 else through

        return wrap

    def on_tail(self, path: str) -> Callable[[Inner, Args, Kwargs], Any]:
        """The module whose output is the value of the site."""

        def wrap(inner: Inner, args: Args, kwargs: Kwargs) -> Any:
            if self.host.passive:
                return inner(*args, **kwargs)
            decision = self._begin(path, args, kwargs)
            if self._done == self.host.visit:
                raise UnsupportedTarget(
                    f"{path or 'the denoiser'} ran twice in one call (a shared or chunked module, or gradient "
                    "checkpointing), so its output is no single value: turn that off, or use a method at the site "
                    "'model'"
                )
            self._done = self.host.visit
            call = self._call
            assert call is not None
            if decision.stand_in and self._form_key(kwargs) in self._forms:
                return self._stand_in(inner, args, kwargs, call)
            return self._compute(inner, args, kwargs, call)

        return wrap

    # -- one call ------------------------------------------------------------------------------------------------

    def _begin(self, path: str, args: Args, kwargs: Kwargs) -> Decision:
        """The decision for this call of the denoiser, made at the first module of the site that is reached."""
        host = self.host
        if self._visit == host.visit:
            return self._decision
        started = perf_counter()
        self._visit = host.visit
        names, adapter = self._names[path], host.host.adapter
        inputs: dict[str, Tensor] = {}
        entry = host.entries.get(self.site.entry)
        if self.site.level in ("guided", "model"):
            x = adapter.show(argument(names, args, kwargs, adapter.latent))
            inputs = {name: adapter.show(argument(names, args, kwargs, name)) for name in adapter.others}
        elif self.site.blocks:
            spec = adapter.spec(host.model, path)
            inputs = {name: argument(names, args, kwargs, name) for name in spec.streams}
            x = inputs[adapter.image]
            if entry is not None and spec.joined is not None:
                x = split_tokens(x, entry.shape[1], spec.joined)[0]
        else:
            x = first_tensor(args, kwargs)
        sigmas = host.session.clock.sigmas if self.site.level == "guided" else ()
        self._call = Call(x, names, args, kwargs, self._modules[path], entry, inputs, sigmas)
        decision = self.group.decide(self.site, self._call)
        host.renewed |= self.group.schedule.listens  # a criterion may keep something at every step
        if decision.stand_in and not self._ready():
            decision = _NO_HISTORY
            host.tally(self.group.group.name).reasons[decision.reason] += 1
        self._decision = decision
        host.seconds.deciding += perf_counter() - started
        return decision

    @property
    def _branch(self) -> str:
        """The guidance branch that the value belongs to."""
        return self.host.step.branch

    def _ready(self) -> bool:
        branch, step = self._branch, self.host.step
        mine = [p for (name, _), p in self.predictors.items() if name == branch]
        return bool(mine) and all(p.ready(step) for p in mine)

    def _form_key(self, kwargs: Kwargs) -> Any:
        branch = self.host.step.branch
        if self.site.level != "model" or self._call is None:
            return branch
        return branch, self._call.get("return_dict", True)

    def _compute(self, inner: Inner, args: Args, kwargs: Kwargs, call: Call) -> Any:
        out = inner(*args, **kwargs)
        started = perf_counter()
        values, form = self._split(out)
        self._forms[self._form_key(kwargs)] = form
        self._observe(call, values, computed=True)
        now = perf_counter()
        self.host.seconds.standing_in += now - started
        self._update(call, values, computed=True)
        self.host.seconds.deciding += perf_counter() - now
        self.host.tally(self.group.group.name).computed += 1
        return out

    def _stand_in(self, inner: Inner, args: Args, kwargs: Kwargs, call: Call) -> Any:
        host, step = self.host, self.host.step
        started = perf_counter()
        values: dict[str, Tensor] = {}
        kind = "reused"
        for (branch, stream), predictor in self.predictors.items():
            if branch == step.branch:
                value = predictor.predict(step, call.inputs.get(stream, call.x), call)
                if self.site.returned and any(value is kept for kept in predictor.tensors()):
                    value = value.clone()  # the caller may write into what it is given
                values[stream], kind = value, predictor.kind
        self._observe(call, values, computed=False)
        now = perf_counter()
        host.seconds.standing_in += now - started
        self._update(call, values, computed=False)
        host.seconds.deciding += perf_counter() - now
        if host.shadow:
            self._compare(inner, args, kwargs, values)
        tally = host.tally(self.group.group.name)
        setattr(tally, kind, getattr(tally, kind) + 1)
        host.book.stood_in[host.signature, self.site] += 1
        return self._join(self._forms[self._form_key(kwargs)], values, call)

    def _observe(self, call: Call, values: dict[str, Tensor], computed: bool) -> None:
        step = self.host.step
        self.host.renewed |= computed
        if computed:
            self.group.observe(self.site, values.values())
        for stream, value in values.items():
            key = (self._branch, stream)
            predictor = self.predictors.get(key)
            if predictor is None:
                predictor = self.predictors[key] = self.group.predictor()
            if computed and self.site.returned:
                value = value.clone()  # the caller may write into what it is given
            predictor.observe(step, call.inputs.get(stream, call.x), call, value, computed)

    def _update(self, call: Call, values: dict[str, Tensor], computed: bool) -> None:
        schedule = self.group.schedule
        if schedule.listens:
            image = self.host.host.adapter.image
            value = values[image] if image in values else next(iter(values.values()))
            schedule.update(self.host.step, self.site, call, value, computed)

    def _split(self, out: Any) -> tuple[dict[str, Tensor], Any]:
        """The values that are kept, by stream, and the form to put stand-ins back into."""
        if self.site.level == "model":
            adapter = self.host.host.adapter
            value, form = Form.split(out)
            value = adapter.show(value)
            if not isinstance(value, Tensor):
                raise UnsupportedTarget(
                    f"{type(self.host.model).__name__} returned {type(value).__name__}, not a tensor: denoisers that "
                    "return lists (or rows of several sizes) are not supported"
                )
            more = zip(adapter.others, form.others, strict=False)
            return {"": value} | {name: adapter.show(other) for name, other in more}, form
        if self.site.joined is not None:
            image, text = self._sides(self._call)
            parts = split_tokens(out, self._call.inputs[image].shape[1], self.site.joined)  # type: ignore[union-attr]
            both = dict(zip((image, text), parts, strict=True))
            return {name: both[name] for name in self.site.only or (image, text)}, None
        if not isinstance(out, (tuple, list)):
            return {"": out} if len(self.site.streams) != 1 else {self.site.streams[0]: out}, None
        named = dict(zip(self.site.streams, out, strict=False))
        if len(out) > len(self.site.streams):
            raise UnsupportedTarget(f"{self.site.tail} returned {len(out)} values; known: {self.site.streams}")
        keep = {k: v for k, v in named.items() if isinstance(v, Tensor) and (not self.site.only or k in self.site.only)}
        return keep, tuple((k, isinstance(v, Tensor)) for k, v in named.items())

    def _join(self, form: Any, values: dict[str, Tensor], call: Call) -> Any:
        if self.site.level == "model":
            adapter = self.host.host.adapter
            others = [adapter.give(values[name]) for name in adapter.others if name in values]
            return form.carrying(others).join(adapter.give(values[""]))
        if self.site.joined is not None:
            image, text = (values.get(name, call.inputs[name]) for name in self._sides(call))
            return join_tokens(image, text, self.site.joined)
        if form is None:
            return next(iter(values.values()))
        return tuple((values.get(name, call.inputs.get(name))) if there else None for name, there in form)

    def _sides(self, call: Call | None) -> tuple[str, str]:
        """The names of the image and of the text stream."""
        assert call is not None
        image = self.host.host.adapter.image
        return image, next(name for name in call.inputs if name != image)

    def _compare(self, inner: Inner, args: Args, kwargs: Kwargs, values: dict[str, Tensor]) -> None:
        """Shadow mode: compute the true value and keep the relative error of the stand-in."""
        host = self.host
        with host.muted():
            truth, _ = self._split(inner(*args, **kwargs))
        for stream, value in values.items():
            norm = torch.linalg.vector_norm(truth[stream].float())
            error = torch.linalg.vector_norm(value.float() - truth[stream].float()) / norm.clamp_min(1e-30)
            name = f"{self.site.key}:{stream}" if stream else self.site.key
            host.shadow_errors.append((host.step.run, host.step.n, host.step.branch, name, error))
