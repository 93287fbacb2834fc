"""RegionE against recorded runs of the official code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from elision.denoise.methods.regione import PRESETS, Course, decays, factor
from tests.denoise.editors import Editor, Table, applied
from tests.golden import Case, cases

GOLDEN = cases("regione")


NAMES = {
    "FluxKontext": "kontext",
    "Step1XEdit": "step1x-v1p1",
    "Step1XEditV1P2": "step1x-v1p2",
    "QwenImageEdit": "qwen",
    "QwenImageEditPlus": "qwen-2509",
}


RUNS = GOLDEN["decay_cache_default"].options["runs"]


@pytest.mark.parametrize("which", range(len(RUNS)))
def test_the_official_decisions_and_factors(which: int) -> None:
    """All five tables on two grids."""
    case, about = GOLDEN["decay_cache_default"], RUNS[which]
    preset = PRESETS[NAMES[about["gamma_table"]]]
    assert list(preset.gammas) == about["gamma_fp16"]
    assert [g / 1e4 for g in preset.table] == pytest.approx(about["gamma"])
    assert preset.delta == about["delta"]
    sigmas = case[about["sigmas_tensor"]].double().tolist()
    found = decays(sigmas, preset.gammas, Course(28, 6, 2, (15,)), about["delta"])
    for rule, name in (("last", "factor"), ("product", "factor_product")):
        mine = torch.tensor([factor(found, n, rule) for n in range(28)])  # type: ignore[arg-type]
        assert torch.allclose(mine, case[f"{name}_{which}"], **case.tolerance)
        assert [decay is None for decay in found] == (case[f"{name}_{which}"] == 1).tolist()


def test_every_published_table_is_recorded() -> None:
    assert {NAMES[about["gamma_table"]] for about in RUNS} == set(PRESETS)


def step_of(time: float, sigmas: Tensor) -> int:
    return int((sigmas - time).abs().argmin())


def table(case: Case, part: str, about: dict[str, Any]) -> tuple[Editor, Table]:
    grid, sigmas, velocity = tuple(about["grid"]), case[f"{part}sigmas"], case[f"{part}velocity"]
    model = Table(lambda time, where, x: velocity[step_of(time, sigmas), where][None], grid[1])
    return Editor(model, case[f"{part}x"], case[f"{part}ref"], grid, sigmas), model


PARTS = [("sampler_default", ""), ("sampler_edge_cases", "empty_edit."), ("sampler_edge_cases", "forced_two_no_post.")]


@pytest.mark.parametrize("rule", ["last", "product"])
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_the_official_sampling_loops(name: str, part: str, rule: str) -> None:
    """Latents after every step, which steps call the network, and with how many tokens."""
    case = GOLDEN[name]
    about = case.options[part[:-1]] if part else case.options
    expected = case.expected[part[:-1]] if part else case.expected
    editor, model = table(case, part, about)
    with applied(
        editor,
        preset=NAMES[about["gamma_table"]],
        eta=about["eta"],
        delta=about["delta"],
        warmup_steps=about["warmup"],
        post_steps=about["post"],
        forced=about["forced"],
        factor=rule,
        keep_kv=False,
    ) as run:
        out = editor()
    want = case[f"{part}latents" if rule == "last" else f"{part}latents_product"]
    assert torch.allclose(out, want, **case.tolerance)
    calls = list(zip(expected["network_calls"], expected["tokens_per_call"], strict=True))
    calls = [(n, tokens) for n, tokens in calls if tokens]  # with nothing edited the network is not called
    assert [(step_of(t, case[f"{part}sigmas"]), tokens) for t, tokens in model.calls] == calls
    (shown,) = run.report().last.extra.values()  # type: ignore[union-attr]
    assert torch.tensor(shown["mask"]).flatten().nonzero().flatten().tolist() == case[f"{part}edited"].tolist()


@pytest.mark.parametrize("rule", ["last", "product"])
def test_the_official_run_of_a_whole_transformer(rule: str) -> None:
    case = GOLDEN["e2e_tiny_flux"]
    about = case.options
    config = {k: v for k, v in about["transformer"].items() if k != "cls"}
    model = FluxTransformer2DModel(**{**config, "axes_dims_rope": tuple(config["axes_dims_rope"])})
    model.load_state_dict({k[6:]: v for k, v in case.tensors.items() if k.startswith("model.")})
    editor = Editor(
        model.requires_grad_(False),
        case["x"],
        case["ref"],
        tuple(about["grid"]),
        case["sigmas"],
        guidance=torch.tensor([about["guidance"]]),
        pooled_projections=case["pooled"],
        encoder_hidden_states=case["prompt_embeds"],
        txt_ids=torch.zeros(about["text_tokens"], 3),
    )
    calls: list[tuple[int, int]] = []
    model.x_embedder.register_forward_hook(lambda m, a, o: calls.append((editor.scheduler.step_index, o.shape[1])))
    with applied(editor, preset="kontext", eta=about["eta"], delta=about["delta"], factor=rule) as run:
        editor.scheduler.set_begin_index(0)
        out = editor()
    want = case["latents" if rule == "last" else "latents_product"]
    assert torch.allclose(out, want, **case.tolerance)
    assert [tokens for _, tokens in calls] == case.expected["sequence_per_call"]
    report = run.report()
    assert report.last is not None
    assert report.strip() == "CCCCCCmpppmppppCpppppmpmmmCC"
    computed = [step.n for step in report.last.steps if step.state in ("computed", "mixed")]
    assert computed == case.expected["network_calls"]
    assert report.last.extra["regione"]["edited"] == [len(case["edited"])]
