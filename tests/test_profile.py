"""Profile files: they come back as they were, belong to one target, and are never pickles."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import elision
from elision.errors import ElisionError, ProfileError, ProfileMismatch
from elision.profile import Profile, config_hash, fingerprint, weight_digest
from tests.models import Loop

NAMES = st.text("abcxyz._0", min_size=1, max_size=8)
FACTS = st.dictionaries(NAMES, st.one_of(st.integers(), st.floats(allow_nan=False), st.text(), st.lists(st.booleans())))


@pytest.fixture
def profile() -> Profile:
    loop = Loop("flux")
    made_for = fingerprint("teacache", loop.model, loop.scheduler, 28)
    return Profile(made_for, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1], dtype=torch.int8)}, {"k": 1})


def test_round_trip(profile: Profile, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "new" / "folder" / "p.safetensors")
    back = Profile.load(path)
    assert back.fingerprint == profile.fingerprint
    assert back.facts == profile.facts
    assert back.tensors.keys() == profile.tensors.keys()
    for name, tensor in profile.tensors.items():
        assert torch.equal(back.tensors[name], tensor)
        assert back.tensors[name].dtype == tensor.dtype
    assert Profile.load(str(path)).facts == profile.facts


@settings(max_examples=25, deadline=None)
@given(facts=FACTS, shapes=st.dictionaries(NAMES, st.lists(st.integers(0, 3), max_size=3), max_size=4))
def test_any_facts_and_tensors_come_back(
    facts: dict[str, Any], shapes: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    path = Profile({"method": "m"}, tensors, facts).save(tmp_path_factory.mktemp("p") / "p.safetensors")
    back = Profile.load(path)
    assert back.facts == facts
    assert back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in tensors.items())


def test_views_and_shared_storage_are_saved(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    tensors = {"whole": base, "part": base[3:6], "turned": base.reshape(3, 4).T}
    back = Profile.load(Profile({}, tensors).save(tmp_path / "p.safetensors"))
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in tensors.items())


def test_it_is_no_pickle(profile: Profile, tmp_path: Path) -> None:
    raw = profile.save(tmp_path / "p.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header["__metadata__"]["format"] == "elision-profile-1"
    assert "fingerprint" in json.loads(header["__metadata__"]["header"])
    with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError, AttributeError)):
        pickle.loads(raw)


class Evil:
    """Would run on unpickling."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def broken_files(folder: Path, good: bytes) -> dict[str, Path]:
    """Files that are no profiles, by what is wrong with them."""
    files = {name: folder / f"{name}.safetensors" for name in ("empty", "text", "cut", "pickle", "header", "json")}
    files["empty"].write_bytes(b"")
    files["text"].write_text("not a profile at all")
    files["cut"].write_bytes(good[: len(good) - 7])
    torch.save({"x": Evil()}, files["pickle"])
    save_file({"x": torch.zeros(1)}, files["header"], metadata={"format": "elision-profile-1"})
    save_file({"x": torch.zeros(1)}, files["json"], metadata={"format": "elision-profile-1", "header": "{"})
    files["plain"] = folder / "plain.safetensors"
    save_file({"x": torch.zeros(1)}, files["plain"])
    files["other"] = folder / "other.safetensors"
    save_file({"x": torch.zeros(1)}, files["other"], metadata={"format": "elision-profile-99", "header": "{}"})
    files["fields"] = folder / "fields.safetensors"
    save_file({"x": torch.zeros(1)}, files["fields"], metadata={"format": "elision-profile-1", "header": "{}"})
    files["folder"] = folder
    files["missing"] = folder / "nowhere.safetensors"
    return files


def test_broken_files_are_refused_by_name(profile: Profile, tmp_path: Path) -> None:
    good = profile.save(tmp_path / "good.safetensors").read_bytes()
    for what, path in broken_files(tmp_path, good).items():
        with pytest.raises(ProfileError) as caught:
            Profile.load(path)
        assert str(path) in str(caught.value), what
        assert "elision.fit" in str(caught.value) or "safetensors" in str(caught.value), what
        assert isinstance(caught.value, ElisionError)


def test_fingerprint_says_what_it_is_bound_to() -> None:
    loop = Loop("flux")
    made = fingerprint("teacache", loop.model, loop.scheduler, 28)
    assert made["model"] == "FluxTransformer2DModel"
    assert made["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert made["steps"] == 28
    assert made["versions"]["torch"] == torch.__version__
    assert made["date"][:2] == "20"
    json.dumps(made)
    again = fingerprint("teacache", Loop("flux").model, loop.scheduler, 28)
    assert {**made, "date": ""} == {**again, "date": ""}


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("method", {"method": "easycache"}),
        ("model", {"model": Loop("sd3").model}),
        ("config", {"config": "qk"}),
        ("weights", {"model": Loop("flux", seed=3).model}),
        ("scheduler", {"scheduler": Loop("flux", object()).scheduler}),
        ("scheduler_config", {"shift": 3.0}),
        ("steps", {"steps": 50}),
    ],
)
def test_a_mismatch_names_the_field_and_both_values(profile: Profile, field: str, change: dict[str, Any]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    loop = Loop("flux")
    scheduler = change.get("scheduler", FlowMatchEulerDiscreteScheduler(shift=change.get("shift", 1.0)))
    here = fingerprint(
        change.get("method", "teacache"), change.get("model", loop.model), scheduler, change.get("steps", 28)
    )
    if "config" in change:
        here["config"] = "something else"
    with pytest.raises(ProfileMismatch, match=rf"{field}: profile '?.+'?, here '?.+'?.*force=True") as caught:
        profile.check(here)
    named = {part.split(":")[0] for part in str(caught.value).split("(", 1)[1].split("; ")}
    allowed = {"model": {"model", "config", "weights"}, "scheduler": {"scheduler", "scheduler_config"}}
    assert field in named
    assert named <= allowed.get(field, {field})
    assert profile.check(here, force=True)


def test_what_cannot_be_known_is_not_compared(profile: Profile) -> None:
    loop = Loop("flux")
    assert profile.check(fingerprint("teacache", loop.model, loop.scheduler, 28)) == []
    assert profile.check(fingerprint("teacache", loop.model, loop.scheduler, None)) == []
    unbound = Profile({**profile.fingerprint, "steps": None})
    assert unbound.check(fingerprint("teacache", loop.model, loop.scheduler, 28)) == []
    dated = Profile({**profile.fingerprint, "date": "1999", "versions": {"torch": "1"}})
    assert dated.check(fingerprint("teacache", loop.model, loop.scheduler, 28)) == []


def test_one_changed_weight_and_one_changed_entry_are_seen() -> None:
    model = Loop("flux").model
    before = weight_digest(model)
    with torch.no_grad():
        model.proj_out.bias[0] += 1e-3  # type: ignore[union-attr, operator, index]
    assert weight_digest(model) != before
    assert config_hash({"a": 1, "_private": 2}) == config_hash({"_private": 3, "a": 1}) != config_hash({"a": 2})
    assert config_hash(None) == config_hash({})
    assert weight_digest(model.to(torch.bfloat16)) != before
    assert weight_digest(torch.nn.Identity()) == weight_digest(torch.nn.Identity())
    assert weight_digest(torch.nn.Linear(2, 2, device="meta"))


def test_apply_takes_and_refuses_profiles(profile: Profile, tmp_path: Path) -> None:
    loop = Loop("flux")
    with pytest.raises(ProfileError, match="no profile at"):
        elision.apply(loop, "teacache", profile=tmp_path / "none.safetensors")
    with pytest.raises(ProfileMismatch, match="method: profile 'teacache', here 'easycache'"):
        elision.apply(loop, "easycache", profile=profile)
    with elision.apply(loop, "easycache", profile={"teacache": profile}):  # not for this one
        pass
