"""What the adapters say of a class is what the class does."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import Tensor, nn

import elision
from elision.denoise.adapters import ADAPTERS, Adapter, adapter_for, supported
from elision.denoise.methods.profilingdit import ProfilingDiT
from elision.denoise.policy import Host
from elision.denoise.sites import Call, argument, parameter_names, split_tokens
from elision.errors import UnsupportedTarget
from tests.denoise.adapters.subjects import ClassLoop
from tests.denoise.adapters.table import SUBJECTS, stand_still

pytestmark = [
    pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning"),
    pytest.mark.usefixtures("no_flops"),
]
NAMES = pytest.mark.parametrize("name", SUBJECTS)
Seen = tuple[str, nn.Module, tuple[Any, ...], dict[str, Any], Any]


@functools.cache
def made(name: str) -> tuple[ClassLoop, Adapter]:
    loop = ClassLoop(SUBJECTS[name])
    return loop, adapter_for(loop.model)


@contextmanager
def watching(model: nn.Module, paths: list[str]) -> Iterator[list[Seen]]:
    """The calls of these modules, in the order in which they return."""
    seen: list[Seen] = []
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, kwargs, out, path=path: seen.append((path, module, args, kwargs, out)),
            with_kwargs=True,
        )
        for path in paths
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_every_adapter_is_under_test() -> None:
    classes = {type(made(name)[0].model).__name__ for name in SUBJECTS}
    assert classes == set(ADAPTERS)


@NAMES
def test_blocks_take_and_return_their_streams(name: str) -> None:
    """In the order that the adapter says, each of the shape it came in."""
    loop, adapter = made(name)
    paths = adapter.block_paths(loop.model)
    assert len(paths) == loop.kind.blocks
    with watching(loop.model, paths) as seen:
        loop(steps=1)
    assert [path for path, *_ in seen] == paths
    for path, block, args, kwargs, out in seen:
        streams = adapter.spec(loop.model, path).streams
        values = out if isinstance(out, tuple) else (out,)
        given = [argument(parameter_names(block), args, kwargs, stream) for stream in streams]
        assert adapter.image in streams
        assert len(values) == len(streams)
        for before, after in zip(given, values, strict=True):
            assert after is None or after.shape == before.shape  # SD3's last block drops its text


@NAMES
def test_streams_are_those_of_diffusers(name: str) -> None:
    """Where diffusers tells its own caches what a block returns, it says the same."""
    loop, adapter = made(name)
    for path in adapter.block_paths(loop.model):
        block, streams = loop.model.get_submodule(path), adapter.spec(loop.model, path).streams
        try:
            known = TransformerBlockRegistry.get(type(block))
        except ValueError:
            continue
        assert streams[known.return_hidden_states_index] == adapter.image
        if known.hidden_states_argument_name in parameter_names(block):  # diffusers misnames Z-Image's
            assert known.hidden_states_argument_name == adapter.image
        text = known.return_encoder_hidden_states_index
        assert len(streams) == (1 if text is None else 2)
        assert text is None or streams[text] == known.encoder_hidden_states_argument_name


@NAMES
def test_branches_are_called_in_order(name: str) -> None:
    """Once each, feeders before their tails; joint attention returns what the adapter says."""
    loop, adapter = made(name)
    sites = adapter.sites(loop.model, "branch", "test")
    with watching(loop.model, [path for site in sites for path in (*site.feeders, site.tail)]) as seen:
        loop(steps=1)
    called = [path for path, *_ in seen]
    assert sorted(called) == sorted({path for site in sites for path in site.modules})
    tails = [path for path in called if path in {site.tail for site in sites}]
    assert tails == [site.tail for site in sites]
    for site in sites:
        assert all(called.index(feeder) < called.index(site.tail) for feeder in site.feeders)
        out = seen[called.index(site.tail)][-1]
        assert isinstance(out, tuple) == bool(site.streams)
        assert len(out) <= len(site.streams) if site.streams else isinstance(out, Tensor)


@NAMES
def test_the_head_ends_the_denoiser(name: str) -> None:
    """Every number of a prediction comes out of the head, and nothing is computed on the way."""
    loop, adapter = made(name)
    if "head" not in adapter.levels:
        with pytest.raises(UnsupportedTarget, match=f"{adapter.model_class} has none: {adapter.lacks['head']}"):
            adapter.sites(loop.model, "head", "test")
        return
    (site,) = adapter.sites(loop.model, "head", "test")
    outs: list[Any] = []
    with watching(loop.model, [site.tail]) as seen, torch.no_grad():
        x = torch.randn(loop.kind.latent(1, 4))
        inputs = loop.kind.inputs(1, 4, 10)
        loop.call(x, torch.tensor(500.0), inputs)
        handle = loop.model.register_forward_hook(lambda *parts: outs.append(parts[-1]))
        loop.call(x, torch.tensor(500.0), inputs)
        handle.remove()
    out = adapter.show(outs[0][0] if isinstance(outs[0], tuple) else outs[0])
    from_head = set(seen[-1][-1].flatten().tolist())
    assert set(out.flatten().tolist()) <= from_head


@NAMES
def test_modulated_is_what_the_first_attention_is_given(name: str) -> None:
    """TeaCache's indicator, out of the block's arguments alone."""
    loop, adapter = made(name)
    if adapter.modulated is None:
        return
    path = adapter.block_paths(loop.model)[0]
    spec = adapter.spec(loop.model, path)
    with watching(loop.model, [path, f"{path}.{spec.branches[0].tail}"]) as seen, torch.no_grad():
        loop(steps=1)
        (_, _, attention, by_name, _), (_, block, args, kwargs, _) = seen
        names = parameter_names(block)
        inputs = {stream: argument(names, args, kwargs, stream) for stream in spec.streams}
        call = Call(inputs[adapter.image], names, args, kwargs, block, inputs=inputs)
        found = adapter.modulated(block, call)
    given = attention[0] if attention else by_name.get("hidden_states")
    assert torch.equal(found, given)


def _runs(depth: int) -> list[tuple[int, int]]:
    return [(first, stop) for first in range(depth) for stop in range(first + 1, depth + 1)]


def _hides(name: str, first: int, stop: int) -> bool:
    """Whether the run hides outputs that later blocks read: several blocks that are not the last ones."""
    return name == "HunyuanDiT" and stop - first > 1 and stop < 4


@NAMES
def test_runs_of_blocks_stand_in_rightly(name: str) -> None:
    """Every run of consecutive blocks; those that would hide what is read later are refused."""
    loop, _ = made(name)
    for first, stop in _runs(loop.kind.blocks):
        method = ProfilingDiT(blocks=tuple(range(first, stop)), warmup_steps=0, schedule="uniform", interval=9)
        if not _hides(name, first, stop):
            stand_still(loop, method, counting=False)
            continue
        with pytest.raises(UnsupportedTarget, match="late blocks read what early ones returned"):
            elision.apply(loop, method)


@NAMES
def test_supported_names_the_class(name: str) -> None:
    _, adapter = made(name)
    for level in ("head", "stack", "run", "branch"):
        assert (adapter.model_class in supported([level])) == (level in adapter.levels)  # type: ignore[list-item]
    assert supported(["model"]) == ("any denoiser",)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Flux2", {"kv_cache_mode": "extract"}),
        ("Z-Image", {"x": [], "t": torch.ones(1), "cap_feats": [], "siglip_feats": []}),
    ],
)
def test_arguments_with_which_nothing_can_be_kept_are_refused(name: str, arguments: dict[str, Any]) -> None:
    loop, adapter = made(name)
    (refused,) = adapter.refused
    says = f"{adapter.model_class} was called with {refused}, and then {adapter.refused[refused]}"
    with (
        elision.apply(loop.model, "uniform", steps=2, site="model"),
        pytest.raises(UnsupportedTarget, match=says),
    ):
        loop.model(**arguments)


def test_rows_of_different_sizes_are_refused() -> None:
    loop, _ = made("Z-Image")
    rows = [torch.zeros(4, 1, 4, 4), torch.zeros(4, 1, 4, 8)]
    with elision.apply(loop.model, "uniform", steps=2, site="model"), pytest.raises(UnsupportedTarget, match="list"):
        loop.model(rows, torch.ones(2), [torch.zeros(3, 8)] * 2)


def test_two_output_projections_are_no_head() -> None:
    loop, adapter = made("Z-Image")
    twice = type(loop.model)(**{**loop.model.config, "all_patch_size": (2, 4), "all_f_patch_size": (1, 1)})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedTarget, match=r"2 output projections \(2-1, 4-1\)"):
        Host(twice, adapter).site("head", "test")


def test_tokens_are_taken_apart_in_both_orders() -> None:
    tokens = torch.arange(5).reshape(1, 5, 1)
    image, text = split_tokens(tokens, 3, "image first")
    assert (image.flatten().tolist(), text.flatten().tolist()) == ([0, 1, 2], [3, 4])
    image, text = split_tokens(tokens, 3, "text first")
    assert (image.flatten().tolist(), text.flatten().tolist()) == ([2, 3, 4], [0, 1])
