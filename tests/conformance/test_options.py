"""Options: documented, ranged, refused with the nearest name; methods: documented, with a paper or a control flag."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import pytest

import elision
from elision.errors import OptionError, ProfileError, UnknownName
from elision.method import create, describe_range, find
from tests.conformance.settings import known_methods
from tests.models import Loop, changed, snapshot

METHODS = known_methods() + known_methods("dllm")  # the budgets of kv methods have tests of their own
FIELDS = [(name, f) for name in METHODS for f in find(name).options().values()]
IDS = [f"{name}-{f.name}" for name, f in FIELDS]
EDGES: dict[tuple[str, str], list[Any]] = {  # where a rule between options narrows the range
    ("easycache", "start"): [0],
    ("easycache", "end"): [1],
    ("taylorseer", "first_enhance"): [1],
}
UNRANGED: dict[tuple[str, str], tuple[Any, ...]] = {  # tuples of numbers, with what a rule of their own must refuse
    ("bac", "forced"): ("nope", ("a",), 3, (math.nan,), (1.5,)),
    ("ertacache", "reused"): ("nope", (), ("a",), 3, (math.nan,), (-1,)),
    ("profilingdit", "blocks"): ("nope", ("a",), 3, (math.nan,), (-1,)),
    ("profilingdit", "refresh"): ("nope", (), ("a",), 3, (math.nan,), (-1,)),
    ("regione", "forced"): ("nope", ("a",), 3, (math.nan,), (0,), (4, 5), (9, 4)),
    ("regione", "gammas"): ("nope", (), ("a",), 3, (math.nan,), (0,), (-1.0,)),
    ("teacache", "coefficients"): ("nope", (), ("a",), 3, (math.nan,)),
    ("worldcache", "modalities"): ("nope", (), ("a",), 3, (math.nan,), (0,)),
}
HELP: dict[tuple[str, str], dict[str, Any]] = {  # options without which another has no meaning
    ("bac", "interval"): {"schedule": "uniform"},
    ("easycache", "subsample"): {"variant": "comfyui"},
    ("easycache", "start"): {"variant": "comfyui"},
    ("easycache", "end"): {"variant": "comfyui"},
    ("profilingdit", "interval"): {"schedule": "uniform"},
    ("profilingdit", "longest"): {"schedule": "formula"},
    ("profilingdit", "shortest"): {"schedule": "formula"},
    ("profilingdit", "warmup_steps"): {"schedule": "uniform"},
    ("taylorseer", "compute_after"): {"schedule": "diffusers"},
}


@pytest.mark.parametrize("name", METHODS)
def test_method_is_documented(name: str) -> None:
    cls = find(name)
    row = next(r for r in elision.methods() if r.name == name)
    assert row.description
    assert "\n" not in row.description
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # what dataclass writes by itself
    assert row.paper is not None or row.control
    if row.paper is not None:
        assert row.paper.title
        assert row.paper.venue
        assert row.paper.url.startswith("https://")
    assert row.targets
    module = inspect.getmodule(cls)
    assert module is not None
    assert module.__doc__
    if not row.control:
        assert len(module.__doc__.splitlines()) >= 10
        assert row.paper is not None
        assert row.paper.url in module.__doc__
    assert name == Path(inspect.getfile(cls)).stem
    assert dataclasses.is_dataclass(cls)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().__setattr__("threshold", 1)


@pytest.mark.parametrize(("name", "f"), FIELDS, ids=IDS)
def test_option_is_documented_and_ranged(name: str, f: dataclasses.Field[Any]) -> None:
    assert f.metadata.get("doc")
    assert not f.metadata["doc"].endswith(".")
    if (name, f.name) not in UNRANGED:
        assert describe_range(f)
    assert f.default is not dataclasses.MISSING


def out_of_range(f: dataclasses.Field[Any]) -> list[Any]:
    """Values that an option must refuse."""
    limits = f.metadata
    if limits["choices"] is not None:
        return ["no such choice", 17]
    bad: list[Any] = ["text", [1], math.nan, True]
    if limits["ge"] is not None:
        bad += [limits["ge"] - 1]
    if limits["gt"] is not None:
        bad += [limits["gt"], limits["gt"] - 1]
    if limits["le"] is not None:
        bad += [limits["le"] + 1]
    if "int" in str(f.type):
        bad += [limits["ge"] + 0.5, float(limits["ge"] + 1)]
    return bad


@pytest.mark.parametrize(("name", "f"), FIELDS, ids=IDS)
def test_option_out_of_range_is_refused(name: str, f: dataclasses.Field[Any]) -> None:
    if (name, f.name) in UNRANGED:
        for bad in UNRANGED[name, f.name]:
            with pytest.raises(OptionError, match=f.name):
                create(name, **{f.name: bad})
        return
    for bad in out_of_range(f):
        with pytest.raises(OptionError, match=f"{name}: {f.name}=") as caught:
            create(name, **{f.name: bad})
        message = str(caught.value)
        if f.metadata["choices"] is None and isinstance(bad, (int, float)) and not isinstance(bad, bool):
            assert describe_range(f) in message or "whole number" in message


@pytest.mark.parametrize(("name", "f"), FIELDS, ids=IDS)
def test_option_at_the_edge_of_its_range_is_taken(name: str, f: dataclasses.Field[Any]) -> None:
    limits = f.metadata
    edges: list[Any] = list(limits["choices"] or ()) + [limits[k] for k in ("ge", "le") if limits[k] is not None]
    edges = EDGES.get((name, f.name), edges)
    for edge in edges:
        assert getattr(create(name, **{f.name: edge, **HELP.get((name, f.name), {})}), f.name) == edge


@pytest.mark.parametrize(("name", "f"), FIELDS, ids=IDS)
def test_misspelt_option_names_the_nearest(name: str, f: dataclasses.Field[Any]) -> None:
    wrong = f.name + "z"
    loop = Loop("flux")
    before = snapshot(loop.model, loop.scheduler, loop)
    with pytest.raises(UnknownName, match=rf"{name} '{wrong}': did you mean '{f.name}'\?"):
        elision.apply(loop, name, **{wrong: 1})
    assert changed(before, snapshot(loop.model, loop.scheduler, loop)) == []


@pytest.mark.parametrize("name", METHODS)
def test_misspelt_method_names_the_nearest(name: str) -> None:
    with pytest.raises(UnknownName, match=rf"unknown method '{name}x': did you mean '{name}'\?"):
        elision.apply(object(), name + "x")
    with pytest.raises(LookupError):
        find(name + "x")
    assert find(name.replace("_", "-")) is find(name)


def test_an_unlike_name_lists_what_there_is() -> None:
    with pytest.raises(UnknownName) as caught:
        elision.apply(object(), "qqqq")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in METHODS)


def test_bad_options_leave_the_target_alone() -> None:
    loop = Loop("flux")
    before = snapshot(loop.model, loop.scheduler, loop)
    method = create("uniform")
    attempts: list[dict[str, Any]] = [
        {"method": "easycache", "threshold": -1},
        {"method": "taylorseer", "compute_after": 3},
        {"method": []},
        {"method": method, "interval": 3},
        {"method": [method], "interval": 3},
        {"method": "uniform", "steps": 0},
        {"method": "uniform", "steps": []},
        {"method": "uniform", "steps": 2.5},
        {"method": "uniform", "steps": True},
        {"method": "uniform", "cond": 3},
    ]
    for attempt in attempts:
        with pytest.raises(OptionError):
            elision.apply(loop, **attempt)
        assert changed(before, snapshot(loop.model, loop.scheduler, loop)) == [], attempt


def test_a_bare_denoiser_is_asked_for_its_steps() -> None:
    """By exactly the methods that must know where the run ends."""
    loop = Loop("flux")
    for name in known_methods():
        cls = find(name)
        needs = bool(getattr(cls(), "tail_steps", 0))
        before = snapshot(loop.model)
        if cls().wants_profile:
            with pytest.raises(ProfileError, match=f"{name} needs a profile: make one with elision.fit"):
                elision.apply(loop.model, name)
            assert changed(before, snapshot(loop.model)) == []
            continue
        if needs:
            with pytest.raises(OptionError, match=f"{name} must know the number of steps.*steps=28"):
                elision.apply(loop.model, name)
            assert changed(before, snapshot(loop.model)) == []
            elision.apply(loop.model, name, steps=9).remove()
        else:
            elision.apply(loop.model, name).remove()


def test_comfyui_window_must_be_a_window() -> None:
    with pytest.raises(OptionError, match="start"):
        create("easycache", variant="comfyui", start=0.9, end=0.2)


def test_register_refuses_a_taken_name() -> None:
    from elision.method import register

    taken = type("Other", (find("stale"),), {"name": "stale", "__module__": "elsewhere"})
    with pytest.raises(OptionError, match="'stale' is taken"):
        register(taken)
    assert register(find("stale")) is find("stale")
    assert find("stale").__module__ == "elision.denoise.methods.stale"


def test_methods_of_a_family() -> None:
    assert [row.name for row in elision.methods("denoise")] == known_methods()
    assert set(known_methods()) < set(METHODS)
    with pytest.raises(UnknownName, match="did you mean 'denoise'"):
        elision.methods("denoize")
