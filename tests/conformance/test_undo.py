"""`remove()` restores a target exactly, in any order, also after an exception; targets never see each other."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import nn

import elision
from elision.errors import Closed, Conflict, ElisionError
from tests.conformance.settings import ACTIVE, STEPS, Options, apply, cached, cases, home
from tests.models import Loop, changed, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning"),
    pytest.mark.usefixtures("no_flops"),
]


def parts(loop: Loop) -> list[Any]:
    """Everything of a pipeline that could be touched."""
    return [loop.model, loop.scheduler, loop]


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE))
def test_nothing_is_left_behind(method: str, options: Options, kind: str) -> None:
    loop = Loop(kind)
    plain = loop(steps=STEPS, mode="sequential")  # also lets diffusers leave what it leaves by itself
    modules, before = dict(loop.model.named_modules()), snapshot(*parts(loop))
    classes = {type(part): dict(vars(type(part))) for part in (*loop.model.modules(), loop.scheduler)}
    run = apply(loop, method, options)
    assert changed(before, snapshot(*parts(loop)))  # it does touch something
    cached_out = loop(steps=STEPS, mode="sequential", name=run.step)
    run.remove()
    assert not torch.equal(cached_out, plain)
    again = loop(steps=STEPS, mode="sequential")
    assert torch.equal(again, plain)
    left = changed(before, snapshot(*parts(loop)))
    assert [key for key in left if not key.endswith(("called", "_step_index"))] == []
    assert dict(loop.model.named_modules()) == modules
    assert all(dict(vars(cls)) == was for cls, was in classes.items())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, ("flux", "wan_i2v")))
def test_undo_after_an_exception_in_the_body(method: str, options: Options, kind: str, steps: int) -> None:
    loop = Loop(kind)
    plain = loop(steps=STEPS)
    before = snapshot(*parts(loop))

    def each(n: int) -> None:
        if n == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), apply(loop, method, options):
        loop(steps=STEPS, each=each)
    left = changed(before, snapshot(*parts(loop)))
    assert [key for key in left if not key.endswith(("called", "_step_index"))] == []
    assert torch.equal(loop(steps=STEPS), plain)


def test_a_scheduler_keeps_its_dict_keys_in_order_of_the_class() -> None:
    for make in (FlowMatchEulerDiscreteScheduler, DDIMScheduler, UniPCMultistepScheduler):
        loop = Loop("unet", make())
        before = snapshot(loop.scheduler)
        apply(loop, "stale", {}).remove()
        assert changed(before, snapshot(loop.scheduler)) == []


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("method", sorted(ACTIVE))
def test_two_pipelines_that_share_a_scheduler(method: str, first_out: int) -> None:
    """Sessions come off in any order, and the scheduler is clean when the last one is gone."""
    options = ACTIVE[method][0]
    scheduler = FlowMatchEulerDiscreteScheduler()
    loops = [Loop(home(method), scheduler, seed=seed) for seed in (0, 1)]
    plain = [loop(steps=STEPS) for loop in loops]
    alone = [cached(loop, method, options)[0] for loop in loops]
    before = snapshot(*(part for loop in loops for part in parts(loop)))
    runs = [apply(loop, method, options) for loop in loops]
    assert torch.equal(loops[0](steps=STEPS), alone[0])
    assert torch.equal(loops[1](steps=STEPS), alone[1])
    assert [run.report().calls for run in runs] == [STEPS, STEPS]
    other = 1 - first_out
    runs[first_out].remove()
    assert torch.equal(loops[first_out](steps=STEPS), plain[first_out])
    assert torch.equal(loops[other](steps=STEPS), alone[other])
    runs[other].remove()
    left = changed(before, snapshot(*(part for loop in loops for part in parts(loop))))
    assert [key for key in left if not key.endswith(("called", "_step_index"))] == []
    assert [torch.equal(loop(steps=STEPS), want) for loop, want in zip(loops, plain, strict=True)] == [True, True]


@pytest.mark.parametrize("method", sorted(ACTIVE))
def test_two_pipelines_of_one_class_are_isolated(method: str) -> None:
    one, two = Loop(home(method), seed=0), Loop(home(method), seed=0)
    plain = two(steps=STEPS)
    before = snapshot(*parts(two))
    with apply(one, method, ACTIVE[method][0]):
        first = one(steps=STEPS)
        assert torch.equal(two(steps=STEPS), plain)
        left = changed(before, snapshot(*parts(two)))
        assert [key for key in left if not key.endswith(("called", "_step_index"))] == []
        with apply(two, method, ACTIVE[method][-1]):
            assert torch.equal(one(steps=STEPS), first)
    assert not torch.equal(first, plain)


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, ("flux", "unet", "pixart")))
def test_a_deep_copy_is_a_plain_model(method: str, options: Options, kind: str) -> None:
    loop = Loop(kind)
    plain = loop(steps=STEPS)
    want, _ = cached(loop, method, options)
    with apply(loop, method, options) as run:
        loop(steps=STEPS)
        twin = copy.deepcopy(loop)
        calls = run.report().calls
        with torch.no_grad():
            for p in twin.model.parameters():
                p.add_(0)  # its own storage
        assert torch.equal(twin(steps=STEPS), plain)
        assert run.report().calls == calls
        assert all(a is not b for a, b in zip(twin.model.parameters(), loop.model.parameters(), strict=True))
        assert torch.equal(loop(steps=STEPS), want)
    assert torch.equal(twin(steps=STEPS), plain)
    assert torch.equal(loop(steps=STEPS), plain)
    assert torch.equal(cached(twin, method, options)[0], want)


def test_a_deep_copy_runs_its_own_weights() -> None:
    loop = Loop("flux")
    with apply(loop, "uniform", {"interval": 2}):
        loop(steps=2)
        twin = copy.deepcopy(loop)
        with torch.no_grad():
            twin.model.proj_out.weight.mul_(2)  # type: ignore[union-attr, operator]
        assert not torch.equal(twin(steps=2), loop(steps=2))
        assert twin.scheduler.step.__self__ is twin.scheduler
        assert twin.model.cache_context.__self__ is twin.model  # type: ignore[union-attr]


def test_applying_twice_is_a_conflict_that_patches_nothing() -> None:
    loop = Loop("flux")
    with apply(loop, "uniform", {"interval": 3}) as run:
        want = loop(steps=STEPS)
        before = snapshot(*parts(loop))
        for target in (loop, loop.model):
            with pytest.raises(Conflict, match=r"FluxTransformer2DModel already has uniform applied.*remove\(\)"):
                elision.apply(target, "easycache", steps=STEPS)
            assert changed(before, snapshot(*parts(loop))) == []
        assert torch.equal(loop(steps=STEPS), want)
        assert run.report().run_count == 2
    with apply(loop, "easycache", {}):  # free again
        pass


def test_a_refusal_for_the_second_denoiser_frees_the_first() -> None:
    loop = Loop("wan")
    loop.transformer_2 = Loop("wan", seed=1).model  # type: ignore[attr-defined]
    before = snapshot(loop.model, loop.transformer_2, loop.scheduler)  # type: ignore[attr-defined]
    with elision.apply(loop.transformer_2, "stale"):  # type: ignore[attr-defined]
        with pytest.raises(Conflict):
            elision.apply(loop, "uniform")
        with elision.apply(loop.model, "stale"):
            pass
    assert changed(before, snapshot(loop.model, loop.transformer_2, loop.scheduler)) == []  # type: ignore[attr-defined]


def test_closed_after_remove() -> None:
    loop = Loop("flux")
    run = apply(loop, "uniform", {"interval": 2})
    loop(steps=4)
    live = run.report()
    run.remove()
    run.remove()
    for use in (run.reset, run.compile, run.__enter__, lambda: run.step("cond").__enter__()):
        with pytest.raises(Closed, match="remove"):
            use()
    report = run.report()
    assert report.to_dict() == live.to_dict()
    assert "removed" in repr(run)


def test_dropping_the_handle_keeps_the_method_on() -> None:
    loop = Loop("flux")
    plain = loop(steps=4)
    apply(loop, "uniform", {"interval": 4})
    assert not torch.equal(loop(steps=4), plain)
    with pytest.raises(Conflict):
        apply(loop, "uniform", {})


@pytest.mark.parametrize(
    "target",
    [None, 3, "flux", object(), FlowMatchEulerDiscreteScheduler(), nn.Linear, SimpleNamespace(transformer=None)],
)
def test_targets_of_an_unsupported_kind(target: object) -> None:
    with pytest.raises(elision.errors.UnsupportedTarget, match="denoiser") as caught:
        elision.apply(target, "uniform")
    assert isinstance(caught.value, (ElisionError, TypeError))


def test_a_module_without_arguments_is_no_denoiser() -> None:
    class Nothing(nn.Module):
        def forward(self) -> int:
            return 1

    with pytest.raises(elision.errors.UnsupportedTarget, match="takes no argument"):
        elision.apply(Nothing(), "stale")
