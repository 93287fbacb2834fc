"""ProfilingDiT's offline part: attention as it is seen, the foreground in it, and what is made of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision.denoise.fit._attention import received
from elision.denoise.fit.profilingdit import (
    Masked,
    foreground_of,
    foreground_ratio,
    frames_of,
    otsu,
    principal_components,
    segment,
)
from elision.denoise.flops import FlopBook
from elision.denoise.methods.profilingdit import ProfilingDiT, runs_of
from elision.errors import OptionError, UnsupportedTarget
from tests.models import KINDS, Loop, changed, draw, snapshot

BLOCKED = [kind for kind, about in KINDS.items() if about.blocks and not about.edits]
STEPS = 9
EARLY: dict[str, Any] = {"warmup_steps": 2, "schedule": "uniform", "interval": 3}  # refresh 2, 5, 8


@pytest.fixture(autouse=True)
def no_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting FLOPs takes longer than a tiny run, and conformance checks them."""
    monkeypatch.setattr(FlopBook, "totals", lambda self: None)


def attention(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_streaming_equals_dense(chunk: int) -> None:
    q, k = draw(2, 3, 7, 4, seed=0), draw(2, 3, 7, 4, seed=1)
    dense = attention(q, k).mean(dim=(1, 2))
    streamed = received(q, k, chunk=chunk)
    torch.testing.assert_close(streamed, dense)
    torch.testing.assert_close(streamed.sum(-1), torch.ones(2))


def test_streaming_knows_groups_masks_scales_and_text() -> None:
    q, k = draw(2, 4, 6, 4, seed=0), draw(2, 2, 6, 4, seed=1)
    wide = k.repeat_interleave(2, dim=1)
    torch.testing.assert_close(received(q, k), received(q, wide))
    torch.testing.assert_close(received(q, wide, scale=1.0), received(2 * q, wide))
    keep = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    keep[..., 4:] = False
    padded = received(q, wide, mask=keep)
    assert not padded[:, 4:].any()
    torch.testing.assert_close(padded, received(q, wide, mask=torch.zeros(2, 1, 1, 6).masked_fill(~keep, -1e30)))
    rows = torch.ones(6, 6, dtype=torch.bool).tril()
    causal = (q @ wide.transpose(-1, -2) / 2).masked_fill(~rows, -torch.inf).softmax(-1).mean(dim=(1, 2))
    torch.testing.assert_close(received(q, wide, mask=rows, chunk=4), causal)
    joint = attention(q, wide)[:, :, 2:, 2:].sum(dim=(1, 2))
    torch.testing.assert_close(received(q, wide, image=slice(2, 6), chunk=3), joint / joint.sum(-1, keepdim=True))


def test_all_attention_on_the_foreground_gives_one_and_on_the_background_none() -> None:
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :3] = True
    on = mask.flatten().float() / mask.sum()
    off = (~mask).flatten().float() / (~mask).sum()
    assert foreground_ratio(on, mask, 1 / 16) == 1
    assert foreground_ratio(off, mask, 1 / 16) == 0
    half = torch.zeros(2, 8)
    half[0, :3] = 1 / 3
    assert foreground_ratio(half.flatten(), mask, 1 / 16) == 0.5
    mask[1] = False  # a frame without foreground does not count
    assert foreground_ratio(half.flatten(), mask, 1 / 16) == 1
    assert foreground_ratio(on, torch.zeros(2, 8), 1 / 16).isnan()


def scene(channels: int = 4) -> tuple[Tensor, Tensor]:
    """Two moving squares on a textured background, [2, C, 3, 8, 8], and where they are, [2, 3, 8, 8]."""
    mask = torch.zeros(2, 3, 8, 8, dtype=torch.bool)
    for b in range(2):
        for f in range(3):
            mask[b, f, 2 + b : 5 + b, 1 + f : 5 + f] = True
    background, inside = draw(channels, seed=5), draw(channels, seed=6)
    video = torch.where(mask[:, None], 3 * inside.view(1, -1, 1, 1, 1), background.view(1, -1, 1, 1, 1))
    return video + 0.2 * draw(*video.shape, seed=7), mask


@pytest.mark.parametrize("how", ["kmeans", "otsu"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_found_without_being_told(how: Any, sign: int) -> None:
    video, mask = scene()
    found = foreground_of(sign * video, 3 * 64, how)
    assert (found.reshape(mask.shape) == mask).float().mean() > 0.98
    halved = foreground_of(video.repeat_interleave(2, -1).repeat_interleave(2, -2), 3 * 64, how)
    assert torch.equal(halved, foreground_of(video, 3 * 64, how))
    tokens = video[:, :, 0].flatten(2).transpose(1, 2)
    image = foreground_of(video[:, :, 0], 64, how)
    assert torch.equal(foreground_of(tokens, 64, how), image)


def test_principal_components_are_those_of_all_frames_together() -> None:
    video, _ = scene(6)
    rows = frames_of(video)
    out = principal_components(rows)
    assert out.shape == (2, 3, 8, 8, 3)
    flat = out[0].flatten(0, 2)
    variances = torch.linalg.svdvals((rows[0].flatten(0, 2) - rows[0].flatten(0, 2).mean(0)).double())[:3].square()
    assert torch.allclose((flat.T @ flat).diagonal(), variances)
    assert principal_components(rows[..., :2]).shape[-1] == 2


def test_otsu_splits_two_heaps() -> None:
    values = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1])
    assert 0.2 < float(otsu(values)) < 5.0
    flat = torch.zeros(4, 4, 3)
    assert segment(flat, "kmeans").shape == (4, 4)


def test_a_grid_that_does_not_fit_asks_for_masks() -> None:
    with pytest.raises(UnsupportedTarget, match=r"3x8x8 does not lie on 50 square patches.*Masked"):
        foreground_of(scene()[0], 50, "otsu")


def dense_received(loop: Loop, path: str, run: Any) -> Tensor:
    """Column means of one Wan block by hand, from the inputs of its attention."""
    attn = loop.model.get_submodule(path)
    caught: list[Any] = []
    handle = attn.register_forward_pre_hook(lambda m, a, k: caught.append((a, k)), with_kwargs=True)
    run()
    handle.remove()
    (args, kwargs) = caught[-1]
    x = args[0] if args else kwargs["hidden_states"]
    q, k = (
        norm(proj(x)).unflatten(2, (attn.heads, -1))
        for norm, proj in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
    )  # type: ignore[operator, union-attr, arg-type]
    cos, sin = args[3] if len(args) > 3 else kwargs["rotary_emb"]

    def rotate(h: Tensor) -> Tensor:
        a, b = h.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[..., 0::2], sin[..., 1::2]
        return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)

    q, k = rotate(q).transpose(1, 2), rotate(k).transpose(1, 2)
    return attention(q, k).mean(dim=(1, 2))


def test_fit_reads_the_attention_of_every_block() -> None:
    loop = Loop("wan")
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[:, :2] = True
    profile = elision.fit(loop, "profilingdit", calls=[Masked({"steps": STEPS}, mask)], warmup_steps=8, **_list(8))
    assert profile.facts["steps"] == [8]
    for i in range(2):
        mean = dense_received(loop, f"blocks.{i}.attn1", lambda: loop(steps=STEPS))
        want = foreground_ratio(mean, mask, 1 / 8)
        torch.testing.assert_close(profile.tensors["ratio"][0, i], want[0])


def _list(start: int) -> dict[str, Any]:
    return {"refresh": (start,)}


@pytest.mark.parametrize("kind", BLOCKED)
@pytest.mark.parametrize("segmentation", ["kmeans", "otsu"])
def test_fit_and_apply_everywhere(kind: str, segmentation: str) -> None:
    """R in [0, 1] for every block, lists that partition the blocks, and a cached run that counts right."""
    loop = Loop(kind)
    before = snapshot(loop.model, loop.scheduler)
    calls = [{"steps": STEPS, "mode": "batched", "seed": s} for s in (1, 2)]
    profile = elision.fit(loop, "profilingdit", calls=calls, segmentation=segmentation, **EARLY)
    left = [key for key in changed(before, snapshot(loop.model, loop.scheduler)) if "step_index" not in key]
    assert [key for key in left if "timesteps" not in key and "sigmas" not in key and "num_inference" not in key] == []
    ratio, depth = profile.tensors["ratio"], KINDS[kind].blocks
    assert ratio.shape == (STEPS - 2, depth)
    known = ratio[~ratio.isnan()]  # a step without any foreground on so small a grid is unknown
    assert len(known) > depth
    assert ((known >= 0) & (known <= 1)).all()
    lists = [ProfilingDiT(cached=c, share=0.5).chosen(ratio) for c in ("background", "foreground")]  # type: ignore[arg-type]
    assert sorted(lists[0] + lists[1]) == list(range(depth))
    assert len(lists[0]) == round(depth / 2)
    assert ratio.nanmean(0)[list(lists[0])].max() <= ratio.nanmean(0)[list(lists[1])].min()
    counted = Counted(loop)
    with elision.apply(loop, "profilingdit", profile=profile, share=0.5, **EARLY) as run:
        loop(steps=STEPS, mode="batched")
    reuse = depth - len(lists[0])
    assert counted.rows == [reuse if n > 2 and n not in (5, 8) else depth for n in range(STEPS)]
    assert run.report().sites == {"profilingdit": len(_runs(loop, lists[0]))}  # type: ignore[attr-defined]


def _runs(loop: Loop, blocks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs that do not cross from Flux' two-stream blocks into its single-stream ones."""
    if loop.kind is not KINDS["flux"]:
        return runs_of(blocks)
    return runs_of([i for i in blocks if i < 2]) + runs_of([i for i in blocks if i >= 2])


class Counted:
    """How many blocks ran in every call of the denoiser."""

    def __init__(self, loop: Loop) -> None:
        self.rows: list[int] = []
        loop.model.register_forward_pre_hook(lambda *_: self.rows.append(0))
        for path in elision.denoise.adapters.adapter_for(loop.model).block_paths(loop.model):
            loop.model.get_submodule(path).register_forward_hook(lambda *_: self._one())

    def _one(self) -> None:
        self.rows[-1] += 1


def test_fit_refuses() -> None:
    loop = Loop("wan")
    how = {"refresh": (2,), "warmup_steps": 2}
    with pytest.raises(OptionError, match=r"a foreground of \(2, 5\) does not fit 1 samples of 8 tokens"):
        elision.fit(loop, "profilingdit", calls=[Masked({"steps": 4}, torch.ones(2, 5))], **how)
    with pytest.raises(OptionError, match="no step from warmup_steps=6 on"):
        elision.fit(loop, "profilingdit", calls=[{"steps": 4}])
    with pytest.raises(OptionError, match="no foreground"):
        elision.fit(loop, "profilingdit", calls=[Masked({"steps": 4}, torch.zeros(2, 4))], **how)
    with pytest.raises(UnsupportedTarget, match="UNet2DConditionModel"):
        elision.fit(Loop("unet"), "profilingdit", calls=[{"steps": 4}], **how)
    before = snapshot(loop.model)
    with pytest.raises(ZeroDivisionError):
        elision.fit(loop, "profilingdit", calls=[lambda target: 1 / 0], **how)
    assert changed(before, snapshot(loop.model)) == []
    loop.transformer_2 = Loop("wan", seed=1).model  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="2 denoisers"):
        elision.fit(loop, "profilingdit", calls=[{"steps": 4}], **how)


def test_an_attention_that_cannot_be_seen_is_named() -> None:
    loop = Loop("dit")

    class Own:
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden_states

    loop.model.transformer_blocks[1].attn1.processor = Own()  # type: ignore[index, union-attr]
    with pytest.raises(UnsupportedTarget, match=r"seen in transformer_blocks\.1"):
        elision.fit(loop, "profilingdit", calls=[{"steps": 4}], refresh=(2,), warmup_steps=2)
