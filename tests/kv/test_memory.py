"""Bytes are counted from storages, and are close to the arithmetic minimum."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import elision
from elision.session import storage_bytes
from tests.kv.models import TINY


@pytest.fixture(scope="module")
def model() -> AutoModelForCausalLM:
    """Heads as wide as real ones, so that positions and scores weigh what they do in practice."""
    config = AutoConfig.for_model("llama", **{**TINY, "head_dim": 64, "max_position_embeddings": 2048})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h2o", {"budget": 128}),
        ("snapkv", {"budget": 128, "window": 16}),
        ("cake", {"budget": 128, "window": 16, "coupled": True}),
        ("layer_shared", {"budget": 128}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bytes_held(model: torch.nn.Module, name: str, options: dict[str, int], dtype: torch.dtype) -> None:
    model = model.to(dtype)
    ids = torch.randint(10, 64, (2, 600))
    with elision.apply(model, name, **options) as run:
        cache = run.cache()
        model(ids, past_key_values=cache)
        tensors = [t for layer in cache.layers for t in layer.store.dense.tensors()]
        assert run.report().bytes_held == storage_bytes(tensors)
        least = 2 * 2 * 128 * 2 * 2 * 64 * torch.finfo(dtype).bits // 8  # layers, batch, slots, k and v, heads, width
        assert run.report().bytes_held <= 1.05 * least
        for token in range(10, 40):
            model(torch.full((2, 1), token), past_key_values=cache)
            slots = sum(layer.store.n for layer in cache.layers)
            least = 2 * slots * 2 * 2 * 64 * torch.finfo(dtype).bits // 8
            assert run.report().bytes_held <= 1.15 * least
        report = run.report()
    assert report.bytes_full == 2 * 2 * 630 * 2 * 2 * 64 * torch.finfo(dtype).bits // 8
    assert report.bytes_peak < report.bytes_full
    model.float()


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        # per element, parameters included: MiKV's closed form, and codes with their parameters for the others
        ("mikv", {}, 0.2 * 16 + 0.8 * 3),
        ("mikv", {"hi_bits": 8, "lo_bits": 4}, 0.2 * 9 + 0.8 * 5),
        ("zipcache", {"gap": 1000}, 0.6 * 4 + 0.4 * 2 + 2 * 16 / 600 + 16 / 128),
        ("uniform_rtn", {"bits": 2, "residual": 0}, 3),
    ],
)
@torch.no_grad()
def test_bytes_of_packed_tokens(model: torch.nn.Module, name: str, options: dict[str, int], bits: float) -> None:
    """Positions, scores and growth cost at most 15 % on top of codes and parameters."""
    model = model.bfloat16()
    ids = torch.randint(10, 64, (2, 608))
    with elision.apply(model, name, **options) as run:
        cache = run.cache()
        model(ids, past_key_values=cache)
        for step in range(30):
            report = run.report()
            exact = step if name in ("zipcache", "uniform_rtn") else 0  # new tokens wait until there are enough of them
            least = 2 * 2 * 2 * 2 * 64 * (exact * 16 + (608 + step - exact) * bits) / 8  # layers, batch, k and v, heads
            assert report.bytes_held <= 1.15 * least
            model(ids[:, :1], past_key_values=cache)
    model.float()


@torch.no_grad()
def test_budgets_in_tokens_shares_and_bytes_are_one(model: torch.nn.Module) -> None:
    ids = torch.randint(10, 64, (1, 512))
    slot = 2 * 2 * 2 * 64 * 4  # layers, k and v, heads, width, float32
    held = []
    for budget in (128, 0.25, f"{slot * 128}B"):
        with elision.apply(model, "h2o", budget=budget) as run:
            model(ids)
            held.append(run.report().slots)
    assert held == [{0: 128, 1: 128}] * 3
