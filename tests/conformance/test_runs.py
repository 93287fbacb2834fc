"""Runs do not leak into each other, whatever happens between them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from elision.denoise.engine import DenoiseApplied
from elision.errors import ElisionWarning, UnsupportedTarget
from tests.conformance.settings import (
    ACTIVE,
    DECIDE_PER_BRANCH,
    STEPS,
    Options,
    apply,
    cached,
    cases,
    home,
    steers,
)
from tests.models import Loop

pytestmark = [
    pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning"),
    pytest.mark.usefixtures("no_flops"),
]
KEPT = ("dit", "flux", "unet", "wan_i2v")  # one of every shape of latent, prediction and adapter


class Boom(Exception):
    """What the tests throw."""


def boom_at(step: int) -> object:
    def each(n: int) -> None:
        if n == step:
            raise Boom

    return each


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE))
def test_two_runs_equal_two_fresh_ones(method: str, options: Options, kind: str) -> None:
    loop = Loop(kind)
    with apply(loop, method, options) as run:
        together = [loop(seed=s, steps=STEPS, mode="sequential", name=run.step) for s in (1, 2, 1)]
    report = run.report()
    apart = [cached(loop, method, options, seed=s, mode="sequential") for s in (1, 2)]
    for out, (fresh, _) in zip(together, (*apart, apart[0]), strict=True):
        assert torch.equal(out, fresh)
    assert report.run_count == 3
    assert [report.strip(r) for r in report.runs] == [report.strip()] + [fresh.strip() for _, fresh in reversed(apart)]


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, KEPT))
def test_reset_forgets_everything(method: str, options: Options, kind: str) -> None:
    loop = Loop(kind)
    fresh, once = cached(loop, method, options, mode="sequential")
    with apply(loop, method, options) as run:
        loop(seed=5, steps=STEPS - ("gammas" not in options), mode="sequential", name=run.step)
        run.reset()
        zero = run.report()
        assert (zero.run_count, zero.steps, zero.calls, zero.bytes_held, zero.bytes_peak) == (0, 0, 0, 0, 0)
        assert zero.seconds.total == 0
        assert zero.outputs_computed == zero.outputs_stood_in == 0
        assert zero.runs == []
        out = loop(steps=STEPS, mode="sequential", name=run.step)
    report = run.report()
    assert torch.equal(out, fresh)
    assert (report.strip(), report.calls, report.run_count) == (once.strip(), once.calls, 1)


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, KEPT))
def test_reset_in_the_middle_of_a_run(method: str, options: Options, kind: str) -> None:
    """The rest of the run goes on with the right step numbers, and the next run is as fresh as ever."""
    loop = Loop(kind)
    fresh, _ = cached(loop, method, options, mode="sequential")
    with apply(loop, method, options) as run:
        loop(steps=STEPS, mode="sequential", name=run.step, each=lambda n: run.reset() if n == 4 else None)
        rest = run.report()
        assert [s.n for s in rest.runs[0].steps] == list(range(4, STEPS))
        assert rest.runs[0].total == STEPS
        assert rest.runs[0].states()[0] == "computed"
        assert torch.equal(loop(steps=STEPS, mode="sequential", name=run.step), fresh)


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, KEPT))
def test_size_and_batch_change_between_calls(method: str, options: Options, kind: str) -> None:
    loop = Loop(kind)
    fewer = STEPS if "gammas" in options else 5  # gammas are for one number of steps
    hows = [{"size": 4}, {"size": 8 if kind == "unet" else 6}, {"size": 4, "batch": 3, "steps": fewer}, {"size": 4}]
    with apply(loop, method, options) as run:
        together = [loop(**{"steps": STEPS, "mode": "sequential", "name": run.step, **how}) for how in hows]
    apart = [cached(loop, method, options, mode="sequential", **how)[0] for how in hows[:3]]
    for out, fresh in zip(together, (*apart, apart[0]), strict=True):
        assert torch.equal(out, fresh)


@pytest.mark.parametrize("method", sorted(ACTIVE))
def test_a_row_of_a_batch_is_a_row(method: str) -> None:
    """Methods that decide by a rule on the step treat every row of a batch like a single sample."""
    options = next(o for o in ACTIVE[method])
    if "threshold" in options:
        options = {**options, "threshold": 1e9}
    if "eta" in options:
        options = {**options, "eta": 2}  # everything is edited, whatever the pictures are
    loop = Loop(home(method))
    pair, _ = cached(loop, method, options, batch=2)
    single, report = cached(loop, method, options, batch=1)
    assert report.outputs_stood_in
    # the noise of a batch of one is the first half of the noise of two
    assert torch.allclose(pair[:1], single, atol=1e-5)


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE))
def test_sequential_guidance_equals_batched(method: str, options: Options, kind: str) -> None:
    if method in DECIDE_PER_BRANCH:  # the decisions differ by design, so compare where they are forced
        options = {**options, "threshold": 1e9}
    if kind == "unet" and method == "easycache":
        options = {**options, "threshold": 1e9}  # a class without adapter does not tell which rows are conditional
    loop = Loop(kind)
    sequential, one = cached(loop, method, options, mode="sequential", batch=2)
    batched, two = cached(loop, method, options, mode="batched", batch=2)
    assert one.strip() == two.strip()
    assert one.calls == 2 * two.calls
    assert torch.allclose(sequential, batched, atol=2e-4 * sequential.abs().max())


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE))
def test_order_of_guidance_calls_is_free(method: str, options: Options, kind: str) -> None:
    loop = Loop(kind)
    first, one = cached(loop, method, options, mode="sequential")
    second, two = cached(loop, method, options, mode="sequential", order=("uncond", "cond"))
    assert one.strip() == two.strip()
    assert one.reasons() == two.reasons()
    assert torch.equal(first, second)


@pytest.mark.parametrize("where", [0, 1, 3, STEPS - 1])
@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, ("flux",)))
def test_exception_between_steps_then_a_fresh_run(method: str, options: Options, kind: str, where: int) -> None:
    loop = Loop(kind)
    fresh, once = cached(loop, method, options, mode="sequential")
    with apply(loop, method, options) as run:
        with pytest.raises(Boom):
            loop(seed=9, steps=STEPS, mode="sequential", name=run.step, each=boom_at(where))
        out = loop(steps=STEPS, mode="sequential", name=run.step)
    assert torch.equal(out, fresh)
    assert run.report().strip() == once.strip()


@pytest.fixture
def broken(request: pytest.FixtureRequest) -> Iterator[tuple[Loop, dict[str, int]]]:
    """A loop whose first block raises when its counter says so."""
    parameters = getattr(request.node, "callspec", None)
    loop = Loop(home(parameters.params.get("method", "")) if parameters else "flux")
    state = {"at": -1, "seen": 0}

    def hook(module: torch.nn.Module, args: object) -> None:
        state["seen"] += 1
        if state["seen"] == state["at"]:
            raise Boom

    handle = loop.model.transformer_blocks[0].ff.net[0].register_forward_pre_hook(hook)  # type: ignore[index, union-attr]
    yield loop, state
    handle.remove()


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, ("flux",)))
@pytest.mark.parametrize("bare", [False, True])
def test_exception_inside_the_denoiser(
    method: str, options: Options, kind: str, bare: bool, broken: tuple[Loop, dict[str, int]]
) -> None:
    """At the first, second and fourth call that reaches the block, with and without a scheduler."""
    loop, state = broken
    if bare and steers(method, options):
        with pytest.raises(UnsupportedTarget, match="bare denoiser has no scheduler"):
            _applied(loop, method, options, bare)
        return
    with _applied(loop, method, options, bare) as run:
        fresh = loop(steps=STEPS, mode="sequential", name=run.step)
    for at in (1, 2, 4):
        with _applied(loop, method, options, bare) as run:
            state.update(at=at, seen=0)
            with pytest.raises(Boom):
                loop(seed=9, steps=STEPS, mode="sequential", name=run.step)
            state.update(at=-1)
            assert torch.equal(loop(steps=STEPS, mode="sequential", name=run.step), fresh), at


@pytest.mark.parametrize("bare", [False, True])
def test_a_call_that_raised_can_be_tried_again(bare: bool, broken: tuple[Loop, dict[str, int]]) -> None:
    """Retrying after, say, running out of memory is no second branch: the state starts anew at this step."""
    loop, state = broken
    real = loop.call

    def retrying(*args: object, **kwargs: object) -> torch.Tensor:
        try:
            return real(*args, **kwargs)  # type: ignore[arg-type]
        except Boom:
            return real(*args, **kwargs)  # type: ignore[arg-type]

    loop.call = retrying  # type: ignore[method-assign]
    with _applied(loop, "uniform", {"interval": 3}, bare) as run:
        state.update(at=3, seen=0)  # the third computed call: step 6
        out = loop(steps=STEPS)
    assert torch.isfinite(out).all()
    assert run.report().outputs_stood_in > 0


def _applied(loop: Loop, method: str, options: Options, bare: bool) -> DenoiseApplied:
    return apply(loop, method, options, bare, **({"steps": STEPS} if bare else {}))


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, ("dit", "flux", "unet")))
@pytest.mark.parametrize("bare", [False, True])
def test_one_step_twice(method: str, options: Options, kind: str, bare: bool) -> None:
    loop = Loop(kind)
    plain = [loop(seed=s, steps=1) for s in (1, 2)]
    if bare and steers(method, options):
        return  # refused, as the test above shows
    applied = apply(loop, method, options, bare, **({"steps": 1} if bare else {}))
    with applied:
        out = [loop(seed=s, steps=1) for s in (1, 2)]
    for a, b in zip(plain, out, strict=True):
        assert torch.equal(a, b)
    assert applied.report().run_count == 2


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, ("flux", "pixart")))
def test_remove_in_the_middle_of_a_run(method: str, options: Options, kind: str) -> None:
    """The rest of the run is computed as if nothing had ever been applied."""
    loop = Loop(kind)
    run = apply(loop, method, options)
    seen: list[int] = []

    def each(n: int) -> None:
        if n == 3:
            run.remove()
        if n >= 3:
            seen.append(loop.called)

    loop(steps=STEPS, each=each)
    report = run.report()
    assert [s.n for s in report.runs[0].steps] == [0, 1, 2]
    assert report.calls == 3
    assert len(seen) == STEPS - 3


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, ("flux", "pixart", "unet", "kontext")))
def test_written_into_outputs_do_not_reach_the_cache(method: str, options: Options, kind: str) -> None:
    """What a denoiser returns belongs to the caller, who may write into it."""
    loop = Loop(kind)
    want, _ = cached(loop, method, options)
    real = loop.call

    def scribble(*args: object, **kwargs: object) -> torch.Tensor:
        out = real(*args, **kwargs)  # type: ignore[arg-type]
        copy = out.clone()
        out.fill_(float("nan"))
        return copy

    loop.call = scribble  # type: ignore[method-assign, assignment]
    got, _ = cached(loop, method, options)
    assert torch.equal(want, got)


@pytest.mark.parametrize(
    ("method", "options"), [(method, options) for method, several in ACTIVE.items() for options in several]
)
def test_written_into_inputs_do_not_reach_the_cache(method: str, options: Options) -> None:
    """Loops that update the latent in place change what a method saw, but not what it keeps."""
    loop = Loop(home(method))
    want, _ = cached(loop, method, options)
    real = loop.call

    def on_a_copy(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        scratch = x.clone()
        out = real(scratch, *args, **kwargs)  # type: ignore[arg-type]
        scratch.fill_(float("nan"))
        return out

    loop.call = on_a_copy  # type: ignore[method-assign, assignment]
    got, _ = cached(loop, method, options)
    assert torch.equal(want, got)


def test_a_run_that_broke_off_does_not_warn_of_idleness() -> None:
    """It had no chance to elide; a warning (an error under -W error) would hide what really happened."""
    loop = Loop("flux")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", ElisionWarning)
        with pytest.raises(Boom), apply(loop, "easycache", {"threshold": 0.0}) as run:
            loop(steps=STEPS, each=boom_at(2))
        assert run.report().runs[0].total == STEPS
