"""Every denoiser class under test, and what each can do, found by doing it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elision
from elision.denoise.adapters import adapter_for
from elision.denoise.control import Control
from elision.denoise.engine import DenoiseApplied
from elision.denoise.flops import count, meta_skeleton, of_modules, to_meta
from elision.denoise.methods.first_block import FirstBlock
from elision.denoise.methods.taylorseer import TaylorSeer
from elision.denoise.methods.teacache import TeaCache
from elision.denoise.methods.uniform import Uniform
from elision.denoise.policy import Claims, DenoiseMethod, Host, Plan, Schedule
from elision.denoise.report import DenoiseReport
from elision.denoise.steps import Step
from elision.errors import UnsupportedTarget
from elision.profile import Profile
from tests.denoise.adapters.images import IMAGES
from tests.denoise.adapters.subjects import ClassLoop, Subject
from tests.denoise.adapters.videos import VIDEOS
from tests.denoise.policy import policy
from tests.models import KINDS, draw

LEVELS = ("model", "head", "stack", "run", "branch")


def _known(kind: str, guidance: str = "one call") -> Subject:
    fields = {f.name: getattr(KINDS[kind], f.name) for f in dataclasses.fields(KINDS[kind])}
    return Subject(**fields, guidance=guidance)


SUBJECTS: dict[str, Subject] = {
    "Flux": _known("flux", "none, or two named calls"),
    "Flux (Kontext)": _known("kontext", "none, or two named calls"),
    "SD3": _known("sd3"),
    "DiT": _known("dit"),
    "PixArt": _known("pixart"),
    **IMAGES,
    **VIDEOS,
    "Diffusion Policy": Subject(
        policy,
        lambda b, n: (b, n, 2),
        lambda b, n, s: {"cond": draw(1, 3, 4, seed=s).repeat(b, 1, 1)},
        blocks=2,
        invoke=lambda model, x, time, inputs: model(x, time[:1], inputs["cond"]),
        guidance="none",
    ),
}


def still(level: str) -> DenoiseMethod:
    """A method that computes the first step, and stands in for everything at this level after it."""
    if level == "TeaCache":
        return TeaCache(threshold=1e9, tail_steps=0)
    if level == "run":
        return FirstBlock(threshold=1e9)
    if level == "head":
        return TaylorSeer(interval=9, first_enhance=1, site="head")
    return Uniform(interval=9, site=level)  # type: ignore[arg-type]


def stand_still(
    loop: ClassLoop, method: DenoiseMethod, batch: int = 2, counting: bool = True
) -> tuple[DenoiseApplied, int]:
    """The same call at every step: whatever is left out, and put together again, must give the same prediction.

    Returns:
        What was applied, and the FLOPs that really ran in two steps.
    """
    x, t = draw(*loop.kind.latent(batch, 4), seed=1), torch.tensor(700.0)
    inputs = loop.kind.inputs(batch, 4, 10)
    counter: Any = FlopCounterMode(display=False) if counting else contextlib.nullcontext()
    run = elision.apply(loop, method)
    assert isinstance(run, DenoiseApplied)
    with sdpa_kernel(SDPBackend.MATH), counter, run, torch.no_grad():  # fused attention would not be counted
        loop.scheduler.set_timesteps(2)
        outs = []
        for time in loop.scheduler.timesteps:
            outs.append(loop.call(x, t, inputs))
            loop.scheduler.step(outs[-1], time, x)
    assert float((outs[1] - outs[0]).norm() / outs[0].norm()) < 1e-5
    return run, int(counter.get_total_flops()) if counting else 0


class _Half(Control):
    """All tokens in the first step, whose keys and values are kept; then every second one."""

    def __init__(self, tokens: int) -> None:
        self.live = torch.arange(0, tokens, 2)

    def tokens(self, step: Step) -> Tensor | None:
        """The same ones at every step but the first."""
        return self.live if step.n else None

    def keeps(self, step: Step) -> bool:
        """In the full call."""
        return step.n == 0


@dataclasses.dataclass(frozen=True)
class LiveTokens(DenoiseMethod):
    """Calls the denoiser with every second of its tokens."""

    name: ClassVar[str] = "live"
    description: ClassVar[str] = "test"
    count: int = 0

    def plan(self, host: Host, profile: Profile | None) -> Plan:
        """No site, one control."""
        return Plan([], Claims(frozenset(), frozenset({"tokens"})), control=self._control)

    def _control(self, schedules: Sequence[Schedule]) -> Control:
        return _Half(self.count)


def live(loop: ClassLoop) -> str:
    """The same call twice, the second time with some tokens: they come out as they did, the others as zero."""
    x, inputs = draw(*loop.kind.latent(2, 4), seed=1), loop.kind.inputs(2, 4, 10)
    with elision.apply(loop, LiveTokens(count=x.shape[1])), torch.no_grad():
        loop.scheduler.set_timesteps(2)
        outs = []
        for time in loop.scheduler.timesteps:
            outs.append(loop.call(x, torch.tensor(700.0), inputs))
            loop.scheduler.step(outs[-1], time, x)
    assert float((outs[1][:, ::2] - outs[0][:, ::2]).norm() / outs[0].norm()) < 1e-5
    assert outs[1][:, 1::2].abs().max() == 0
    return "yes"


@functools.cache
def row(name: str) -> dict[str, str]:
    """What a class can do: "yes", or why not, by level and feature."""
    loop = ClassLoop(SUBJECTS[name])
    adapter = adapter_for(loop.model)
    reasons: dict[str, Any] = {
        **adapter.lacks,
        "TeaCache": adapter.lacks.get("modulated"),
        "live tokens": adapter.whole,
    }
    cells = {}
    for column in (*LEVELS, "live tokens", "TeaCache"):
        try:
            cells[column] = live(loop) if column == "live tokens" else at(loop, column)
        except UnsupportedTarget as error:  # and nothing else
            named = type(loop.model).__name__ in str(error) and reasons[column] in str(error)
            cells[column] = reasons[column] if named else f"?! {error}"
    return {**cells, "FLOPs": loop.kind.uncounted or "yes", "guidance": loop.kind.guidance}


def at(loop: ClassLoop, level: str) -> str:
    """Stand in at a level, and compare the FLOPs that ran with those that should have."""
    method = still(level)
    run, ran = stand_still(loop, method)
    report = run.report()
    assert isinstance(report, DenoiseReport)
    assert report.strip()[1:] in ("r", "p")
    whole = flops(loop.kind)
    if whole is None or level == "TeaCache":  # which modulates once more to decide
        return "yes"
    sites = [
        site for group in method.plan(Host(loop.model, adapter_for(loop.model)), None).groups for site in group.sites
    ]
    elided = sum(of_modules(whole, site.modules) for site in sites)
    assert elided > 0
    if type(loop.model).__name__ == "TransformerForDiffusion":  # torch fuses its attention, which is then not counted
        assert ran < 2 * whole[""] - elided
    else:
        assert ran == 2 * whole[""] - elided
    if level == "branch":
        assert (report.flops_computed, report.flops_elided) == (2 * whole[""] - elided, elided)
    return "yes"


@functools.cache
def flops(subject: Subject) -> dict[str, int] | None:
    """FLOPs by module of a call with two rows, None where they cannot be counted without data."""
    loop, caught = ClassLoop(subject), list[Any]()
    with torch.no_grad():
        loop.model.register_forward_pre_hook(lambda _, *call: caught.append(call), with_kwargs=True)
        loop.call(draw(*subject.latent(2, 4), seed=1), torch.tensor(700.0), subject.inputs(2, 4, 10))
    skeleton = meta_skeleton(loop.model)
    assert skeleton is not None
    counts = count(skeleton, *to_meta(caught[0]))
    assert (counts is None) == bool(subject.uncounted)
    return counts


def table() -> str:
    """The table of the documentation."""
    columns = [*LEVELS, "live tokens", "TeaCache", "FLOPs", "guidance"]
    lines = [f"| class | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    for name, subject in SUBJECTS.items():
        cells = row(name)
        title = f"{name}: `{type(subject.make()).__name__}`"
        lines.append(f"| {title} | {' | '.join(cells[column] for column in columns)} |")
    none = ["yes", *["no adapter"] * 6, "where data decides no shape", "any"]
    lines.append(f"| any other denoiser | {' | '.join(none)} |")
    return "\n".join(lines)
