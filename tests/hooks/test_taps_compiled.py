"""Taps and `torch.compile`: below, above, and in each other's way."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

import elision
from elision.errors import TapDisplaced, UnsupportedTarget
from elision.hooks.taps import is_compiled, tap_call
from tests.hooks.doubles import MODEL, Double, Noting, quiet
from tests.models import KINDS, Loop, changed, snapshot


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of compiled graphs, by a backend that counts and then runs eagerly."""
    torch._dynamo.reset()
    return []


def backend(calls: list[int]) -> Callable[..., Any]:
    def compile_graph(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph.forward(*args)

        return run

    return compile_graph


@quiet
def test_compiled_blocks_below_a_model_level_method(counted: list[int]) -> None:
    loop = Loop("wan")
    with elision.apply(loop, "uniform", **MODEL):
        want = loop(steps=6)
    for block in loop.model.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend(counted))  # type: ignore[union-attr, operator]
    plain = loop(steps=6)
    before = snapshot(loop.model, loop.scheduler)
    counted.clear()
    with elision.apply(loop, "uniform", **MODEL):
        assert torch.allclose(loop(steps=6), want, atol=1e-5)
    assert counted
    assert len(counted) % (2 * 2) == 0  # two blocks, two computed steps
    left = [key for key in changed(before, snapshot(loop.model, loop.scheduler)) if not key.endswith("_step_index")]
    assert left == []
    assert torch.allclose(loop(steps=6), plain, atol=1e-5)


@quiet
def test_compiled_blocks_below_block_level_methods(counted: list[int]) -> None:
    """The stack taps the blocks themselves, so a compiled block is below it."""
    loop = Loop("wan")
    with elision.apply(loop, "uniform", site="stack", interval=3):
        want = loop(steps=6)
    for block in loop.model.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend(counted))  # type: ignore[union-attr, operator]
    with elision.apply(loop, "uniform", site="stack", interval=3) as run:
        assert torch.allclose(loop(steps=6), want, atol=1e-5)
    assert counted
    assert run.report().strip() == "CrrCrr"  # type: ignore[attr-defined]


@pytest.mark.parametrize("where", ["denoiser", "block", "wrapped"])
def test_branches_inside_a_compiled_region_are_refused(where: str) -> None:
    loop = Loop("wan")
    if where == "denoiser":
        loop.model.compile(backend="eager")
    elif where == "block":
        loop.model.blocks[1].compile(backend="eager")  # type: ignore[index, union-attr, operator]
    else:
        loop.transformer = torch.compile(loop.model, backend="eager")  # type: ignore[attr-defined]
    before = snapshot(loop.model, loop.scheduler, loop)
    with pytest.raises(UnsupportedTarget, match=r"compiled as a whole.*run\.compile\(\)"):
        elision.apply(loop, "uniform", site="branch")
    assert changed(before, snapshot(loop.model, loop.scheduler, loop)) == []


@quiet
@pytest.mark.parametrize("how", ["method", "wrapper"])
def test_a_compiled_denoiser_takes_a_model_level_method(how: str, counted: list[int]) -> None:
    loop = Loop("wan")
    plain = loop(steps=6)
    with elision.apply(loop, "uniform", **MODEL):
        want = loop(steps=6)
    if how == "method":
        loop.model.compile(backend=backend(counted))
    else:
        loop.transformer = torch.compile(loop.model, backend=backend(counted))  # type: ignore[attr-defined]
    loop(steps=6)
    before = snapshot(loop.model, loop.scheduler)
    counted.clear()
    with elision.apply(loop, "uniform", **MODEL) as run:
        assert torch.allclose(loop(steps=6), want, atol=1e-5)
    assert counted
    report = run.report()
    assert report.strip() == "CrrCrr"  # type: ignore[attr-defined]
    assert report.calls_elided == 4  # type: ignore[attr-defined]
    assert not any("no adapter" in note for note in report.notes)
    left = [key for key in changed(before, snapshot(loop.model, loop.scheduler)) if "_step_index" not in key]
    assert [key for key in left if "_diffusers_hook" not in key] == []
    assert torch.allclose(loop(steps=6), plain, atol=1e-5)


@quiet
@pytest.mark.parametrize("where", ["denoiser", "block", "leaf"])
def test_compiling_after_apply_is_noticed_in_the_next_run(where: str) -> None:
    loop = Loop("wan")
    options = {"site": "stack"} if where == "block" else {} if where == "leaf" else {"site": "model"}
    plain = loop(steps=4)
    run = elision.apply(loop, "uniform", **options)
    loop(steps=4)
    block: Any = loop.model.blocks[0]  # type: ignore[index, union-attr]
    displaced = {"denoiser": loop.model, "block": block, "leaf": block.ffn}[where]
    displaced.compile(backend="eager")
    with pytest.raises(TapDisplaced, match=type(displaced).__name__):
        loop(steps=4)
    run.remove()
    assert is_compiled(displaced)  # the user's compile() stays
    assert torch.allclose(loop(steps=4), plain, atol=1e-5)


@quiet
def test_a_displaced_tap_on_a_bare_denoiser_is_noticed_at_the_end() -> None:
    """No scheduler tells, and the tap is never reached: `remove` is the last moment to say so."""
    loop = Loop("wan")
    run = elision.apply(loop.model, "uniform", site="model", steps=4)
    loop.model.compile(backend="eager")
    loop(steps=4)
    with pytest.warns(elision.ElisionWarning, match=r"WanTransformer3DModel was replaced.*compile"):
        run.remove()


@quiet
@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("wan", "uniform", {"site": "model"}),
        ("wan", "uniform", {"site": "stack"}),
        ("wan", "taylorseer", {"interval": 3, "first_enhance": 1}),
        ("flux", "taylorseer", {"interval": 3, "first_enhance": 1}),
        ("flux", "first_block", {"threshold": 1.5}),
    ],
)
def test_run_compile_works_and_is_undone(kind: str, method: str, options: dict[str, Any], counted: list[int]) -> None:
    loop = Loop(kind)
    plain = loop(steps=6)
    with elision.apply(loop, method, **options) as run:
        want = loop(steps=6)
    strip = run.report().strip()  # type: ignore[attr-defined]
    before = snapshot(loop.model, loop.scheduler)
    run = elision.apply(loop, method, **options)
    run.compile(backend=backend(counted))  # type: ignore[attr-defined]
    assert torch.allclose(loop(steps=6), want, atol=1e-4)
    assert counted
    counted.clear()
    assert torch.allclose(loop(steps=6), want, atol=1e-4)
    assert counted
    assert run.report().strip() == strip  # type: ignore[attr-defined]
    run.remove()
    left = [key for key in changed(before, snapshot(loop.model, loop.scheduler)) if not key.endswith("_step_index")]
    assert left == []
    counted.clear()
    assert torch.equal(loop(steps=6), plain)
    assert not counted


def test_contract_module_call_prefers_the_instance_attribute() -> None:
    module = Double()
    module.__dict__["_compiled_call_impl"] = lambda x: x + 40
    assert module(torch.tensor(2)) == 42
    assert module.forward(torch.tensor(2)) == 4
    assert nn.Sequential(module)(torch.tensor(2)) == 42


def test_contract_deepcopy_and_state_drop_it() -> None:
    module = Double()
    module.__dict__["_compiled_call_impl"] = lambda x: x + 40
    assert "_compiled_call_impl" not in module.__getstate__()
    assert copy.deepcopy(module)(torch.tensor(2)) == 4
    assert module(torch.tensor(2)) == 42


def test_contract_module_compile_writes_it() -> None:
    module = Double()
    module.compile(backend="eager")
    assert callable(module.__dict__["_compiled_call_impl"])
    assert is_compiled(module)


def test_contract_accelerate_leaves_it() -> None:
    module = Double()
    tap = tap_call(module, lambda inner, args, kwargs: inner(*args, **kwargs) + 1)
    add_hook_to_module(module, Noting())
    assert module(torch.tensor(2)) == 5
    remove_hook_from_module(module)
    assert module(torch.tensor(2)) == 5
    assert tap.in_place


def test_contract_cache_context() -> None:
    from diffusers.hooks.hooks import CacheContext

    names = [f.name for f in dataclasses.fields(CacheContext)]
    assert names == ["name", "step_index", "num_inference_steps", "timestep", "sigma"]
    with_contexts = {kind for kind in KINDS if hasattr(KINDS[kind].build(), "cache_context")}
    assert with_contexts >= {"flux", "wan", "wan_i2v"}
    signature = inspect.signature(Loop("flux").model.cache_context)  # type: ignore[arg-type, union-attr]
    assert list(signature.parameters) == ["name", "kwargs"]


@pytest.mark.parametrize(
    "make",
    [FlowMatchEulerDiscreteScheduler, DDIMScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler],
)
def test_contract_schedulers(make: Callable[[], Any]) -> None:
    scheduler = make()
    scheduler.set_timesteps(4)
    assert torch.as_tensor(scheduler.timesteps).ndim == 1
    assert callable(scheduler.step)
    assert "set_timesteps" not in vars(scheduler)
    assert "step" not in vars(scheduler)
    sigmas = getattr(scheduler, "sigmas", None)
    assert sigmas is None or len(sigmas) in (len(scheduler.timesteps), len(scheduler.timesteps) + 1)
    if make is not DDIMScheduler:
        assert scheduler.begin_index is None
        scheduler.set_begin_index(2)
        assert scheduler.begin_index == 2
        scheduler.set_timesteps(4)
        assert scheduler.begin_index is None
