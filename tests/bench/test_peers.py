"""Caches of other libraries as rows: their text, what they compute, how they leave a pipeline, and comparisons."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import elision
from elision.bench import peers
from elision.bench.compare import Comparison, compare_denoise
from elision.bench.measure import run_method, run_plain
from elision.bench.peers import cache_dit, diffusers
from elision.bench.peers._base import tensors_in
from elision.bench.peers._watch import own_counts
from elision.bench.spec import parse, parse_many
from elision.bench.subject import Subject
from elision.errors import MissingDependency, OptionError, UnknownName, UnsupportedTarget
from tests.bench.conftest import small_pipeline
from tests.models import Loop, changed, snapshot

STEPS = 8
EVER = "times=(-1,1001)"
FLUX = [
    f"diffusers:pab,{EVER}",
    "diffusers:faster,times=(-1,990)",
    "diffusers:mag,threshold=0.3",
    "diffusers:first_block,threshold=0.7",
    "diffusers:taylorseer,interval=3",
    "diffusers:taylorseer,interval=3,lite=true",
    "cache_dit:dbcache,threshold=0.7,warmup=2",
    "cache_dit:dbcache,threshold=0.7,warmup=2,calibrator=taylorseer",
    "cache_dit:dbcache,threshold=0.7,warmup=2,calibrator=foca",
]


class Tiny:
    """A miniature pipeline of any denoiser class, called as diffusers' pipelines are."""

    def __init__(self, kind: str, mode: str) -> None:
        self.loop, self.mode = Loop(kind), mode
        self.scheduler, self.transformer = self.loop.scheduler, self.loop.model

    def __call__(
        self, prompt: list[str], num_inference_steps: int = STEPS, generator: Any = None, output_type: str = "np"
    ) -> Any:
        x = self.loop(generator.initial_seed(), num_inference_steps, self.mode, len(prompt))
        return SimpleNamespace(images=x.flatten(1).sigmoid()[:, None, None].expand(-1, 3, 4, -1))


def tiny(kind: str, mode: str = "sequential", batch: int = 2) -> Subject:
    pipe = Tiny(kind, mode)
    pipe({"x": 1}, 1, torch.Generator())  # type: ignore[arg-type]  # diffusers' contexts leave a registry behind
    return Subject(f"tiny-{kind}", pipe, ["a"] * batch, STEPS)


@pytest.fixture(scope="module")
def flux() -> Subject:
    return Subject("random-flux", small_pipeline(), ["bag", "coat"], STEPS, 2.0)


def test_names_are_read_and_written() -> None:
    assert parse("diffusers:pab,range=3").method == diffusers.PAB(range=3)
    assert parse("diffusers:pab,range=3").label == "diffusers:pab,range=3"
    assert parse("cache-dit:dbcache").label == "cache_dit:dbcache"
    many = parse_many(
        "uniform,diffusers:pab,times=(-1,1001),range=4,cache_dit:dbcache,steps=(0,4),taylorseer:interval=3"
    )
    assert [spec.label for spec in many] == [
        "uniform",
        "diffusers:pab,range=4,times=(-1,1001)",
        "cache_dit:dbcache,steps=(0,4)",
        "taylorseer:interval=3",
    ]
    for spec in many:
        assert parse(spec.label) == spec


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("diffusers:pub", UnknownName, "pab"),
        ("diffusers:pab,rang=2", UnknownName, "range"),
        ("diffusers:pab,profile=x", UnknownName, "option of diffusers:pab"),
        ("diffusers:pab,range=0", OptionError, "at least 1"),
        ("cache_dit:dbcache,calibrator=dmd", OptionError, "foca"),
        ("cache_dit:dbcache,steps=(1,2)", OptionError, "step 0"),
    ],
)
def test_bad_requests(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse(text)


def test_they_are_no_methods_of_this_library(flux: Subject) -> None:
    assert not {row.name for row in elision.methods()} & {f"{name}:pab" for name in peers.LIBRARIES}
    with pytest.raises(UnsupportedTarget, match="only comparisons"):
        elision.apply(flux.pipe, diffusers.PAB())


@pytest.mark.parametrize("text", FLUX)
def test_they_save_work_and_leave_the_pipeline_as_it_was(flux: Subject, text: str) -> None:
    truth, _ = run_plain(flux, STEPS, 0)
    method = parse(text).method
    order = [name for name, _ in flux.pipe.transformer.named_children()]
    before = snapshot(flux.pipe.transformer, flux.pipe, flux.pipe.scheduler)
    images, sample, report = run_method(flux, method, STEPS, 0)
    after = list(changed(before, snapshot(flux.pipe.transformer, flux.pipe, flux.pipe.scheduler)))
    assert [key for key in after if not key.startswith("2:")] == []  # the scheduler counts its own steps
    assert [name for name, _ in flux.pipe.transformer.named_children()] == order
    assert not torch.equal(images, truth)
    assert sample.states[0] == "computed"
    assert {"reused", "predicted", "mixed"} & set(sample.states)
    assert 1 < sample.steps_computed < STEPS
    assert sample.calls == 2 * STEPS
    assert sample.bytes_peak > 0
    assert report.flops_computed is not None
    assert report.flops_elided is not None
    assert report.flops_computed + report.flops_elided == _plain_flops(flux)
    assert torch.equal(run_plain(flux, STEPS, 0)[0], truth)
    again, second, _ = run_method(flux, method, STEPS, 0)
    assert torch.equal(again, images)
    assert second.bytes_peak == sample.bytes_peak


def _plain_flops(subject: Subject) -> int:
    report = run_method(subject, parse("uniform:interval=1").method, STEPS, 0)[2]
    assert report.flops_computed is not None
    return report.flops_computed


@pytest.mark.parametrize(
    "text",
    [
        "diffusers:pab,range=1",
        "diffusers:faster,range=1,times=(-1,990)",
        "diffusers:mag,threshold=0",
        "diffusers:first_block,threshold=0",
        "diffusers:taylorseer,interval=1",
        "cache_dit:dbcache,threshold=0",
        "cache_dit:dbcache,steps=(0,1,2,3,4,5,6,7)",
    ],
)
def test_a_cache_that_skips_nothing_costs_and_gives_the_whole(flux: Subject, text: str) -> None:
    images, sample, report = run_method(flux, parse(text).method, STEPS, 1)
    assert torch.equal(images, run_plain(flux, STEPS, 1)[0])
    assert sample.steps_computed == STEPS
    assert set(sample.states) == {"computed"}
    assert report.flops_elided == 0


def test_the_same_schedule_costs_the_same_in_diffusers_and_here(flux: Subject) -> None:
    theirs = run_method(flux, parse("diffusers:taylorseer,interval=3,sites=branches").method, STEPS, 0)
    ours = run_method(
        flux,
        parse("taylorseer:interval=3,first_enhance=3,schedule=diffusers,factors_dtype=float32").method,
        STEPS,
        0,
    )
    assert theirs[2].flops_computed == ours[2].flops_computed
    assert theirs[1].bytes_peak == ours[1].bytes_peak
    assert [s == "computed" for s in theirs[1].states] == [s == "computed" for s in ours[1].states]
    assert torch.allclose(theirs[0], ours[0], atol=1e-5)


def test_a_static_mask_computes_its_steps(flux: Subject) -> None:
    sample = run_method(flux, parse("cache_dit:dbcache,steps=(0,3,6)").method, STEPS, 0)[1]
    assert [n for n, state in enumerate(sample.states) if state == "computed"] == [0, 3, 6]


def test_each_guidance_branch_keeps_its_own_attention(flux: Subject) -> None:
    """With one state for both branches the second call of step 0 would reuse the first one's attention."""
    _, sample, _ = run_method(flux, diffusers.PAB(range=100, times=(-1, 1001)), STEPS, 0)
    assert sample.states == ["computed", *["reused"] * (STEPS - 1)]
    assert any("state of its own" in note for note in sample.notes)


def test_magcache_calibrates_once_for_every_number_of_steps(flux: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    sample = Subject.sample

    def counted(self: Subject, steps: int, seed: int) -> Any:
        drawn.append(seed)
        return sample(self, steps, seed)

    monkeypatch.setattr(Subject, "sample", counted)
    method = diffusers.MagCache(threshold=0.2)
    for _ in range(2):
        run_method(flux, method, 7, 0)
    calibration = [seed for seed in drawn if seed != 0]
    assert len(set(calibration)) == 1
    assert len(calibration) <= 2  # the look at an uncached run, and the calibration
    assert drawn.count(0) == 2


@pytest.mark.parametrize("mode", ["sequential", "batched", "distilled"])
@pytest.mark.parametrize(
    "text",
    [
        f"diffusers:pab,range=2,cross=4,{EVER}",
        "diffusers:faster,times=(-1,990),uncond_times=(-1,1001)",
        "diffusers:taylorseer,interval=3,sites=branches",
        "diffusers:mag,threshold=1,retention=0.2",
        "cache_dit:dbcache,threshold=2,warmup=2",
    ],
)
def test_video_denoisers(text: str, mode: str) -> None:
    wan = tiny("wan", mode)
    truth, _ = run_plain(wan, STEPS, 0)
    images, sample, _ = run_method(wan, parse(text).method, STEPS, 0)
    assert sample.steps_computed < STEPS
    assert sample.calls == (2 if mode == "sequential" else 1) * STEPS
    assert images.shape == truth.shape
    assert torch.equal(run_plain(wan, STEPS, 0)[0], truth)


def test_fastercache_extrapolates_the_unconditional_rows_where_it_can() -> None:
    text = "diffusers:faster,range=1,times=(-1,990),uncond_times=(-1,1001),uncond=2"
    batched = run_method(tiny("wan", "batched"), parse(text).method, STEPS, 0)[1]
    assert batched.steps_computed == pytest.approx(STEPS * 0.75, rel=0.05)  # half of the rows at every other step
    assert batched.notes == []
    apart = run_method(tiny("wan", "sequential"), parse(text).method, STEPS, 0)[1]
    assert apart.steps_computed == STEPS
    assert any("called in turn" in note for note in apart.notes)
    tokens = run_method(tiny("flux", "batched"), parse(text).method, STEPS, 0)[1]
    assert any("predictions are tokens" in note for note in tokens.notes)


@pytest.fixture(scope="module")
def comparison(flux: Subject) -> Comparison:
    methods = [
        "taylorseer:interval=3",
        "diffusers:taylorseer,interval=3,sites=branches",
        "cache_dit:dbcache,steps=(0,4)",
    ]
    return compare_denoise(flux, methods, steps=STEPS, seeds=2, controls=False)


def test_they_stand_beside_ours(comparison: Comparison, tmp_path: Any) -> None:
    rows = {row.label: row for row in comparison.rows()}
    theirs = rows["diffusers:taylorseer,interval=3,sites=branches"]
    assert theirs.kind == "control"
    assert theirs.flops_ratio is not None
    assert theirs.flops_ratio > 1.5
    assert theirs.equal_cost in rows
    assert theirs.psnr_gain is not None
    loaded = Comparison.load(comparison.save(tmp_path / "r.jsonl"))
    assert loaded.rows() == comparison.rows()


def test_what_is_not_installed_is_left_out_with_a_note(flux: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cache_dit.importlib.metadata, "version", missing)
    found = compare_denoise(flux, ["uniform", "cache_dit:dbcache"], steps=4, seeds=1, controls=False)
    assert [arm.label for arm in found.arms if arm.kind == "control"] == ["uniform"]
    assert any("cache_dit:dbcache is left out: cache-dit is not installed" in note for note in found.notes)
    monkeypatch.setattr(cache_dit.importlib.metadata, "version", lambda name: "1.4.0")
    with pytest.raises(MissingDependency, match=r"1\.4\.0"):
        run_method(flux, cache_dit.DBCache(), STEPS, 0)


def test_what_does_not_run_on_a_class_is_left_out_with_a_note() -> None:
    found = compare_denoise(
        tiny("unet", "distilled"), ["uniform:site=model", *FLUX[:3]], steps=4, seeds=1, controls=False
    )
    assert [arm.kind for arm in found.arms] == ["baseline", "control", "fewer_steps"]
    assert sum("is left out" in note for note in found.notes) == 3


def test_own_operations_add_up() -> None:
    counts = {"": 100, "blocks.0": 60, "blocks.0.attn": 50, "blocks.0.attn.to_q": 20, "head": 30}
    assert own_counts(counts) == {"blocks.0": 10, "blocks.0.attn": 30, "blocks.0.attn.to_q": 20, "head": 30}


def test_tensors_are_found_in_states() -> None:
    class State:
        def __init__(self) -> None:
            self.cache = [torch.zeros(2), {"a": (torch.zeros(3), nn.Linear(2, 2))}]

    assert [t.numel() for t in tensors_in(State())] == [2, 3]
