"""The report adds up: counts, strip, reasons, calls, FLOPs, bytes, seconds."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elision.denoise.engine import DenoiseApplied
from elision.denoise.flops import FlopBook
from elision.denoise.report import DenoiseReport
from tests.conformance.settings import ACTIVE, AFTER_GUIDANCE, STEPS, Options, apply, cases
from tests.models import Loop

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
LETTERS = {"computed": "C", "reused": "r", "predicted": "p", "mixed": "m"}


def real_flops(loop: Loop, **how: Any) -> int:
    """FLOPs of a run, counted while it really runs; torch does not count its fused attention on the CPU."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        loop(**how)
    return int(counter.get_total_flops())


@functools.cache
def flops_of_a_call(kind: str) -> int:
    """FLOPs of one uncached call."""
    return real_flops(Loop(kind), steps=1)


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, ("flux", "sd3", "dit", "unet", "wan_i2v")))
def test_report_adds_up(method: str, options: Options, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(kind)
    run = apply(loop, method, options)
    ran = real_flops(loop, steps=STEPS, mode="sequential", name=run.step)
    with monkeypatch.context() as patch:
        patch.setattr(FlopBook, "totals", lambda self: None)
        live = run.report()
    run.remove()
    report = run.report()
    check_counts(report, method, 2 * STEPS)
    assert report.flops_computed is not None
    assert report.flops_elided is not None
    assert report.flops_computed + report.flops_elided == 2 * STEPS * flops_of_a_call(kind)
    own = ran - report.flops_computed  # TeaCache modulates the first block's input once more to decide
    assert 0 <= own < 0.2 * ran if method == "teacache" else own == 0
    assert report.strip() == live.strip()
    assert report.target == "Loop"
    assert report.bytes_held == 0
    assert report.bytes_peak > 0
    json.dumps(report.to_dict())
    text = str(report)
    assert report.strip() in text
    assert method in text


def check_counts(report: DenoiseReport, method: str, calls: int) -> None:
    """The arithmetic of one finished run."""
    last = report.last
    assert last is not None
    assert report.calls == calls
    assert len(report.strip()) == len(last.steps) == last.total == STEPS == report.steps
    assert report.strip() == "".join(LETTERS[state] for state in last.states())
    assert [step.n for step in last.steps] == list(range(STEPS))
    tallies = [step.groups[method] for step in last.steps]
    assert sum(t.computed for t in tallies) == report.outputs_computed
    assert sum(t.stood_in for t in tallies) == report.outputs_stood_in
    seen = STEPS if method in AFTER_GUIDANCE else calls  # a value per step, or one per call
    assert report.outputs_computed + report.outputs_stood_in == report.sites[method] * seen
    for state, total in (
        ("computed", report.steps_computed),
        ("reused", report.steps_reused),
        ("predicted", report.steps_predicted),
        ("mixed", report.steps_mixed),
    ):
        assert last.count(state) == total  # type: ignore[arg-type]
    at_model = report.calls_elided > 0
    assert report.calls_elided == (report.outputs_stood_in * calls // seen if at_model else 0)
    assert report.reasons()[method] == sum((t.reasons for t in tallies), start=type(tallies[0].reasons)())
    assert report.seconds.deciding > 0
    assert report.seconds.standing_in > 0
    assert report.seconds.computing > 0


@pytest.mark.parametrize("method", ["easycache", "random_skip", "stale"])
def test_calls_elided_are_calls_that_did_not_run(method: str) -> None:
    loop = Loop("unet")
    ran = []
    handle = loop.model.conv_in.register_forward_hook(lambda *_: ran.append(1))  # type: ignore[union-attr, operator]
    with apply(loop, method, ACTIVE[method][0]) as run:
        loop(steps=STEPS)
    handle.remove()
    report = run.report()
    assert report.calls_elided == STEPS - len(ran) > 0


def test_a_stood_in_site_runs_none_of_its_modules() -> None:
    """And what is outside the sites runs at every step."""
    loop = Loop("flux")
    ran: dict[str, int] = {}
    handles = [
        module.register_forward_hook(lambda *_, path=path: ran.__setitem__(path, ran.get(path, 0) + 1))
        for path, module in loop.model.named_modules()
    ]
    with apply(loop, "taylorseer", {"interval": 3, "first_enhance": 1}) as run:
        loop(steps=7)
    for handle in handles:
        handle.remove()
    assert run.report().strip() == "CppCppC"
    for path, times in ran.items():
        inside = any(f".{part}" in path for part in ("attn", "ff", "proj_mlp", "proj_out"))
        assert times == (3 if inside and path.startswith(("transformer_blocks", "single")) else 7), path


def test_live_report_of_a_run_in_progress() -> None:
    loop = Loop("flux")
    seen: list[DenoiseReport] = []
    with apply(loop, "uniform", {"interval": 2, "site": "stack"}) as run:
        loop(steps=6, each=lambda n: seen.append(run.report()))
        held = seen[3].bytes_held
        assert held == 1 * 16 * 16 * 4  # one residual [1, 16, 16] in float32
        assert run.report().bytes_held == 0  # a finished run holds nothing
    assert [r.strip() for r in seen] == ["", "C", "Cr", "CrC", "CrCr", "CrCrC"]
    assert [r.steps for r in seen] == list(range(6))
    assert [r.calls for r in seen] == list(range(6))
    assert seen[2].last is not seen[3].last  # a report does not change after it was made


def test_reports_over_many_runs_keep_totals() -> None:
    loop = Loop("flux")
    with apply(loop, "stale", {"interval": 2}) as run:
        for seed in range(70):
            loop(seed=seed, steps=2)
    report = run.report()
    assert report.run_count == 70
    assert report.steps == report.calls == 140
    assert report.calls_elided == 70
    assert len(report.runs) == 64
    assert [r.number for r in report.runs] == list(range(6, 70))


def test_two_denoisers_count_apart_and_together() -> None:
    """Wan 2.2 hands over from `transformer` to `transformer_2` in the middle of a run."""
    run = _expert_run("uniform", {"interval": 2})
    report = run.report()
    assert report.calls == STEPS
    assert report.sites == {"uniform": 6 + 6}
    assert report.outputs_computed + report.outputs_stood_in == 6 * STEPS
    assert len(report.strip()) == STEPS


def _expert_run(method: str, options: Options) -> DenoiseApplied:
    loop = Loop("wan")
    second = Loop("wan", seed=1).model
    loop.transformer_2 = second  # type: ignore[attr-defined]
    first = loop.model
    with apply(loop, method, options) as run:

        def each(n: int) -> None:
            loop.transformer = first if n < 4 else second  # type: ignore[attr-defined]

        loop(steps=STEPS, each=each)
    return run


def test_flops_are_unknown_rather_than_wrong() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if float(x.mean()) > 0 else -self.layer(x)  # type: ignore[no-any-return]

    model = Odd()
    run = apply(model, "stale", {"interval": 2}, steps=2)
    with torch.no_grad():
        for t in (1.0, 0.5):
            model(torch.ones(1, 4), torch.tensor([t]))
    report = run.report()
    assert report.flops_computed is None
    assert report.flops_elided is None
    assert "FLOPs" not in str(report)
    assert report.strip() == "Cr"
