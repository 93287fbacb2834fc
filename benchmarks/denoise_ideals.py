"""What the computed parts of a run allow: the same loop with modules that return a ready value at all other steps.

An ideal row computes exactly what a method computes, at the same steps, and pays nothing for what it leaves out: no
taps, no decisions, no predictor. The share of its speed-up that the method reaches is what its machinery costs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

Run = Callable[[], dict[str, Any]]
Plan = Mapping[str, set[int]]  # steps at which each module is computed, by its path; all others are always computed


def build(double: int = 4, single: int = 8, heads: int = 8) -> FluxTransformer2DModel:
    """The benchmark model: 12 blocks of width 64 * heads, random weights."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    return model.eval()


class Bench:
    """A pipeline in miniature: an Euler loop of one call per step.

    Attributes:
        given: arguments of every call but the latent and the time.
        skip: steps that repeat the last output without a call.
        each: told the number of the step before every step.
    """

    def __init__(self, model: nn.Module, side: int = 16, text: int = 64) -> None:
        self.transformer, self.scheduler = model, FlowMatchEulerDiscreteScheduler()
        g = torch.Generator().manual_seed(1)
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(side).float(), torch.arange(side).float())
        self.given: dict[str, Tensor] = {
            "encoder_hidden_states": torch.randn(1, text, 128, generator=g),
            "pooled_projections": torch.randn(1, 64, generator=g),
            "img_ids": places,
            "txt_ids": torch.zeros(text, 3),
        }
        self.tokens = side * side
        self.skip: set[int] = set()
        self.each: Callable[[int], None] = lambda n: None

    @torch.no_grad()
    def __call__(self, steps: int) -> Tensor:
        """Sample with `steps` steps."""
        x = torch.randn(1, self.tokens, 64, generator=torch.Generator().manual_seed(2))
        self.scheduler.set_timesteps(sigmas=[1 - n / steps for n in range(steps)])
        v = x
        for n, t in enumerate(self.scheduler.timesteps):
            self.each(n)
            if n not in self.skip:
                v = self.call(x, t)
            x = self.scheduler.step(v, t, x, return_dict=False)[0]
        return x

    def call(self, x: Tensor, t: Tensor) -> Tensor:
        """One call of the denoiser."""
        with self.transformer.cache_context("cond"):
            out: Tensor = self.transformer(x, timestep=t.expand(1) / 1000, return_dict=False, **self.given)[0]
        return out

    def timed(self, steps: int) -> dict[str, Any]:
        """A sample, and the seconds it took."""
        started = time.perf_counter()
        out = self(steps)
        return {"out": out, "seconds": time.perf_counter() - started}


class EditBench(Bench):
    """The same with the tokens of a picture that is edited behind those that are drawn, as FLUX.1 Kontext has them.

    Attributes:
        reference: those tokens [1, L, 64]. All but its first quarter is what the first `warmup` steps promise, so that
            a method which compares the two takes that quarter for edited.
    """

    def __init__(self, model: nn.Module, steps: int, warmup: int) -> None:
        super().__init__(model)
        places = self.given["img_ids"]
        self.given["img_ids"] = torch.cat([places, places + torch.tensor([1.0, 0.0, 0.0])])
        self.reference = torch.zeros(1, self.tokens, 64)
        self.reference = self._promised(steps, warmup)
        self.reference[:, : self.tokens // 4] *= -1

    def call(self, x: Tensor, t: Tensor) -> Tensor:
        """One call of the denoiser on both."""
        return super().call(torch.cat([x, self.reference], 1), t)[:, : self.tokens]

    def _promised(self, steps: int, warmup: int) -> Tensor:
        """What the velocity of step `warmup - 1` leads to."""
        seen: list[Tensor] = []
        call = self.call

        def look(x: Tensor, t: Tensor) -> Tensor:
            v = call(x, t)
            seen.append(x - t / 1000 * v)
            return v

        self.call = look  # type: ignore[method-assign]
        self(steps)
        del self.call
        return seen[warmup - 1]


class _Ready(nn.Module):
    """Runs a module, or returns what it returned last; one that only feeds another returns a tensor of no width."""

    def __init__(self, inner: nn.Module, feeder: bool) -> None:
        super().__init__()
        self.inner, self.feeder, self.on, self.value = inner, feeder, True, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.on:
            self.value = self.inner(*args, **kwargs)
            return self.value
        if self.feeder:
            x = args[0] if args else kwargs["hidden_states"]
            return x.new_empty((*x.shape[:-1], 0))
        return self.value


@contextlib.contextmanager
def _replaced(model: nn.Module, plan: Plan, feeders: Sequence[str]) -> Iterator[dict[str, _Ready]]:
    """The modules of a plan replaced by `_Ready` ones, in their places."""
    made: dict[str, _Ready] = {}
    for path in plan:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        made[path] = _Ready(owner._modules[name], path in feeders)
        owner._modules[name] = made[path]
    try:
        yield made
    finally:
        for path, ready in made.items():
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._modules[name] = ready.inner


def ideal_modules(pipe: Bench, steps: int, plan: Plan, feeders: Sequence[str] = ()) -> Run:
    """The loop in which each module of the plan is computed at its steps only."""

    def run() -> dict[str, Any]:
        with _replaced(pipe.transformer, plan, feeders) as made:

            def each(n: int) -> None:
                for path, module in made.items():
                    module.on = n in plan[path]

            pipe.each = each
            try:
                return pipe.timed(steps)
            finally:
                pipe.each = lambda n: None

    return run


def ideal_calls(pipe: Bench, steps: int, full: Sequence[int]) -> Run:
    """The loop that calls the denoiser at these steps only."""

    def run() -> dict[str, Any]:
        pipe.skip = set(range(steps)) - set(full)
        try:
            return pipe.timed(steps)
        finally:
            pipe.skip = set()

    return run


def ideal_tokens(pipe: EditBench, steps: int, states: str, live: Tensor) -> Run:
    """The loop in which a step computes all tokens (C), the `live` ones alone (m), or nothing (any other letter).

    Queries of live tokens see keys and values of all tokens, which lie ready.
    """
    held: list[tuple[Tensor, Tensor]] = []
    sdpa = functional.scaled_dot_product_attention

    def keeping(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        held.append((key.clone(), value.clone()))
        return sdpa(query, key, value, *args, **kwargs)

    def ready(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return sdpa(query, *next(turn), *args, **kwargs)

    turn = iter(held)
    full, places = pipe.call, pipe.given["img_ids"]
    with _attention(keeping), torch.no_grad():
        full(torch.zeros(1, pipe.tokens, 64), torch.tensor(500.0))

    def call(x: Tensor, t: Tensor) -> Tensor:
        nonlocal turn
        if states[at[0]] == "C":
            return full(x, t)
        turn = iter(held)
        pipe.given["img_ids"] = places[live]
        try:
            with _attention(ready):
                return x.index_copy(1, live, Bench.call(pipe, x[:, live], t))
        finally:
            pipe.given["img_ids"] = places

    at = [0]

    def run() -> dict[str, Any]:
        pipe.skip = {n for n, letter in enumerate(states) if letter not in "Cm"}
        pipe.each, pipe.call = lambda n: at.__setitem__(0, n), call  # type: ignore[method-assign]
        try:
            return pipe.timed(steps)
        finally:
            pipe.skip, pipe.each = set(), lambda n: None
            del pipe.call

    return run


@contextlib.contextmanager
def _attention(function: Callable[..., Tensor]) -> Iterator[None]:
    """Let torch's attention be this function."""
    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = function
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before
