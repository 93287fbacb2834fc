"""Calls with live tokens: the K/V oracle, the recorded official layers, batches, refusals."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from elision.denoise import live as module
from elision.denoise.adapters import Adapter, BlockSpec, BranchSpec, adapter_for
from elision.denoise.live import Kept, LiveCalls, own, positions
from elision.errors import UnsupportedTarget
from tests.golden import cases
from tests.models import Loop, draw

GOLDEN = cases("regione")["kv_scatter"]
SIZE = 4
TOKENS = SIZE * SIZE


class Alone:
    """Live calls of one denoiser without a session."""

    def __init__(self, model: nn.Module, adapter: Adapter | None = None) -> None:
        book = SimpleNamespace(sign=lambda *_: 0, ran=Counter(), cut=Counter())
        self.step = SimpleNamespace(branch="")
        host: Any = SimpleNamespace(
            host=SimpleNamespace(adapter=adapter or adapter_for(model)),
            model=model,
            module=model.get_submodule,
            step=self.step,
            signature=0,
            book=book,
        )
        self.model, self.calls = model, LiveCalls(host, "test")
        self.taps = self.calls.taps()

    @torch.no_grad()
    def whole(self, keep: bool = True, **call: Any) -> Tensor:
        out: Tensor = self.calls.whole(self.model, (), {**call, "return_dict": False}, keep)[0]
        return out

    @torch.no_grad()
    def cut(self, live: Any, **call: Any) -> Tensor:
        out: Tensor = self.calls.cut(self.model, (), {**call, "return_dict": False}, live)[0]
        return out


def inputs(kind: str, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """A full call of an editing denoiser: noise tokens, then those of the picture."""
    loop = Loop(kind)
    picture = loop.picture(TOKENS).repeat(batch, 1, 1)
    x = torch.cat([draw(batch, TOKENS, 4, seed=seed), picture], dim=1)
    return {"hidden_states": x, "timestep": torch.full((batch,), 0.6), **loop.kind.inputs(batch, SIZE, 10)}


LIVE = {"some": [1, 2, 5, 6, 11], "last": [15], "all": list(range(TOKENS)), "none": []}


@pytest.mark.parametrize("kind", ["kontext", "qwen"])
@pytest.mark.parametrize("which", sorted(LIVE))
@pytest.mark.parametrize("batch", [1, 2])
def test_a_cut_call_equals_the_full_one(kind: str, which: str, batch: int) -> None:
    """At the same latent and time, for any live tokens, double and single streams, and rows of guidance branches."""
    alone, call, live = Alone(Loop(kind).model), inputs(kind, batch), torch.tensor(LIVE[which], dtype=torch.long)
    full = alone.whole(**call)
    part = alone.cut(live, **call)
    assert torch.allclose(part[:, live], full[:, live], atol=2e-6)
    rest = torch.ones(full.shape[1], dtype=torch.bool).index_fill(0, live, False)
    assert not part[:, rest].any()


@pytest.mark.parametrize("kind", ["kontext", "qwen"])
def test_it_breaks_without_any_of_its_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept keys of another latent are refreshed where tokens are live; compact positions are wrong ones."""
    live = torch.tensor(LIVE["some"])
    old, new = inputs(kind), inputs(kind)
    new["hidden_states"] = old["hidden_states"].clone()
    new["hidden_states"][:, live] += draw(1, len(live), 4, seed=9)
    model = Loop(kind).model
    full = Alone(model).whole(keep=False, **new)[:, live]

    def error() -> float:
        alone = Alone(model)
        alone.whole(**old)
        difference = alone.cut(live, **new)[:, live] - full
        for tap in alone.taps:
            tap.remove()
        return float(difference.norm() / full.norm())

    good = error()
    monkeypatch.setattr(module, "positions", lambda live, count, length, first: torch.arange(length))
    compact = error()
    monkeypatch.undo()
    monkeypatch.setattr(Kept, "write", lambda self, k, v, where, into=True: self)
    stale = error()
    monkeypatch.undo()
    monkeypatch.setattr(LiveCalls, "whole", lambda self, inner, args, kwargs, keep: inner(*args, **kwargs))
    alone_only = error()
    assert good < 0.5 * min(compact, stale, alone_only)


def test_keys_are_written_at_their_positions_and_stay() -> None:
    """The second cut call sees what the first one wrote; peeking leaves no trace."""
    alone, call, live = Alone(Loop("kontext").model), inputs("kontext"), torch.tensor(LIVE["some"])
    alone.whole(**call)
    before = {key: kept.k.clone() for key, kept in alone.calls.kept.items()}
    moved = inputs("kontext", seed=4)
    alone.calls.peeking = True
    peeked = alone.cut(live, **moved)
    assert all(torch.equal(kept.k, before[key]) for key, kept in alone.calls.kept.items())
    alone.calls.peeking = False
    assert torch.equal(alone.cut(live, **moved), peeked)
    for key, kept in alone.calls.kept.items():
        changed = (kept.k != before[key]).any(-1)[0].all(0).nonzero().flatten().tolist()
        text = [] if key[1] == "transformer_blocks.0.attn" else [0, 1, 2]  # in the first block it has seen no image yet
        assert changed == text + [3 + i for i in live.tolist()]
    assert len(alone.calls.kept) == 4


def test_images_with_regions_of_their_own() -> None:
    """Each image of a batch as if it were alone, with both guidance branches in one call, and one with nothing live."""
    live = [torch.tensor([0, 3, 7]), torch.tensor([2]), torch.tensor([], dtype=torch.long)]
    for kind in ("kontext", "qwen"):
        alone, model = Alone(Loop(kind).model), Loop(kind).model
        call = inputs(kind, 6)  # 3 images, twice
        alone.whole(**call)
        moved = {**inputs(kind, 6, seed=4)}
        out = alone.cut(live, **moved)
        for b, mine in enumerate(live[:2]):
            rows = [b, b + 3]
            single = Alone(model)
            single.whole(**pick(call, rows))
            want = single.cut(mine, **pick(moved, rows))
            assert torch.allclose(out[rows], want, atol=1e-6)
            for tap in single.taps:
                tap.remove()
        assert not out[[2, 5]].any()


def pick(call: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a call."""
    out = {}
    for name, value in call.items():
        rowed = not name.endswith("_ids")
        if isinstance(value, Tensor) and rowed:
            value = value[rows]
        elif isinstance(value, list):
            value = [value[r] for r in rows]
        out[name] = value
    return out


def test_branches_keep_their_own() -> None:
    alone, call = Alone(Loop("kontext").model), inputs("kontext")
    other = {**call, "encoder_hidden_states": draw(1, 3, 8, seed=77)}
    live = torch.tensor(LIVE["some"])
    for branch, mine in (("cond", call), ("uncond", other)):
        alone.step.branch = branch
        alone.whole(**mine)
    for branch, mine in (("uncond", other), ("cond", call)):
        alone.step.branch = branch
        assert torch.allclose(alone.cut(live, **mine)[:, live], alone.whole(False, **mine)[:, live], atol=2e-6)
    assert alone.calls.kept == {}  # a full call that keeps nothing frees what its branch has kept


class Layer(nn.Module):
    """One attention layer as a denoiser: text and image tokens in, both out."""

    def __init__(self, attn: nn.Module, rope: tuple[Tensor, Tensor], double: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": attn})])
        self.rope, self.double = rope, double
        self.text = torch.empty(0)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, ids: Tensor, return_dict: bool) -> Any:
        n = encoder_hidden_states.shape[1]
        rows = torch.cat([torch.arange(n), ids + n])
        rope = tuple(table[rows] for table in self.rope)
        attn = self.blocks[0]["attn"]
        if self.double:
            image, self.text = attn(hidden_states, encoder_hidden_states, image_rotary_emb=rope)
        else:
            both = attn(torch.cat([encoder_hidden_states, hidden_states], 1), image_rotary_emb=rope)
            self.text, image = both[:, :n], both[:, n:]
        return (image,)


@pytest.mark.parametrize("part", ["double_stream", "single_stream_batch2"])
def test_the_official_layers(part: str) -> None:
    """One full and two cut passes: outputs, and what is kept against the raw store after norm and rotation."""
    about = GOLDEN.options[part]
    mine = {k[len(part) + 1 :]: v for k, v in GOLDEN.tensors.items() if k.startswith(part)}
    double, heads, size = about["stream"] == "double", about["heads"], about["head_dim"]
    extra: dict[str, Any] = {"added_kv_proj_dim": heads * size, "context_pre_only": False} if double else {}
    attn = FluxAttention(
        heads * size, heads, size, bias=True, out_dim=heads * size, eps=1e-6, pre_only=not double, **extra
    )
    attn.load_state_dict({k[2:]: v for k, v in mine.items() if k.startswith("w.")})
    layer = Layer(attn.requires_grad_(False), (mine["rope_cos"], mine["rope_sin"]), double)
    branch = BranchSpec("attn", "joint")
    adapter = Adapter(
        "Layer", lists=("blocks",), blocks={"ModuleDict": BlockSpec((), (branch,))}, token_axes={"hidden_states": 1}
    )
    adapter.token_axes["ids"] = 0  # type: ignore[index]
    alone, tokens = Alone(layer, adapter), 2 * about["grid"][0] * about["grid"][1]
    ids, live = torch.arange(tokens), torch.tensor(about["edited"])
    out = alone.whole(hidden_states=mine["full_image"], encoder_hidden_states=mine["full_text"], ids=ids)
    assert torch.allclose(out, mine["full_image_out"], **GOLDEN.tolerance)
    assert torch.allclose(layer.text, mine["full_text_out"], **GOLDEN.tolerance)
    check_kept(alone, attn, mine, 0, double)
    for n in (1, 2):
        x = torch.zeros_like(mine["full_image"]).index_copy_(1, live, mine[f"live_image_{n}"])
        out = alone.cut(live, hidden_states=x, encoder_hidden_states=mine[f"live_text_{n}"], ids=ids)
        assert torch.allclose(out[:, live], mine[f"image_out_{n}"], **GOLDEN.tolerance)
        assert torch.allclose(layer.text, mine[f"text_out_{n}"], **GOLDEN.tolerance)
        check_kept(alone, attn, mine, n, double)


def check_kept(alone: Alone, attn: Any, mine: dict[str, Tensor], n: int, double: bool) -> None:
    """Kept keys are the official raw ones after norm and rotation, kept values are the official ones."""
    (kept,) = alone.calls.kept.values()
    raw_k, raw_v = (mine[f"{name}_cache_{n}"].unflatten(-1, (2, 16)) for name in "kv")
    skip = kept.k.shape[2] - raw_k.shape[1]  # in a double-stream layer the official store has no text
    assert skip == (3 if double else 0)
    cos, sin = (mine[f"rope_{name}"][skip:, None] for name in ("cos", "sin"))
    normed = attn.norm_k(raw_k)
    a, b = normed.unflatten(-1, (-1, 2)).unbind(-1)
    turned = normed * cos + torch.stack([-b, a], -1).flatten(-2) * sin
    assert torch.allclose(kept.k[:, :, skip:].transpose(1, 2), turned, **GOLDEN.tolerance)
    assert torch.allclose(kept.v[:, :, skip:].transpose(1, 2), raw_v, **GOLDEN.tolerance)


def test_residuals_of_a_controlnet_are_refused() -> None:
    alone, call = Alone(Loop("kontext").model), inputs("kontext")
    call["controlnet_block_samples"] = [torch.zeros(1, 2 * TOKENS, 16)]
    with pytest.raises(UnsupportedTarget, match="controlnet_block_samples has residuals for all"):
        alone.cut(torch.tensor([1]), **call)


def test_nested_arguments_cannot_be_taken_apart() -> None:
    alone, call = Alone(Loop("kontext").model), inputs("kontext", 2)
    call["joint_attention_kwargs"] = {"scale": 1.0}
    with pytest.raises(UnsupportedTarget, match="joint_attention_kwargs cannot be taken apart"):
        alone.cut([torch.tensor([1]), torch.tensor([2])], **call)


@pytest.mark.parametrize("first", [True, False])
def test_attention_that_is_not_seen_is_refused(first: bool) -> None:
    """A backend of its own in the first full call, or from the first cut call on."""
    model = Loop("kontext").model
    alone, call = Alone(model), inputs("kontext")

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(kwargs["hidden_states"]), torch.zeros_like(kwargs["encoder_hidden_states"])

    attn: Any = model.transformer_blocks[1].attn  # type: ignore[index, union-attr]
    if not first:
        alone.whole(**call)
    attn.forward = elsewhere
    with pytest.raises(UnsupportedTarget, match=r"transformer_blocks.1.attn.*native"):
        alone.whole(**call) if first else alone.cut(torch.tensor([1]), **call)


def test_positions_of_text_and_tokens() -> None:
    live = torch.tensor([1, 4])
    assert positions(live, 6, 5, text_first=True).tolist() == [0, 1, 2, 4, 7]
    assert positions(live, 6, 5, text_first=False).tolist() == [1, 4, 6, 7, 8]


def test_parts_of_larger_tensors_are_copied() -> None:
    fused = torch.randn(2, 5, 12)
    q, k, _ = fused.chunk(3, -1)
    assert own(k).untyped_storage().nbytes() == 2 * 5 * 4 * 4
    whole = torch.randn(2, 5, 4).transpose(1, 2)
    assert own(whole) is not whole
    assert own(whole).data_ptr() == whole.data_ptr()
    assert q.shape == k.shape


def test_masks_follow_the_sequence() -> None:
    mask = torch.arange(12.0).view(1, 1, 3, 4)
    k = torch.zeros(1, 1, 4, 2)
    assert torch.equal(Kept(k, k, mask).mask_for(torch.tensor([0, 2])), mask[:, :, [0, 2]])  # type: ignore[arg-type]
    flat = mask[:, :, :1]
    assert Kept(k, k, flat).mask_for(torch.tensor([0, 2])) is flat
    assert Kept(k, k, None).mask_for(torch.tensor([0])) is None
