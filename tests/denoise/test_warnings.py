"""A run that elided nothing warns with the numbers that say why; so does an interval that leaves only the warm-up."""

from __future__ import annotations

import re
import warnings

import pytest

import elision
from elision.errors import ElisionWarning
from tests.conformance.settings import ACTIVE, LIMITS, STEPS, Options, apply, cases, home
from tests.models import Loop

EXPECTED: dict[str, str] = {
    "bac": "7 interval over",
    "profilingdit": "7 interval over",
    "easycache": r"accumulated estimate was [\d.e+-]+, against threshold=0",
    "first_block": r"smallest change was [\d.e+-]+, against threshold=0",
    "teacache": r"accumulated estimate was [\d.e+-]+, against threshold=0",
    "ertacache": "6 listed step",
    "worldcache": r"4 streak over.*largest drift was 0, against threshold=1",
    "uniform": "7 interval over",
    "stale": "7 interval over",
    "taylorseer": "5 interval over",
    "random_skip": "7 drawn",
    "regione": "8 warm-up",
}


def caught(run: elision.Applied, loop: Loop, **how: object) -> list[str]:
    """The texts of the warnings of one run."""
    with warnings.catch_warnings(record=True) as rows:
        warnings.simplefilter("always")
        loop(**{"steps": STEPS, **how})  # type: ignore[arg-type]
    return [str(row.message) for row in rows if issubclass(row.category, ElisionWarning)]


@pytest.mark.parametrize("method", sorted(LIMITS))
def test_nothing_elided_warns_once_with_numbers(method: str) -> None:
    loop = Loop(home(method))
    with apply(loop, method, LIMITS[method][0]) as run:
        texts = caught(run, loop)
        assert len(texts) == 1
        assert texts[0].startswith(f"{method} elided nothing in {STEPS} steps: ")
        assert re.search(EXPECTED[method], texts[0])
        counts = [int(n) for n in re.findall(r"(\d+) [a-z]", texts[0].split(":", 1)[1].split("(")[0])]
        assert sum(counts) == STEPS
        assert len(caught(run, loop, seed=1)) == 1  # and again in every such run
    assert texts[0] in run.report().notes


def all_warm_up(method: str) -> Options | None:
    """The limit of a method that is nothing but warm-up, if it has a warm-up."""
    return next((o for o in LIMITS[method] if STEPS in (o.get("warmup_steps"), o.get("first_enhance"))), None)


@pytest.mark.parametrize("method", sorted(m for m in LIMITS if all_warm_up(m)))
def test_all_warm_up_says_warm_up(method: str) -> None:
    options = all_warm_up(method) or {}
    loop = Loop(home(method))
    with apply(loop, method, options) as run:
        (text,) = caught(run, loop)
    assert f"{STEPS} warm-up" in text


@pytest.mark.parametrize(("method", "options", "kind"), cases(ACTIVE, ("flux",)))
def test_a_run_that_elides_does_not_warn(method: str, options: Options, kind: str) -> None:
    loop = Loop(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with apply(loop, method, options) as run:
            loop(steps=STEPS, mode="sequential", name=run.step)
    assert not any("elided nothing" in note for note in run.report().notes)


def test_the_last_run_of_a_bare_denoiser_is_judged_at_the_end() -> None:
    loop = Loop("flux")
    run = elision.apply(loop.model, "easycache", threshold=0.0, steps=STEPS)
    assert caught(run, loop) == []  # nothing says that the run is over
    with pytest.warns(ElisionWarning, match=f"elided nothing in {STEPS} steps"):
        run.remove()


def test_a_new_run_judges_the_one_before() -> None:
    loop = Loop("flux")
    with elision.apply(loop.model, "easycache", threshold=0.0, warmup_steps=0, steps=STEPS) as run:
        assert caught(run, loop) == []
        assert len(caught(run, loop)) == 1
        with pytest.warns(ElisionWarning):
            run.remove()


@pytest.mark.parametrize(
    ("method", "options", "computed"),
    [
        ("uniform", {"interval": 8}, 1),
        ("uniform", {"interval": 6, "warmup_steps": 3, "site": "model"}, 3),
        ("stale", {"interval": 99}, 1),
        ("taylorseer", {"interval": 6, "first_enhance": 3}, 3),
        ("taylorseer", {"interval": 50, "first_enhance": 2, "schedule": "diffusers"}, 3),
    ],
)
def test_an_interval_that_leaves_only_the_warm_up(method: str, options: Options, computed: int) -> None:
    loop = Loop("flux")
    diffusers = options.get("schedule") == "diffusers"
    with apply(loop, method, options) as run:
        texts = caught(run, loop)
    assert run.report().strip().count("C") == computed
    if diffusers:  # its rule computes one step behind the warm-up whatever the interval
        assert texts == []
        return
    (text,) = texts
    assert f"interval={options['interval']}" in text
    assert f"{computed} warm-up steps of {STEPS}" in text
    limit = int(re.search(r"use an interval below (\d+)", text).group(1))  # type: ignore[union-attr]
    assert text in run.report().notes
    with apply(loop, method, {**options, "interval": limit - 1}) as run:  # the advice is right, and sharp
        assert caught(run, loop) == []
    assert run.report().strip().count("C") == computed + 1
    with apply(loop, method, {**options, "interval": limit}) as run:
        assert len(caught(run, loop)) == 1


def test_interval_beyond_the_warm_up_of_a_run_that_is_all_warm_up_does_not_complain_twice() -> None:
    loop = Loop("flux")
    with apply(loop, "uniform", {"interval": 99, "warmup_steps": STEPS}) as run:
        (text,) = caught(run, loop)
    assert "elided nothing" in text


def test_a_target_that_was_never_called_is_noted() -> None:
    loop = Loop("flux")
    with apply(loop, "uniform", {}) as run:
        pass
    assert run.report().notes == ["the target was never called while the method was applied"]
    assert run.report().strip() == ""
    assert "0 of 0 steps" in str(run.report())


def test_an_unknown_class_is_told_so() -> None:
    loop = Loop("unet")
    with apply(loop, "stale", {}) as run:
        run.reset()
        assert run.report().notes == ["UNet2DConditionModel has no adapter: only the site 'model' is available on it"]
        loop(steps=4)
    assert "note: UNet2DConditionModel has no adapter" in str(run.report())
    with apply(Loop("flux"), "stale", {}) as run:
        assert run.report().notes == []
