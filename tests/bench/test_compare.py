from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from elision.bench import compare, measure, results
from elision.bench.compare import Comparison, compare_denoise, matched_controls
from elision.bench.environment import environment
from elision.bench.subject import Subject, images_of, load_subject
from elision.errors import ElisionError, OptionError, UnknownName, UnsupportedTarget

METHODS = ["taylorseer:interval=3", "easycache:threshold=0.3,warmup_steps=3", "uniform:interval=2"]


@pytest.fixture(scope="module")
def comparison(subject: Subject) -> Comparison:
    return compare_denoise(subject, METHODS, seeds=3)


def test_arms_are_baseline_methods_controls_and_their_fewer_steps(comparison: Comparison) -> None:
    kinds = [arm.kind for arm in comparison.arms]
    assert kinds[0] == "baseline"
    assert kinds == sorted(kinds, key=["baseline", "method", "control", "fewer_steps"].index)
    labels = {arm.label for arm in comparison.arms}
    assert {"baseline", "taylorseer:interval=3", "uniform:interval=2"} <= labels
    assert any(label.startswith("random_skip") for label in labels)
    assert any(label.startswith("stale") for label in labels)
    for arm in comparison.arms:
        if arm.kind in ("method", "control"):
            assert arm.equal_cost in labels


def test_every_method_has_a_control_of_exactly_its_cost_from_the_same_noise(comparison: Comparison) -> None:
    by_label = {arm.label: arm for arm in comparison.arms}
    for arm in comparison.arms:
        if arm.equal_cost:
            other = by_label[arm.equal_cost]
            assert [s.seed for s in other.samples] == [s.seed for s in arm.samples] == comparison.seeds
            assert [s.steps_computed for s in other.samples] == [s.equal_steps for s in arm.samples]


def test_numbers_agree_with_the_schedule(comparison: Comparison) -> None:
    rows = {row.label: row for row in comparison.rows()}
    taylor = rows["taylorseer:interval=3"]
    assert 5 < taylor.steps_computed < 5.5  # of 10: 0, 1, 2, 5, 8; embeddings and heads always run
    assert taylor.flops_ratio == pytest.approx(10 / taylor.steps_computed)
    assert next(a for a in comparison.arms if a.label == taylor.label).samples[0].states[:6] == [
        *["computed"] * 3,
        *["predicted"] * 2,
        "computed",
    ]
    base, plain = rows["baseline"], rows[taylor.equal_cost]
    assert base.calls == 20  # two guidance branches
    assert plain.calls == 10
    assert plain.flops_ratio == pytest.approx(2.0)
    assert taylor.flops_ratio is not None
    assert 1 < taylor.flops_ratio < 2.0  # embeddings and heads always run
    assert taylor.bytes_peak > 0
    assert base.psnr.mean == 100
    assert base.distance is not None
    assert base.distance.mean == pytest.approx(0, abs=1e-6)


def test_arms_are_interleaved_in_rotating_order(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    plain, method = compare.run_plain, compare.run_method

    def note_plain(subject, steps, seed):  # type: ignore[no-untyped-def]
        order.append((f"plain{steps}", seed))
        return plain(subject, steps, seed)

    def note_method(subject, what, steps, seed, profile=None):  # type: ignore[no-untyped-def]
        order.append((what.name, seed))
        return method(subject, what, steps, seed, profile)

    monkeypatch.setattr(compare, "run_plain", note_plain)
    monkeypatch.setattr(compare, "run_method", note_method)
    compare_denoise(subject, ["uniform:interval=2", "taylorseer:interval=3"], seeds=[5, 6], controls=False)
    warm = [name for name, seed in order if seed not in (5, 6)]
    assert warm == ["plain10", "uniform", "taylorseer"]
    raced = order[len(warm) :]
    assert raced == [
        ("plain10", 5),
        ("uniform", 5),
        ("plain5", 5),
        ("taylorseer", 5),
        ("plain10", 6),
        ("taylorseer", 6),
        ("plain5", 6),
        ("uniform", 6),
    ]


def test_samples_are_those_of_the_seed(subject: Subject, comparison: Comparison) -> None:
    images, _ = subject.sample(10, comparison.seeds[0])
    kept = comparison.arms[0].images
    assert kept is not None
    assert torch.equal(kept, images)
    again, _ = measure.run_plain(subject, 10, comparison.seeds[0])
    assert torch.equal(again, images)  # nothing that was applied is left on the pipeline


def test_a_method_that_elides_nothing_is_a_row_with_a_note(subject: Subject) -> None:
    found = compare_denoise(subject, "easycache:threshold=0", seeds=1, controls=False)
    row = next(row for row in found.rows() if row.label.startswith("easycache"))
    assert row.psnr.mean == 100
    assert row.steps_computed == 10
    assert any("elided nothing" in note for note in row.notes)


def test_several_numbers_of_steps(subject: Subject) -> None:
    found = compare_denoise(subject, "uniform:interval=2,site=model", steps=[4, 6], seeds=1, controls=False)
    assert [arm.kind for arm in found.at(4)] == ["baseline", "control", "fewer_steps"]
    assert [row.steps_computed for row in found.rows() if row.kind == "control"] == [2, 3]


def test_file_round_trip(comparison: Comparison, tmp_path: Path) -> None:
    path = comparison.save(tmp_path / "new" / "result.jsonl")
    assert Comparison.load(path) == comparison
    head, records = results.read(path)
    assert set(head["environment"]["versions"]) >= {"elision", "torch", "diffusers"}
    assert head["setting"]["seeds"] == [0, 1, 2]
    assert {record["kind"] for record in records} == {"arm", "sample", "row"}
    assert Comparison.load(path).rows()[3].psnr == comparison.rows()[3].psnr


def test_result_files_name_no_host_and_no_path(comparison: Comparison, tmp_path: Path) -> None:
    import platform

    text = comparison.save(tmp_path / "result.jsonl").read_text()
    assert str(tmp_path) not in text
    assert str(Path(__file__).parents[2]) not in text
    node = platform.node()
    assert not node or len(node) < 4 or node not in text


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ElisionError, match="no result file"):
        results.read(tmp_path / "none.jsonl")
    for text in ("not json", '{"format": "other"}', ""):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ElisionError, match="not a result file"):
            results.read(tmp_path / "bad.jsonl")


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = results.write(tmp_path / "x.jsonl", "compare", {}, [{"kind": "row", "value": float("nan")}])
    assert json.loads(path.read_text().splitlines()[1])["value"] is None


def test_environment_tells_what_matters() -> None:
    found = environment()
    assert found["threads"] >= 1
    assert found["cpu"]
    assert "T" in found["date"]


def test_fewer_steps_are_named_by_their_mean_and_stay_apart() -> None:
    first = compare._fewer_label((12, 13, 12), {})
    assert first == "fewer_steps:steps=12.33"
    taken = {(12, 13, 12): compare.Arm("fewer_steps", first, 28)}
    assert compare._fewer_label((12, 13, 12), taken) == first
    assert compare._fewer_label((13, 12, 12), taken) == first + "'"


def test_controls_are_matched_to_the_computed_steps() -> None:
    assert matched_controls(10, 28)[0] == "uniform:interval=3,site=model"
    assert matched_controls(28, 28) == [
        "uniform:interval=1,site=model",
        "random_skip:rate=0,seed=49",
        "stale:interval=1",
    ]
    assert matched_controls(1, 28)[0].startswith("uniform:interval=28")


def test_table_leaves_out_empty_columns_and_shows_all_arms(comparison: Comparison) -> None:
    table = comparison.table()
    names = [str(column.header) for column in table.columns]
    assert {"PSNR dB", "speed-up", "FLOPs", "recognised", "Δ fewer steps"} <= set(names)
    assert "LPIPS" not in names
    assert table.row_count == len(comparison.arms)


def test_table_drops_columns_until_it_fits(comparison: Comparison) -> None:
    from rich.console import Console

    for width in (90, 120, 300):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(comparison.table(width=width))
        text = console.export_text()
        assert "taylorseer:interval=3 " in text  # not folded
        assert "Δ fewer steps" in text
        assert max(len(line) for line in text.splitlines()) <= width
        assert ("calls" in text) == (width == 300)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seeds": 0}, OptionError),
        ({"steps": 0}, OptionError),
        ({"batch": 0}, OptionError),
        ({"methods": "nothing"}, UnknownName),
    ],
)
def test_bad_settings_are_refused(subject: Subject, options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        compare_denoise(subject, **{"methods": "uniform", **options})  # type: ignore[arg-type]


def test_prompts_and_batch(subject: Subject) -> None:
    found = load_subject(subject, prompts=["dress"], batch=3)
    assert found.prompts == ["dress"] * 3
    assert found.sample(2, 0)[0].shape == (3, 1, 32, 32)


def test_zoo_names_and_paths(zoo: None, tmp_path: Path) -> None:
    assert len(load_subject("garments-flux").prompts) == 10
    with pytest.raises(UnknownName, match="garments-flux"):
        load_subject("garment-flux")
    with pytest.raises(UnsupportedTarget, match="no images"):
        load_subject("garments-classifier")
    load_subject("garments-flux").pipe.save_pretrained(tmp_path / "mine")
    assert load_subject(str(tmp_path / "mine")).name == "mine"
    with pytest.raises(UnknownName, match="neither a zoo model nor a pipeline"):
        load_subject(str(tmp_path))


def test_outputs_of_other_pipelines() -> None:
    class Video:
        frames = torch.rand(2, 3, 8, 8, 3).numpy()

    assert images_of(Video()).shape == (6, 3, 8, 8)

    class Listed:
        frames = [torch.rand(5, 3, 8, 8)]

    assert images_of(Listed()).shape == (5, 3, 8, 8)
    with pytest.raises(UnsupportedTarget, match="neither images nor frames"):
        images_of(object())
