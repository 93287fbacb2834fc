"""Subjects as data: what goes with a prompt, judges of any kind, videos, and experiments that name their model."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elision.bench import claims, compare, reproduce, subjects
from elision.bench.claims import Claim, Measured
from elision.bench.compare import compare_denoise
from elision.bench.lab import Lab
from elision.bench.report import render
from elision.bench.subject import Judge, Subject, load_subject
from elision.denoise.methods.uniform import Uniform
from elision.errors import OptionError, UnsupportedTarget
from tests.bench.conftest import small_pipeline

LETTERS = "abc"


class Editor:
    """A pipeline that takes an image for every prompt and returns two frames of it."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(
        self,
        prompt: list[str],
        image: list[Tensor],
        num_inference_steps: int = 4,
        generator: Any = None,
        output_type: str = "np",
    ) -> Any:
        self.seen = list(image)
        frames = torch.stack([x.expand(2, -1, -1, -1) for x in image])  # [B, F, C, H, W]
        return SimpleNamespace(frames=frames.permute(0, 1, 3, 4, 2).numpy())


def editor() -> Subject:
    images = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 8, 8) / 4
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    return Subject(
        "editor", Editor(), list(LETTERS), kind="edit", inputs={"image": images}, references=images, masks=masks
    )


def test_what_goes_with_a_prompt_is_cut_repeated_and_chosen_with_it() -> None:
    found = load_subject(editor(), prompts=["c", "a"], batch=3)
    assert found.prompts == ["c", "a", "c"]
    images, _ = found.sample(4, 0)
    assert images.shape == (6, 3, 8, 8)
    assert images[:, 0, 0, 0].tolist() == [0.5, 0.5, 0, 0, 0.5, 0.5]
    assert found.references is not None
    assert found.references[:, 0, 0, 0].tolist() == [0.5, 0, 0.5]
    assert found.masks is not None
    assert found.masks.shape == (3, 8, 8)
    with pytest.raises(OptionError, match="no inputs for the prompt 'd'; prompts: a, b, c"):
        load_subject(editor(), prompts=["d"])


def test_other_outputs_are_read_by_the_subject() -> None:
    mine = editor()
    mine.read = lambda out: torch.from_numpy(out.frames[:, 0]).permute(0, 3, 1, 2)[:, :1]
    assert mine.sample(4, 0)[0].shape == (3, 1, 8, 8)


class Brightness(Judge):
    """One score per prompt, one feature per image."""

    def scores(self, images: Tensor, reference: Tensor, subject: Subject) -> dict[str, list[float]]:
        assert images.shape == reference.shape
        return {"bright": images.flatten(1).mean(1).tolist(), "index": [float(len(p)) for p in subject.prompts]}

    def features(self, images: Tensor) -> Any:
        return images.flatten(2).mean(-1).double().numpy()

    def notes(self) -> list[str]:
        return ["Brightness is no quality"]


@pytest.fixture(scope="module")
def bright() -> Subject:
    return Subject("bright", small_pipeline(), ["bag", "coat", "sneaker"], 6, 2.0, Brightness())


def test_scores_become_columns_in_table_file_and_report(bright: Subject, tmp_path: Any) -> None:
    found = compare_denoise(bright, "uniform:interval=2", seeds=2, controls=False)
    row = next(r for r in found.rows() if r.kind == "control")
    mine = next(a for a in found.arms if a.kind == "control")
    assert row.scores["index"].mean == pytest.approx((3 + 4 + 7) / 3)
    assert row.scores["bright"].mean == pytest.approx(np.mean([np.mean(s.scores["bright"]) for s in mine.samples]))
    assert {"bright", "index"} <= {str(column.header) for column in found.table().columns}
    assert "Brightness is no quality" in found.notes
    assert any("1 features" in note for note in found.notes) is False  # six samples are enough for one feature
    assert found.arms[0].distance is not None
    assert found.arms[0].distance_real is None
    assert compare.Comparison.load(found.save(tmp_path / "r.jsonl")).rows() == found.rows()
    assert "<b>bright</b>, <b>index</b>: what the" in render(found)


def test_a_subject_names_what_is_compared_where_nothing_is_named() -> None:
    mine = Subject("mine", small_pipeline(), ["bag"], 4, 2.0, auto=("uniform:interval=2", "stale:interval=2"))
    found = compare_denoise(mine, steps=4, seeds=1, controls=False)
    assert [arm.label for arm in found.arms if arm.kind == "control"] == ["uniform:interval=2", "stale:interval=2"]


def test_without_a_judge_a_note_says_what_is_missing() -> None:
    found = compare_denoise(
        Subject("bare", small_pipeline(), ["bag"], 4, 2.0), "uniform", steps=4, seeds=1, controls=False
    )
    assert any("Nothing judges" in note for note in found.notes)
    assert found.rows()[0].scores == {}


def test_claims_ask_for_scores_by_name(bright: Subject) -> None:
    lab = Lab(bright, [0, 1])
    method = Uniform(interval=2)
    images = lab.run(method, 6, 1)[0]
    assert lab.score(method, 6, "bright")[1] == pytest.approx(float(images.mean()), rel=1e-5)
    plain = lab.score_plain(6, "bright")
    assert plain[0] == pytest.approx(float(lab.plain(6, 0).mean()), rel=1e-5)
    assert lab.score_plain(6, "bright", [3, 6])[1] == plain[1]
    assert lab.score_plain(6, "bright", [3, 6])[0] != plain[0]
    assert lab.score_gain(method, method, 6, "bright").mean == 0
    with pytest.raises(UnsupportedTarget, match="not judged by 'dark', only by bright, index"):
        lab.score(method, 6, "dark")
    with pytest.raises(UnsupportedTarget, match="nothing judges"):
        Lab(editor(), [0]).score_plain(4, "bright")


def test_every_file_of_the_package_keeps_the_contract() -> None:
    import elision.zoo

    for name in subjects.models():
        builder = subjects.for_model(name)
        assert builder is not None
        assert name in elision.zoo.names()
        kind = subjects.pipeline_class(builder)
        first = subjects.for_pipeline(kind.__name__)  # models of one class share a file that tells them apart
        assert first is not None
        assert subjects.pipeline_class(first) is kind
    assert subjects.for_model("none") is None


def test_experiments_run_on_the_model_that_they_are_written_for(
    bright: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(lab: Lab, steps: int) -> Iterator[Measured]:
        yield Measured(lab.subject.name, None, f"T = {steps}")

    def entry(key: str, model: str) -> Claim:
        return Claim(key, "s", "p", "m", "above", "b", measure, model=model)

    mine = [entry("stale/one", ""), entry("stale/two", "sprites"), entry("uniform/one", "sprites")]
    monkeypatch.setattr(claims, "claims", lambda: {"stale": mine[:2], "uniform": mine[2:]})
    made = {"sprites": Subject("sprites", small_pipeline(), ["bag"], grids=(5,)), reproduce.USUAL: bright}
    monkeypatch.setattr(
        "elision.bench.subject.load_subject", lambda name: made[name] if isinstance(name, str) else name
    )

    found = reproduce.run_claims(["uniform", "stale"], seeds=2)
    assert [(f.claim, f.model, f.why) for f in found.findings] == [
        ("uniform/one", "sprites", "T = 5"),
        ("stale/one", "bright", "T = 28"),
        ("stale/one", "bright", "T = 50"),
        ("stale/two", "sprites", "T = 5"),
    ]
    assert found.model == "sprites, bright"
    assert found.steps == [5, 28, 50]
    everywhere = reproduce.run_claims(["all"], model=bright, steps=[4], seeds=2)
    assert {f.model for f in everywhere.findings} == {"bright"}
    assert {f.steps for f in everywhere.findings} == {4}


def test_a_file_of_experiments_names_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_registry", {})
    monkeypatch.setitem(globals(), "MODEL", "sprites")

    def measure(lab: Lab, steps: int) -> Iterator[Measured]:
        yield Measured("", None)

    for key, model in (("stale/a", None), ("stale/b", "other")):
        claims.claim(key, "s", paper="p", metric="m", baseline="b", model=model)(measure)
    assert [entry.model for entry in claims._registry.values()] == ["sprites", "other"]


def test_policies_go_to_their_own_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    fake: Any = types.ModuleType("elision.bench.policy")
    fake.compare = lambda subject, specs, **given: (subject.name, [s.name for s in specs], sorted(given))
    fake.lab = lambda subject, seeds, told: ("lab", list(seeds))
    monkeypatch.setitem(sys.modules, "elision.bench.policy", fake)
    policy = Subject("arm", object(), ["door"], kind="policy")
    assert compare_denoise(policy, "uniform") == ("arm", ["uniform"], ["controls", "progress", "seeds", "steps"])
    with pytest.raises(UnsupportedTarget, match="diffusers:pab has no place for a policy"):
        compare_denoise(policy, "uniform,diffusers:pab")
    from elision.bench.lab import lab_for

    assert lab_for(policy, [1, 2], print) == ("lab", [1, 2])
