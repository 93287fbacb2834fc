"""What each class can do, found by doing it, and the table in the documentation that says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import elision
from elision.errors import UnsupportedTarget
from tests.denoise.adapters.table import LEVELS, SUBJECTS, row, still, table
from tests.models import Loop

pytestmark = pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
PAGE = Path(__file__).parents[3] / "docs" / "denoise.md"


@pytest.mark.parametrize("name", SUBJECTS)
def test_stand_ins_are_the_truth_where_nothing_changes(name: str) -> None:
    """At every level the class has; what it lacks is refused by name."""
    cells = row(name)
    assert cells["model"] == cells["stack"] == cells["run"] == cells["branch"] == "yes"
    assert all(cells.values())


def test_the_table_is_current() -> None:
    assert table() in PAGE.read_text(), "run: python tools/make_docs.py"


@pytest.mark.parametrize("level", LEVELS)
def test_any_other_denoiser_has_its_prediction_alone(level: str) -> None:
    loop = Loop("unet")
    if level != "model":
        with pytest.raises(UnsupportedTarget, match="UNet2DConditionModel has no adapter"):
            elision.apply(loop, still(level))
        return
    plain = loop(steps=3)
    with elision.apply(loop, still(level)):
        assert not torch.equal(loop(steps=3), plain)
