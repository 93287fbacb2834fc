"""Taps: laws of the chain, and life together with accelerate, torch.compile and diffusers' own hooks."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import elision
from elision.hooks.taps import Tap, tap_call, tap_method
from tests.hooks.doubles import MODEL, Double, Noting, quiet
from tests.models import Loop

BRANCHES = {"interval": 3}


class Thing:
    """An object with a method to tap."""

    def double(self, x: int, *, plus: int = 0) -> int:
        """Twice x."""
        return 2 * x + plus


def noting(log: list[str], name: str) -> Callable[..., Any]:
    def wrap(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        log.append(name)
        return inner(*args, **kwargs)

    return wrap


@pytest.mark.parametrize("what", ["call", "method"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_order_of_install_and_remove(what: str, data: st.DataObject) -> None:
    """Against a list: every living tap runs once per call, oldest outermost; nothing is left at the end."""
    owner: Any = Double() if what == "call" else Thing()
    before = dict(vars(owner))
    alive: list[tuple[str, Tap]] = []
    log: list[str] = []
    for step in range(data.draw(st.integers(1, 12))):
        if alive and data.draw(st.booleans()):
            _, gone = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
            gone.remove()
            gone.remove()  # twice is harmless
            assert not gone.in_place
        else:
            wrap = noting(log, str(step))
            made = tap_call(owner, wrap) if what == "call" else tap_method(owner, "double", wrap)
            alive.append((str(step), made))
        log.clear()
        assert (owner(torch.tensor(3)) if what == "call" else owner.double(3)) == 6
        assert log == [name for name, _ in alive]
        assert all(tap.in_place and tap.owner is owner for _, tap in alive)
        assert bool(alive) == (dict(vars(owner)) != before)
    for _, tap in data.draw(st.permutations(alive)):
        tap.remove()
    assert dict(vars(owner)) == before


def test_a_wrap_may_change_and_skip_the_call() -> None:
    module = Double()
    outer = tap_call(module, lambda inner, args, kwargs: inner(args[0] + 1, **kwargs))
    inner = tap_call(module, lambda inner, args, kwargs: args[0])
    assert module(torch.tensor(3)) == 4
    inner.remove()
    assert module(torch.tensor(3)) == 8
    outer.remove()
    assert module(torch.tensor(3)) == 6


def test_one_function_may_be_tapped_twice() -> None:
    log: list[str] = []
    wrap = noting(log, "w")
    module = Double()
    first, second = tap_call(module, wrap), tap_call(module, wrap)
    module(torch.tensor(1))
    assert log == ["w", "w"]
    first.remove()
    first.remove()
    log.clear()
    module(torch.tensor(1))
    assert log == ["w"]
    assert second.in_place
    second.remove()
    assert "_compiled_call_impl" not in vars(module)


def test_a_tap_runs_outside_hooks_and_replaced_forwards() -> None:
    log: list[str] = []
    module = Double()
    module.register_forward_pre_hook(lambda *_: log.append("hook"))
    module.forward = lambda x: log.append("forward") or x  # type: ignore[method-assign, func-returns-value]
    tap_call(module, noting(log, "tap"))
    module(torch.tensor(1))
    assert log == ["tap", "hook", "forward"]


def test_a_tapped_method_keeps_its_signature_and_name() -> None:
    thing = Thing()
    tap = tap_method(thing, "double", noting([], ""))
    assert str(inspect.signature(thing.double)) == "(x: 'int', *, plus: 'int' = 0) -> 'int'"
    assert thing.double.__name__ == "double"
    assert thing.double.__doc__ == "Twice x."
    assert thing.double(1, plus=1) == 3
    tap.remove()
    assert vars(thing) == {}


def test_a_tap_on_what_somebody_wrapped_before_restores_the_wrapping() -> None:
    thing = Thing()
    mine = lambda x: 100  # noqa: E731
    thing.double = mine  # type: ignore[method-assign, assignment]
    tap = tap_method(thing, "double", noting([], ""))
    assert thing.double(1) == 100
    tap.remove()
    assert thing.double is mine


def test_a_tap_that_somebody_wrapped_later_becomes_a_pass_through() -> None:
    log: list[str] = []
    module = Double()
    tap = tap_call(module, noting(log, "tap"))
    ours = module.__dict__["_compiled_call_impl"]
    theirs = lambda *args: ours(*args) + 1  # noqa: E731
    module.__dict__["_compiled_call_impl"] = theirs
    assert not tap.in_place
    assert module(torch.tensor(1)) == 3
    tap.remove()
    log.clear()
    assert module(torch.tensor(1)) == 3
    assert log == []
    assert module.__dict__["_compiled_call_impl"] is theirs


def test_new_taps_after_a_displacement_are_in_place() -> None:
    log: list[str] = []
    module = Double()
    lost = tap_call(module, noting(log, "lost"))
    module.__dict__["_compiled_call_impl"] = module._call_impl
    fresh = tap_call(module, noting(log, "fresh"))
    module(torch.tensor(1))
    assert log == ["fresh"]
    assert (lost.in_place, fresh.in_place) == (False, True)
    lost.remove()
    fresh.remove()
    assert module.__dict__["_compiled_call_impl"] == module._call_impl


def test_copies_are_untapped_and_their_own() -> None:
    log: list[str] = []
    module, thing, scheduler = Double(), Thing(), FlowMatchEulerDiscreteScheduler()
    tap_call(module, noting(log, "m"))
    tap_method(thing, "double", noting(log, "t"))
    tap_method(scheduler, "set_timesteps", noting(log, "s"))
    module_, thing_, scheduler_ = copy.deepcopy((module, thing, scheduler))
    assert module_(torch.tensor(2)) == 4
    assert copy.copy(module)(torch.tensor(2)) == 4
    assert thing_.double(2) == 4
    scheduler_.set_timesteps(3)
    assert len(scheduler_.timesteps) == 3
    assert len(scheduler.timesteps) == 1000
    assert log == []


def test_a_tapped_owner_is_not_kept_alive() -> None:
    module = Double()
    tap_call(module, noting([], "m"))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


@quiet
@pytest.mark.parametrize("options", [BRANCHES, MODEL])
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_hooks_live_on(options: dict[str, Any], when: str) -> None:
    """Hooks added before or after apply both run where the module runs, and can be removed in any order."""
    loop = Loop("flux")
    plain = loop(steps=6)
    with elision.apply(loop, "uniform", **options):
        want = loop(steps=6)
    hooks = [Noting(), Noting()]
    owners = [loop.model, loop.model.transformer_blocks[0].ff]  # type: ignore[index, union-attr]
    if when == "before":
        for owner, hook in zip(owners, hooks, strict=True):
            add_hook_to_module(owner, hook)
    run = elision.apply(loop, "uniform", **options)
    if when == "after":
        for owner, hook in zip(owners, hooks, strict=True):
            add_hook_to_module(owner, hook)
    assert torch.equal(loop(steps=6), want)
    computed = run.report().strip().count("C")  # type: ignore[attr-defined]
    assert computed == 2
    assert [hook.calls for hook in hooks] == ([2, 2] if options is MODEL else [6, 2])
    assert run.report().flops_computed  # type: ignore[attr-defined]
    run.remove()
    assert torch.equal(loop(steps=6), plain)
    assert hooks[0].calls == (2 if options is MODEL else 6) + 6
    for owner in owners:
        remove_hook_from_module(owner)
    assert torch.equal(loop(steps=6), plain)


@quiet
def test_weights_on_demand_stay_off_when_a_block_is_skipped() -> None:
    """An offloading hook brings weights in before a module runs; a skipped one must not be brought in."""

    class Lazy(Noting):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            module.to(torch.float32)
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            module.to(torch.bfloat16)
            return output

    loop = Loop("flux")
    with elision.apply(loop, "uniform", site="stack", interval=3):
        want = loop(steps=6)
    hooks = []
    for block in loop.model.transformer_blocks:  # type: ignore[union-attr]
        hooks.append(Lazy())
        add_hook_to_module(block, hooks[-1])
    with elision.apply(loop, "uniform", site="stack", interval=3):
        out = loop(steps=6)
    assert [hook.calls for hook in hooks] == [2, 2]
    assert torch.allclose(out, want, atol=0.2)  # weights went through bfloat16 once


@quiet
def test_diffusers_own_cache_next_to_ours_comes_off_cleanly() -> None:
    from diffusers.hooks import HookRegistry

    loop = Loop("flux")
    loop(steps=2)
    registry = HookRegistry.check_if_exists_or_initialize(loop.model)
    with elision.apply(loop, "uniform", **BRANCHES):
        loop(steps=6)
        assert loop.model.__dict__["_diffusers_hook"] is registry
    assert registry.hooks == {}
