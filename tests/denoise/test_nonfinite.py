"""Values that are not finite: criteria refuse to reuse them and name the step, the others say so in the report."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision.denoise.policy import DenoiseMethod, Host
from elision.method import create
from tests.conformance.settings import ACTIVE, Options, apply, profile_for
from tests.models import Loop

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
AT = 3  # the step whose output is spoilt

# With these settings every criterion method would stand in from step 2 on.
CRITERIA: list[tuple[str, Options]] = [
    ("easycache", {"threshold": 1e9, "warmup_steps": 4, "tail_steps": 0}),
    ("easycache", {"threshold": 1e9, "variant": "comfyui", "start": 0.25, "end": 1.0, "subsample": 1}),
    ("first_block", {"threshold": 1e9, "warmup_steps": 4}),
    ("teacache", {"threshold": 1e9, "warmup_steps": 4, "tail_steps": 0}),
    ("worldcache", {"threshold": 1e9, "warmup_steps": 4, "tail_steps": 0}),
]
RULES: list[tuple[str, Options]] = [
    ("uniform", {"interval": 2}),
    ("uniform", {"interval": 2, "site": "model"}),
    ("taylorseer", {"interval": 2, "first_enhance": 2}),
    ("stale", {"interval": 2}),
    ("random_skip", {"rate": 0.5, "warmup_steps": 4}),
    ("bac", {"num_caches": 4, "union_blocks": 1}),
    ("bac", {"schedule": "uniform", "interval": 2}),
    ("ertacache", {"reused": (2, 4, 6), "adjust": False, "rectify": "off"}),
    ("ertacache", {"reused": (2, 4, 6), "phi": 0.5, "rectify": "off"}),
    ("profilingdit", {"blocks": (1, 2), "warmup_steps": 1, "schedule": "uniform", "interval": 2}),
]


def test_every_method_that_reads_a_statistic_is_here() -> None:
    """A schedule that listens reads what passes; it belongs to CRITERIA, the others to RULES.

    RegionE listens for its region alone and has a test of its own.
    """
    loop = Loop("flux")
    from elision.denoise.adapters import adapter_for

    host = Host(loop.model, adapter_for(loop.model), loop.scheduler)
    listening = set()
    for row in elision.methods("denoise"):
        options = ACTIVE[row.name][0]
        method = create(row.name, **options)
        assert isinstance(method, DenoiseMethod)
        plan = method.plan(host, profile_for(loop, row.name, options))
        if any(group.schedule().listens for group in plan.groups):
            listening.add(row.name)
    assert listening == {"regione", *(name for name, _ in CRITERIA)}
    assert {row.name for row in elision.methods("denoise")} - listening == {name for name, _ in RULES}


class Spoilt:
    """A loop whose denoiser breaks down in its first computed step from AT on; `heal` repairs what the sampler gets."""

    def __init__(self, value: float, heal: bool, branch: str = "") -> None:
        self.loop = Loop("flux")
        self.value, self.heal, self.branch = value, heal, branch
        self.step, self.now, self.hit = -1, "", -1
        self.handle = self.loop.model.proj_out.register_forward_hook(self._spoil)  # type: ignore[union-attr, operator]
        self.inner = self.loop.model.single_transformer_blocks[1].register_forward_hook(self._spoil_block)  # type: ignore[index, union-attr]

    def _hit(self) -> bool:
        if self.step >= AT and self.hit < 0:
            self.hit = self.step
        return self.step == self.hit and self.branch in ("", self.now)

    def _spoil(self, module: Any, args: Any, out: Tensor) -> Tensor | None:
        return torch.where(torch.arange(out.numel()).reshape(out.shape) == 5, self.value, out) if self._hit() else None

    def _spoil_block(self, module: Any, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        if not self._hit():
            return None
        spoilt = out[1].clone()
        spoilt[0, 0, 0] = self.value
        return out[0], spoilt

    def __call__(self, steps: int = 8, **how: Any) -> tuple[Tensor, list[Tensor]]:
        """The sample, and what the denoiser returned at every call."""
        returned: list[Tensor] = []
        real = Loop.call

        def call(x: Tensor, t: Tensor, inputs: Any) -> Tensor:
            out = real(self.loop, x, t, inputs)
            returned.append(out.clone())
            return torch.nan_to_num(out, 0.0, 0.0, 0.0) if self.heal else out

        self.loop.call = call  # type: ignore[method-assign, assignment]
        out = self.loop(steps=steps, each=lambda n: setattr(self, "step", n), **how)
        return out, returned


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("heal", [False, True])
@pytest.mark.parametrize(("method", "options"), CRITERIA)
def test_criteria_do_not_reuse_and_name_the_step(method: str, options: Options, heal: bool, value: float) -> None:
    """`heal` is a sampler that repairs the latent: the input is then finite, the kept residual is not."""
    spoilt = Spoilt(value, heal)
    with apply(spoilt.loop, method, options) as run:
        _, returned = spoilt()
    report = run.report()
    assert report.strip()[: AT + 1] == "CCCC"
    assert report.strip()[AT + 1] == "C", report
    assert not torch.isfinite(returned[AT]).all()
    if heal:
        assert all(torch.isfinite(v).all() for n, v in enumerate(returned) if n != AT)
        assert {"r", "p"} & set(report.strip()[AT + 2 :])  # it recovers
    assert any(f"step {AT + 1}" in note and "not finite" in note for note in report.notes), report.notes
    assert report.reasons()[method]["not finite"] >= 1


@pytest.mark.parametrize(("method", "options"), CRITERIA)
def test_a_spoilt_unconditional_branch_is_not_reused_either(method: str, options: Options) -> None:
    spoilt = Spoilt(math.nan, heal=True, branch="uncond")
    with apply(spoilt.loop, method, options) as run:

        def naming(branch: str) -> Any:
            spoilt.now = branch
            return run.step(branch)

        _, returned = spoilt(mode="sequential", name=naming)
    bad = [i for i, v in enumerate(returned) if not torch.isfinite(v).all()]
    assert bad == [2 * AT + 1]
    assert {"r", "p"} & set(run.report().strip())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("method", "options"), [*CRITERIA, *RULES])
def test_every_report_says_so(method: str, options: Options, value: float) -> None:
    spoilt = Spoilt(value, heal=True)
    with apply(spoilt.loop, method, options) as run:
        spoilt()
        spoilt.step = -1
        spoilt.value = 0.0
        spoilt()
    notes = [note for note in run.report().notes if "outputs of the denoiser were not finite" in note]
    assert len(notes) == 1
    assert notes[0].startswith("run 0: ")
    # the step is spoilt where it was computed; a stand-in made of it comes later
    first = int(notes[0].split("the first at step ")[1].split()[0])
    assert first >= AT


@pytest.mark.parametrize(("method", "options"), [*CRITERIA, *RULES])
def test_finite_runs_say_nothing(method: str, options: Options) -> None:
    loop = Loop("flux")
    with apply(loop, method, options) as run:
        loop(steps=8)
    assert not any("finite" in note for note in run.report().notes)


def test_statistics_of_half_precision_do_not_overflow() -> None:
    """A mean of many large half-precision values is formed in float32."""
    from elision.denoise.schedules import mean_abs

    big = torch.full((70_000,), 60_000.0, dtype=torch.float16)
    assert float(mean_abs(big)) == pytest.approx(60_000, rel=1e-3)
    assert mean_abs(big).dtype == torch.float32
    assert mean_abs(big.double()).dtype == torch.float64
