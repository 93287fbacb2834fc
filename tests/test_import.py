"""Importing is light, has no side effects, and shows what there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import elision

PROBE = """
import json, sys, time, warnings
before = set(sys.modules)
start = time.perf_counter()
import elision
seconds = time.perf_counter() - start
heavy = [m for m in ("torch", "numpy", "diffusers", "transformers", "accelerate", "safetensors") if m in sys.modules]
names = dir(elision)
still = [m for m in ("torch", "diffusers") if m in sys.modules]
print(json.dumps({"seconds": seconds, "heavy": heavy, "still": still, "names": names,
                  "own": sorted(m for m in set(sys.modules) - before if m.startswith("elision"))}))
"""


def probe(code: str) -> dict[str, object]:
    """What a fresh interpreter prints."""
    source = str(Path(elision.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}"],
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_import_is_light() -> None:
    best = min((probe(PROBE) for _ in range(3)), key=lambda r: float(str(r["seconds"])))
    assert float(str(best["seconds"])) < 0.2
    assert best["heavy"] == []
    assert best["still"] == []
    assert best["own"] == ["elision", "elision.errors"]
    assert set(elision.__all__) <= set(best["names"])  # type: ignore[call-overload]


def test_families_load_when_methods_are_asked_for() -> None:
    code = """
import json, sys
import elision
from elision.method import Method
light = "torch" in sys.modules
names = [m.name for m in elision.methods()]
print(json.dumps({"light": light, "names": names, "diffusers": "diffusers" in sys.modules}))
"""
    result = probe(code)
    assert result["light"] is False
    assert "easycache" in result["names"]  # type: ignore[operator]
    assert result["diffusers"] is False  # the methods need no pipeline library to be listed


def test_all_is_complete_and_sorted() -> None:
    assert elision.__all__ == sorted(elision.__all__)
    assert len(set(elision.__all__)) == len(elision.__all__)
    for name in elision.__all__:
        assert getattr(elision, name) is not None
    public = {name for name in vars(elision) if not name.startswith("_")}
    modules = {"api", "denoise", "hooks", "method", "profile", "session", "zoo"}  # submodules that tests imported
    extra = {"TYPE_CHECKING", "Any", "annotations", "importlib"}
    modules |= {"bench", "cli", "demo", "dllm", "kv", "serving", "tensors"}
    assert public - modules - extra == set(elision.__all__)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'elision' has no attribute 'aply'"):
        elision.aply  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_is_typed() -> None:
    assert (Path(elision.__file__).parent / "py.typed").exists()


def test_every_error_is_in_the_tree_of_the_docstring() -> None:
    from elision import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and c.__module__ == errors.__name__]
    for cls in classes:
        assert cls.__doc__
        if cls is not errors.ElisionWarning:
            assert issubclass(cls, errors.ElisionError)
            assert cls.__name__ in (errors.__doc__ or "")
    assert issubclass(errors.ElisionWarning, UserWarning)
