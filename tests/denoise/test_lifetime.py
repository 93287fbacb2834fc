"""What is kept alive and what is told: release after removal, declared branches, offloading, dtypes, bad input."""

from __future__ import annotations

import gc
import io
import weakref

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import elision
from elision.denoise import flops
from elision.denoise.methods.easycache import EasyCache
from elision.errors import ClockError, ElisionError, ElisionWarning, OptionError
from elision.profile import weight_digest
from elision.zoo import load
from elision.zoo.garments_flux import GarmentsPipeline


def pipeline() -> GarmentsPipeline:
    return load("garments-flux")  # type: ignore[no-any-return]


class Small(nn.Module):
    """A denoiser without a time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, noise_level: float = 0.0) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


class Timed(Small):
    """A denoiser with a time."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return self.linear(x) * timestep


def test_a_kept_report_does_not_keep_the_pipeline() -> None:
    pipe = pipeline()
    model = weakref.ref(pipe.transformer)
    with elision.apply(pipe, "uniform", interval=2) as run:
        pipe("bag", 4)
    text = str(run.report())
    del pipe
    gc.collect()
    assert model() is None
    assert "2 of 4 steps computed" in text
    assert "2 of 4 steps computed" in str(run.report())


def test_declared_branches_name_unnamed_calls() -> None:
    """Two unnamed calls a step are refused, and work once their order is told; with a scheduler and without."""
    model = Timed()
    x = torch.randn(1, 3, 4)

    def step(n: int) -> Tensor:
        t = torch.tensor(1 - n / 8)
        return model(x + n, t) + model(x - n, t)

    refused = pytest.raises(ClockError, match=r"branches=\('cond', 'uncond'\)")
    with elision.apply(model, "uniform", steps=8, site="model", interval=2), refused:
        step(0)
    with elision.apply(model, "uniform", steps=8, site="model", interval=2, branches=("cond", "uncond")) as run:
        for _ in range(2):
            for n in range(8):
                step(n)
        assert run.report().strip() == "CrCrCrCr"
        assert run.report().run_count == 2
    with elision.apply(model, "uniform", steps=8, site="model", branches=("a", "b")):
        step(0)
        model(x, torch.tensor(0.5))
        model(x, torch.tensor(0.5))
    pipe = pipeline()
    plain, names = pipe.transformer.cache_context, []
    pipe.transformer.__dict__["cache_context"] = lambda name: plain("")  # a pipeline that forgets to name its calls
    try:
        with elision.apply(pipe, "uniform", interval=2, branches=("cond", "uncond")) as run:
            names.append(pipe("bag", 6, generator=torch.Generator().manual_seed(0), output_type="pt").images)
    finally:
        del pipe.transformer.__dict__["cache_context"]
    with elision.apply(pipe, "uniform", interval=2):
        named = pipe("bag", 6, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(names[0], named)
    with pytest.raises(OptionError, match="branches="):
        elision.apply(pipe, "uniform", branches=("cond", "cond"))


@pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
def test_without_a_time_steps_must_be_given() -> None:
    model = Small()
    with elision.apply(model, "uniform", site="model", interval=2), torch.no_grad():
        model(torch.zeros(1, 4))
        with pytest.raises(ClockError, match="pass steps="):
            model(torch.zeros(1, 4))
    with elision.apply(model, "uniform", site="model", interval=2, steps=4) as run:
        for _ in range(8):
            model(torch.zeros(1, 4))
    assert [r.states() for r in run.report().runs] == [["computed", "reused"] * 2] * 2


def test_flops_do_not_copy_offloaded_weights() -> None:
    model = pipeline().transformer
    cpu_offload(model, execution_device=torch.device("cpu"))
    skeleton = flops.meta_skeleton(model)
    assert skeleton is not None
    assert all(p.device.type == "meta" for p in skeleton.parameters())
    assert not any("_hf_hook" in m.__dict__ for m in skeleton.modules())
    assert weight_digest(model) == "unknown"


def test_a_replaced_denoiser_is_noticed() -> None:
    pipe = pipeline()
    run = elision.apply(pipe, "uniform", interval=2)
    pipe.register_modules(transformer=pipeline().transformer)
    pipe("bag", 4)
    with pytest.warns(ElisionWarning, match="never called through its taps"):
        run.remove()


def test_residual_keeps_the_output_dtype_under_autocast() -> None:
    model = Timed()
    with elision.apply(model, "uniform", site="model", interval=2, steps=4), torch.autocast("cpu", torch.bfloat16):
        outs = [model(torch.ones(1, 4), torch.tensor(1.0 - n / 4, dtype=torch.bfloat16)) for n in range(4)]
    assert {out.dtype for out in outs} == {torch.bfloat16}


def test_bytes_count_what_a_criterion_keeps_on_skipped_steps() -> None:
    model = Timed()
    with elision.apply(model, "easycache", steps=12, threshold=1e9, warmup_steps=2) as run:
        for n in range(8):
            model(torch.ones(1, 4) + n, torch.tensor(1 - n / 12))
        host = run.hosts[0]  # type: ignore[attr-defined]
        held = sum(t.untyped_storage().nbytes() for t in host.tensors())
        assert run.report().bytes_held == held == 4 * 16  # x_prev, x and v of the last computed step, D


@pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
def test_conditional_rows_out_of_range_are_named() -> None:
    model = Timed()
    refused = pytest.raises(OptionError, match="selects no row of a batch of 2")
    with elision.apply(model, "easycache", steps=4, cond=slice(2, None)), refused:
        model(torch.ones(2, 4), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("method", "options"),
    [("taylorseer", {"interval": None}), ("easycache", {"threshold": None}), ("uniform", {"interval": None})],
)
def test_none_is_no_number(method: str, options: dict[str, None]) -> None:
    with pytest.raises(OptionError, match="=None is not a number"):
        elision.apply(Timed(), method, steps=4, **options)


def test_numpy_numbers_and_foreign_options() -> None:
    assert EasyCache(warmup_steps=np.int64(3)).warmup_steps == 3
    with pytest.raises(OptionError, match="warmup_steps has no meaning for variant='comfyui'"):
        EasyCache(variant="comfyui", warmup_steps=3)
    with pytest.raises(OptionError, match="subsample has no meaning for variant='official'"):
        EasyCache(subsample=2)


def test_fit_refuses_a_single_call_and_loose_options() -> None:
    with pytest.raises(OptionError, match="is one call"):
        elision.fit(Timed(), "teacache", calls="sneaker")
    with pytest.raises(OptionError, match="beside an option object"):
        elision.fit(Timed(), EasyCache(), calls=[1], degree=2)


def test_pickles_made_while_applied_are_plain() -> None:
    pipe = pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.register_modules(scheduler=scheduler)
    with elision.apply(pipe, "uniform"):
        for thing in (pipe.scheduler, pipe.transformer):
            file = io.BytesIO()
            torch.save(thing, file)
            file.seek(0)
            copy = torch.load(file, weights_only=False)
            assert type(copy) is type(thing)
        pipe("bag", 4)


def test_every_error_is_ours() -> None:
    with pytest.raises(ElisionError):
        elision.apply(object(), "uniform")
