"""What the claims of RegionE stand on: one profile, equal courses, true masks, and random regions of equal size."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from elision.bench.claims import claims, examine
from elision.bench.experiments import regione
from elision.bench.lab import Lab
from elision.bench.subject import Subject
from elision.bench.subjects import for_model
from elision.zoo.garments_edit import CONFIG, GarmentsEditPipeline
from tests.models import randomise

STEPS = 7  # warm-up 2, forced 4, one at the end


@pytest.fixture(scope="module")
def lab() -> Lab:
    """An editor with random weights on two canvases, one edited left and one right."""
    torch.manual_seed(0)
    config = {**CONFIG, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    model = randomise(FluxTransformer2DModel(**config))
    model.proj_out.weight.mul_(0.1)  # type: ignore[union-attr, operator]
    pipe = GarmentsEditPipeline(model, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    builder = for_model("garments-edit")
    assert builder is not None
    subject = builder.subject("random", pipe, ["replace the left item by coat", "replace the right item by bag"])
    return Lab(subject, [0, 1])


def test_the_course_is_the_papers_in_proportion(lab: Lab) -> None:
    short = regione._method(lab, STEPS)
    assert (short.warmup_steps, short.post_steps, short.forced) == (2, 1, (4,))
    assert len(lab.profiles[short, STEPS].tensors["gammas"]) == STEPS - 1
    lab.profiles[regione.RegionE(), 28] = lab.profiles[short, STEPS]  # nothing is fitted for the look at this one
    whole = regione._method(lab, 28)
    assert (whole.warmup_steps, whole.post_steps, whole.forced, whole.eta) == (6, 2, (16,), 0.93)


@pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
def test_every_claim_gives_numbers(lab: Lab) -> None:
    found = {c.key: examine(c, lab, STEPS) for c in claims()["regione"] if c.model == "garments-edit"}
    assert found.pop("regione/published-models")[0].verdict == "not testable here"
    for key, rows in found.items():
        assert rows, key
        assert all(row.ours is not None and "edited" in row.setting for row in rows), (key, [r.why for r in rows])
    assert all(row.ours.mean >= 1 for row in found["regione/decay"] if row.ours)


def test_overlaps() -> None:
    a = torch.zeros(2, 4, 4, dtype=torch.bool)
    a[0, :2] = True
    b = a.clone()
    b[0, 1:] = True
    assert regione._overlap(a, b) == pytest.approx(0.25)  # 8 of 16, and nothing of nothing counts as none
    assert regione._overlap(a[:1], a[:1]) == 1


def test_a_subject_without_pictures_is_not_testable(subject: Subject) -> None:
    lab = Lab(subject, [0])
    rows = [row for c in claims()["regione"] for row in examine(c, lab, STEPS)]
    assert {row.verdict for row in rows} == {"not testable here"}
    assert all(re.search("editing pipeline|no true masks|weights", row.why) for row in rows)
