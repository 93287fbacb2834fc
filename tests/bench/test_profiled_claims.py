"""What the claims of BAC and ProfilingDiT stand on: equal branch calls, refresh lists of equal length, true masks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from elision.bench.experiments import bac, profilingdit
from elision.bench.lab import Lab
from elision.bench.subject import Subject
from elision.denoise.methods.bac import BAC


def test_even_spreading_has_as_many_branch_calls(subject: Subject) -> None:
    lab = Lab(subject, [0])
    for m, ours, alone, shared in bac._arms(lab, 9):
        calls = bac._calls(lab, ours, 9)
        even = lab.run(bac.Even(calls, 9), 9, 0)[2]
        assert lab.run(ours, 9, 0)[2].outputs_computed == even.outputs_computed == 2 * calls
        assert bac._calls(lab, alone, 9) == bac._calls(lab, shared, 9) == m * len(bac._sites(lab)[1]) < calls


@pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
def test_the_surge_of_a_method_that_computes_everything_is_nothing(subject: Subject) -> None:
    lab = Lab(subject, [0])
    whole, some = BAC(num_caches=6, union_blocks=0), BAC(num_caches=3, union_blocks=0)
    bac._with_profile(lab, 6, whole, some)
    assert bac.surge(lab, whole, 6, 0) == []
    pairs = bac.surge(lab, some, 6, 0)
    assert len(pairs) >= 3
    assert all(up > 0 and down > 0 for up, down in pairs)


@pytest.mark.parametrize("steps", [12, 28, 50])
def test_refresh_lists_are_equally_long_and_in_order(steps: int) -> None:
    lists = profilingdit._intervals(steps)
    assert len({len(refresh) for refresh in lists.values()}) == 1
    assert {refresh[0] for refresh in lists.values()} == {profilingdit._start(steps)}
    gaps = {name: [b - a for a, b in pairwise([*refresh, steps])] for name, refresh in lists.items()}
    assert gaps["increasing"] == gaps["decreasing"][::-1]
    assert gaps["decreasing"][0] > gaps["decreasing"][-1] or steps < 20
    assert max(gaps["uniform"]) - min(gaps["uniform"]) <= 1
    if steps == 50:
        assert lists["decreasing"] == (6, 18, 27, 34, 40, 44, 47)


def test_masks_follow_the_tokens_row_by_row() -> None:
    images = torch.zeros(1, 1, 32, 32)
    images[0, 0, 4:8, 8:16] = 1
    assert profilingdit._masks(images)[0, 0].nonzero().flatten().tolist() == [10, 11]
