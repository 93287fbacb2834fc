"""BAC against recorded runs of the official code."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import elision
from elision.denoise.fit.bac import listed, similarity_matrix, step_error
from elision.denoise.methods.bac import (
    BAC,
    METRICS,
    bubbling_union,
    consecutive_steps,
    noisiest,
    score,
    update_steps,
)
from elision.denoise.policy import Host
from elision.profile import Profile
from tests.denoise.policy import TransformerForDiffusion, act, counts, policy
from tests.golden import Case, cases
from tests.models import Loop

GOLDEN = cases("bac")


@pytest.mark.parametrize("metric", METRICS)
def test_golden_similarity(metric: str) -> None:
    case = GOLDEN["acs_from_features"]
    mine = similarity_matrix(case["features"].flatten(1), metric)
    torch.testing.assert_close(mine, case[f"S_{metric}"], **case.tolerance)


@pytest.mark.parametrize("name", [n for n in GOLDEN if n.startswith("acs_")])
def test_golden_schedules(name: str) -> None:
    """Update steps and scores for every metric and number; the released l2 is maximised, ours ("paper") is not."""
    case, seen = GOLDEN[name], 0
    for source in ("released", "paper"):
        for metric, rows in case.expected.get(source, {}).items():
            s = case[f"S_{metric}" if f"S_{metric}" in case.tensors else "S"].numpy()
            maximise = metric == "cosine" or (metric == "l2" and source == "released")
            for m, row in rows.items():
                steps = update_steps(s, int(m), maximise)
                assert steps == row["anchors"], (source, metric, m)
                assert score(s, steps) == pytest.approx(row["score"], rel=1e-5, abs=1e-5)
                seen += 1
    for m, steps in case.expected.get("paper_literal", {}).items():
        assert consecutive_steps(case["S"].numpy(), int(m)) == steps
    assert seen > 4


def test_golden_error_and_selection() -> None:
    case = GOLDEN["bua_error_proxy"]
    errors = [step_error(x.flatten(1)) for x in case["features"]]
    torch.testing.assert_close(torch.tensor(errors), case["error"], **case.tolerance)
    named = dict(zip(case.options["blocks"], errors, strict=True))
    for n, want in case.expected["selected"].items():
        assert noisiest(named, int(n)) == want


def test_golden_union() -> None:
    """Also with one selected branch, where the released code does nothing (`union_of_one=False`)."""
    expected = GOLDEN["bua_union"].expected
    schedules = expected["schedules"]
    layers = {key: int(key.split(".")[0]) for key in schedules}
    mlps = [key for key in schedules if key.endswith("ffn")]
    for row in expected["rows"]:
        want = {key: set(steps) for key, steps in row.get("paper", row["released"]).items()}
        for selected in (row["U"], row["U"][::-1]):
            assert bubbling_union(schedules, layers, mlps, selected) == want
        if len(row["U"]) == 1:
            assert row["released"] == schedules


def decoder(case: Case) -> TransformerForDiffusion:
    """The recorded decoder layers."""
    o = case.options
    model = TransformerForDiffusion(o["d_model"], o["heads"], o["dim_feedforward"], o["layers"], bare=True).eval()
    weights = {k.removeprefix("weights."): v for k, v in case.tensors.items() if k.startswith("weights.")}
    model.decoder.layers.load_state_dict(weights)
    model.causal = o["causal_self_attention"]
    return model


def site_keys(blocks: list[str]) -> list[str]:
    """The official block names as our sites."""
    tails = {"sa": "dropout1", "ca": "dropout2", "ffn": "dropout3"}
    return [f"decoder.layers.{name.split('.')[0]}.{tails[name.split('.')[1]]}" for name in blocks]


@pytest.mark.parametrize("name", [n for n in GOLDEN if n.startswith("decoder_")])
def test_golden_decoder(name: str) -> None:
    """Cached decoder layers, through `apply`: outputs, and which branches are computed at every call."""
    case = GOLDEN[name]
    o, model = case.options, decoder(case)
    rows = counts(model)

    @torch.no_grad()
    def run(key: str) -> None:
        for n in range(o["K"]):
            out = model(case["x"][n], torch.tensor(1.0 - n / 100), case["memory"][n])
            torch.testing.assert_close(out, case[key][n], **case.tolerance)

    run("out_uncached")
    rows.clear()
    if o["mode"] == "threshold":
        applied = elision.apply(model, "bac", steps=o["K"], schedule="uniform", interval=o["interval"])
    else:
        keys = dict(zip(site_keys(o["blocks"]), o["schedules"].values(), strict=True))
        assert list(o["schedules"]) == o["blocks"]
        applied = elision.apply(model, "bac", steps=o["K"], profile=listed(model, keys, o["K"]))
    with applied as session:
        for _ in range(2):  # a second action after the first
            rows.clear()
            run("out")
            assert torch.equal(torch.tensor(rows), case["computed"])
            assert torch.tensor(rows).sum(0).tolist() == case.expected["evaluations"]
    assert session.report().outputs_computed == 2 * sum(case.expected["evaluations"])  # type: ignore[attr-defined]


def test_golden_refresh_steps() -> None:
    """The released code's two added steps are `forced=(99, 100)`; without, schedules are what they are."""
    case = GOLDEN["refresh_flags"]
    k, schedules = case.options["K"], case.expected["schedules"]
    for m, name in ((4, "a"), (1, "b")):
        s = np.full((k, k), -1.0)
        for a, b in pairwise([*schedules[name], k]):
            s[a:b, a:b] = 1.0
        loop = Loop("dit")
        host = Host(loop.model, elision.denoise.adapters.adapter_for(loop.model))
        sites = host.site("branch", "bac")
        tensors = {"similarity": torch.tensor(s).expand(len(sites), k, k)}
        profile = Profile({}, tensors, {"sites": [x.key for x in sites], "steps": k, "metric": "cosine"})
        for forced, source in (((), "paper"), ((99, 100), "released"), ((-2, -1), "released")):
            method = BAC(num_caches=m, schedule="shared", forced=forced)
            assert all(
                sorted(steps) == case.expected[source][name] for steps in method.steps_of(host, sites, profile).values()
            )
    for interval, steps in case.expected["uniform"].items():
        model = policy(1)
        rows = counts(model)
        with elision.apply(model, "bac", steps=k, schedule="uniform", interval=int(interval)):
            act(model, steps=k)
        assert [n for n, row in enumerate(rows) if all(row)] == steps
