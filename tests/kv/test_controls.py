from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision.errors import OptionError
from elision.hooks.transformers import Attention
from elision.kv.method import KVMethod
from elision.kv.methods.knorm import Knorm
from elision.kv.methods.pyramidkv import PyramidKV
from elision.kv.methods.random import Random, draw
from elision.kv.methods.snapkv import SnapKV
from elision.kv.methods.streaming_llm import StreamingLLM
from elision.kv.methods.tova import TOVA
from elision.kv.methods.window import Window
from tests.kv.contracts import GROUPS, HEADS, LAYERS, Row, check_chunks, check_rows, feed, rig_of
from tests.kv.rig import Rig

HOLDING = [  # methods that hold their budget at every step
    Window(12),
    StreamingLLM(12, rolling=False),
    StreamingLLM(12, sinks=0, rolling=False),
    TOVA(12),
    TOVA(12, heads="group", recent=3),
    Knorm(12),
    Knorm(12, recent=4),
    Random(12),
    Random(12, seed=7, recent=4),
]
ALL = [*HOLDING, PyramidKV(14, window=5, beta=4), PyramidKV(14, window=5, slope="exact"), Knorm(12, decode=False)]


def _share(method: KVMethod) -> KVMethod:
    return type(method)(**{**method.__dict__, "budget": 0.5})


@pytest.mark.parametrize("method", [*ALL, *(_share(m) for m in ALL)], ids=repr)
def test_rows_are_like_single_runs(method: KVMethod) -> None:
    """Left padding, budgets by each row's own length, a second turn."""
    check_rows(method, (30, 17, 4), 5, (8, 8, 8), 2)


@pytest.mark.parametrize("method", [m for m in HOLDING if not getattr(m, "recent", 0)], ids=repr)
def test_rows_are_like_single_runs_with_turns_of_their_own_length(method: KVMethod) -> None:
    check_rows(method, (30, 17, 6), 2, (3, 9, 1), 2)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_chunks_are_one_prompt(method: KVMethod) -> None:
    check_chunks(method, 30, (13, 27, 29), 3)


@pytest.mark.parametrize("method", HOLDING, ids=repr)
def test_budgets_hold_while_decoding(method: KVMethod) -> None:
    """Never more than the budget, once there are as many, and one token less per step."""
    row, rig = Row.random(60, 1), rig_of(method)
    at = 0
    for size in (9, 1, 1, 1, 1, 1, 12, 1, 1):
        feed(rig, [row], [at], [size], "step" if size == 1 else "prompt_end")
        at += size
        assert {rig.kept(layer).shape[-1] for layer in range(LAYERS)} == {min(at, 12)}
        assert {store.dense.n for store in rig.book.stores.values()} == {min(at, 12)}


def _follow(method: KVMethod, prompt: int, total: int, choose: Any) -> None:
    """Kept sets against `choose(alive [G, t], weights of the last row [Hq, t], k [G, t, D], layer)` at every step."""
    row, rig = Row.random(total, 3), rig_of(method)
    alive = torch.zeros(LAYERS, GROUPS, total, dtype=torch.bool)
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, total))]:
        feed(rig, [row], [start], [stop - start], "prompt_end" if start == 0 else "step")
        alive[:, :, start:stop] = True
        for layer in range(LAYERS):
            k = row.k[layer][0, :, :stop]
            logits = (row.q[layer][0, :, stop - 1 : stop] @ k.repeat_interleave(HEADS // GROUPS, 0).mT)[:, 0] / 8**0.5
            hidden = ~alive[layer, :, :stop].repeat_interleave(HEADS // GROUPS, 0)
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            alive[layer, :, :stop] = choose(alive[layer, :, :stop], weights, k, layer)
            held = rig.kept(layer)[0].expand(GROUPS, -1)
            assert held.tolist() == [head.nonzero().flatten().tolist() for head in alive[layer, :, :stop]]


def _best(alive: Tensor, score: Tensor, count: int) -> Tensor:
    score = score.expand(GROUPS, -1).masked_fill(~alive, -torch.inf)
    keep = torch.zeros_like(alive).scatter_(-1, score.topk(min(count, score.shape[-1])).indices, True)
    return keep & alive


def _recent(score: Tensor, count: int) -> Tensor:
    score = score.clone()
    score[..., max(score.shape[-1] - count, 0) :] = torch.inf
    return score


def test_window_keeps_the_newest() -> None:
    _follow(Window(7), 20, 26, lambda alive, *_: alive & (torch.arange(alive.shape[1]) >= alive.shape[1] - 7))


@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_streaming_keeps_sinks_and_the_newest(sinks: int) -> None:
    def choose(alive: Tensor, *_: Any) -> Tensor:
        index = torch.arange(alive.shape[1])
        return alive & ((index < sinks) | (index >= alive.shape[1] - (9 - sinks)))

    _follow(StreamingLLM(9, sinks=sinks, rolling=False), 20, 26, choose)


@pytest.mark.parametrize("recent", [0, 2])
def test_tova_keeps_the_highest_weights_of_the_last_row(recent: int) -> None:
    _follow(TOVA(8, recent=recent), 20, 30, lambda alive, w, *_: _best(alive, _recent(w.mean(0), recent), 8))
    by_group = TOVA(8, heads="group", recent=recent)
    _follow(by_group, 20, 30, lambda alive, w, *_: _best(alive, _recent(w.view(GROUPS, 2, -1).mean(1), recent), 8))


def test_tova_may_drop_the_newest_token() -> None:
    rig = Rig(TOVA(3))
    k = torch.eye(4)[None, None]
    rig.feed(0, torch.zeros(1, 1, 3, 4), k[:, :, :3], phase="prompt_end")
    rig.feed(0, torch.tensor([[[[1.0, 1.0, 1.0, -1.0]]]]), k[:, :, 3:])
    assert rig.kept()[0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("recent", [0, 3])
def test_knorm_keeps_the_smallest_keys(recent: int) -> None:
    _follow(Knorm(8, recent=recent), 20, 30, lambda alive, w, k, _: _best(alive, _recent(-k.norm(dim=-1), recent), 8))


def test_knorm_spares_layers() -> None:
    rig = rig_of(Knorm(8, skip=(0, 2)))
    feed(rig, [Row.random(20, 0)], [0], [20], "prompt_end")
    assert [rig.kept(layer).shape[-1] for layer in range(3)] == [20, 8, 20]
    with pytest.raises(OptionError, match=r"names layers \[5\]"):
        rig_of(Knorm(8, skip=(1, 5)))
    with pytest.raises(OptionError, match="give their indices"):
        Knorm(8, skip=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("recent", [0, 3])
def test_random_keeps_the_highest_draws(recent: int) -> None:
    def choose(alive: Tensor, _: Tensor, k: Tensor, layer: int) -> Tensor:
        drawn = draw(torch.arange(alive.shape[1])[None, None], 5, layer, GROUPS)[0]
        return _best(alive, _recent(drawn, recent), 8)

    _follow(Random(8, seed=5, recent=recent), 20, 30, choose)


def test_random_draws_are_uniform_and_apart() -> None:
    index = torch.arange(20_000)[None, None]
    drawn = torch.cat([draw(index, seed, layer, 3)[0] for seed in (0, 1) for layer in (0, 1)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.stack([row.mul(20).long().bincount(minlength=20) for row in drawn]).float()
    chi2 = ((counts - 1000) ** 2 / 1000).sum(-1)
    assert (chi2 < 50).all()  # 19 degrees of freedom: about one in 10,000
    assert (torch.corrcoef(drawn).fill_diagonal_(0).abs() < 0.04).all()
    following = torch.corrcoef(torch.stack([drawn[0, :-1], drawn[0, 1:]]))[0, 1]
    assert following.abs() < 0.04
    assert (drawn.int() == 0).all()


def test_random_survives_copies() -> None:
    row, rig = Row.random(40, 0), rig_of(Random(10, seed=3))
    feed(rig, [row], [0], [25], "prompt_end")
    twin = copy.copy(rig)
    twin.book = copy.deepcopy(rig.book)
    torch.manual_seed(99)
    for t in range(25, 40):
        feed(rig, [row], [t], [1], "step")
    for t in range(25, 40):
        feed(twin, [row], [t], [1], "step")
    assert all(torch.equal(rig.kept(layer), twin.kept(layer)) for layer in range(LAYERS))
    other = rig_of(Random(10, seed=4))
    feed(other, [row], [0], [25], "prompt_end")
    assert not torch.equal(other.kept(0), rig_of(Random(10, seed=3)).kept(0))


# -- PyramidKV ---------------------------------------------------------------------------------------------------------


def test_pyramid_budgets() -> None:
    """The released arithmetic, worked by hand: c 1024, w 32, 32 layers, 4000 tokens."""
    method = PyramidKV(1024)
    budgets = [method.middle(layer, 32, 4000, 1024) for layer in range(32)]
    low, high = 992 // 20, 2 * 992 - 992 // 20  # 49 and 1935
    assert budgets[0] == high == 1935
    assert budgets[1] == 1935 - (1935 - low) // 31 == 1935 - 60
    assert budgets[31] == 1935 - 31 * 60 == 75
    assert 992 * 32 <= sum(budgets) <= 992 * 32 + 32 * 31 // 2
    exact = [PyramidKV(1024, slope="exact").middle(layer, 32, 4000, 1024) for layer in range(32)]
    assert (exact[0], exact[31]) == (high, low)
    assert 992 * 32 - 32 < sum(exact) <= 992 * 32
    # a prompt too short for the first layer's budget: it keeps all, the last layer what remains
    steep = PyramidKV(1024, beta=50)
    short = [steep.middle(layer, 32, 1990, 1024) for layer in range(32)]
    assert 2 * 992 - 992 // 50 > short[0] == 1990 - 32
    assert short[31] == 1958 - 31 * ((1958 - (2 * 992 - 1958)) // 31)
    assert {method.middle(layer, 32, 1983, 1024) for layer in range(32)} == {992}
    assert {method.middle(layer, 32, 1000, 1024) for layer in range(32)} == {968}
    assert method.middle(0, 1, 5000, 1024) == 992


@pytest.mark.parametrize("length", [10, 21, 30, 33, 60])
def test_pyramid_keeps_the_best_of_every_layer(length: int) -> None:
    """Against brute force: summed weights of the window, pooled, the budget of the layer."""
    row, method, w = Row.random(length, 2), PyramidKV(21, window=5, beta=4), 5
    rig = rig_of(method)
    feed(rig, [row], [0], [length], "prompt_end")
    for layer in range(LAYERS):
        q, k = row.q[layer][0, :, -w:], row.k[layer][0].repeat_interleave(2, 0)
        rows = q.shape[1]
        logits = q @ k.mT / 8**0.5 + torch.full((rows, length), -torch.inf).triu(length - rows + 1)
        summed = logits.softmax(-1)[..., : length - rows].sum(1).view(GROUPS, 2, -1).mean(1)
        pooled = torch.nn.functional.avg_pool1d(summed, 5, 1, 2)
        count = method.middle(layer, LAYERS, length, 21)
        assert count == min(method.middle(layer, LAYERS, length, 21), length - w)
        best = pooled.topk(count).indices.sort(-1).values
        window = torch.arange(length - w, length).expand(GROUPS, -1)
        assert torch.equal(rig.kept(layer)[0].expand(GROUPS, -1), torch.cat([best, window], -1))


def test_pyramid_without_slope_is_snapkv() -> None:
    row, pyramid, snap = Row.random(30, 2), rig_of(PyramidKV(21, window=5)), rig_of(SnapKV(21, window=5))
    for rig in (pyramid, snap):
        feed(rig, [row], [0], [30], "prompt_end")  # 21 <= 30 < 2 * 16: even budgets
    assert all(torch.equal(pyramid.kept(layer), snap.kept(layer)) for layer in range(LAYERS))


# -- StreamingLLM's positions and turns --------------------------------------------------------------------------------


def _tiny(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes, **more)).eval()


@torch.no_grad()
def _logits(model: Any, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    cache, outs, at = None, [], 0
    for size in sizes:
        out = model(ids[:, at : at + size], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + size
        outs.append(out.logits[:, -1])
    return torch.stack(outs, 1)


def test_streaming_positions_are_those_of_the_tokens_held() -> None:
    """With one layer, keys depend on their own token only: a stream equals a fresh read of what is held."""
    model, ids = _tiny(), torch.randint(0, 50, (1, 40))
    with elision.apply(model, "streaming_llm", budget=10, sinks=3):
        stream = _logits(model, ids, [20] + [1] * 20)
    for t in range(20, 40):
        text = torch.cat([ids[:, :3], ids[:, t - 7 : t + 1]], 1)
        torch.testing.assert_close(stream[:, t - 19], model(text).logits[:, -1], atol=1e-5, rtol=0)
    with elision.apply(model, "streaming_llm", budget=10, sinks=3, rolling=False):
        true = _logits(model, ids, [20] + [1] * 20)
    assert (true - stream)[:, 5:].abs().max() > 1e-4
    with elision.apply(model, "window", budget=7):
        window = _logits(model, ids, [20] + [1] * 20)
    with elision.apply(model, "streaming_llm", budget=7, sinks=0):
        torch.testing.assert_close(_logits(model, ids, [20] + [1] * 20), window, atol=1e-5, rtol=0)


def test_streaming_makes_room_before_a_turn() -> None:
    row, rig = Row.random(60, 0), rig_of(StreamingLLM(12, sinks=2, rolling=False, room=True))
    feed(rig, [row], [0], [30], "prompt_end")
    seen = feed(rig, [row], [30], [4], "prompt_end")
    k = torch.cat([row.k[0][:, :, :2], row.k[0][:, :, 24:34]], 2)  # sinks and the newest 6, then the turn
    q = row.q[0][:, :, 33:34]
    weights = (q.view(1, 2, 2, 8) @ k.mT / 8**0.5).softmax(-1)
    v = torch.cat([row.v[0][:, :, :2], row.v[0][:, :, 24:34]], 2)
    torch.testing.assert_close(seen[0][:, :, -1], (weights @ v).reshape(1, 4, 8), atol=1e-5, rtol=0)
    assert rig.kept(0)[0, 0].tolist() == [0, 1, *range(24, 34)]
    feed(rig, [row], [34], [15], "prompt_end")
    assert rig.kept(0)[0, 0].tolist() == [0, 1, *range(39, 49)]


def test_bytes_are_a_budget() -> None:
    slot = GROUPS * 2 * 8 * 4
    rig = rig_of(Window(f"{LAYERS * 9 * slot}B"))
    feed(rig, [Row.random(30, 0)], [0], [30], "prompt_end")
    assert {rig.kept(layer).shape[-1] for layer in range(LAYERS)} == {9}


def test_options() -> None:
    with pytest.raises(OptionError, match="leaves no room beside sinks=4"):
        StreamingLLM(4)
    with pytest.raises(OptionError, match="smaller than window=32"):
        PyramidKV(16)
    with pytest.raises(OptionError, match="beta=0 is out of range"):
        PyramidKV(beta=0)
    with pytest.raises(OptionError, match="0 tokens is out of range"):
        Window(0)
    with pytest.raises(OptionError, match="heads='some'"):
        TOVA(heads="some")


def test_knorm_keeps_the_newest_of_equal_keys() -> None:
    """Rotation blurs equal norms in their last bits; neither that nor the order of slots decides."""
    torch.manual_seed(0)
    k = torch.randn(1, 1, 30, 8)
    k = k / k.norm(dim=-1, keepdim=True) * (1 + 1e-7 * torch.randn(30, 1))
    rig = Rig(Knorm(8))
    rig.feed(0, k[:, :, :20], k[:, :, :20], phase="prompt_end")
    for t in range(20, 30):
        rig.feed(0, k[:, :, t : t + 1], k[:, :, t : t + 1])
        assert rig.kept()[0, 0].tolist() == list(range(t - 7, t + 1))


# -- on models ---------------------------------------------------------------------------------------------------------

ON_MODELS = [
    ("cake", {"budget": 14, "window": 5}),
    ("cake", {"budget": 0.4, "window": 5, "decode_order": "released"}),
    ("pyramidkv", {"budget": 14, "window": 5, "beta": 4}),
    ("tova", {"budget": 14}),
    ("tova", {"budget": 0.4, "heads": "group", "recent": 2}),
    ("streaming_llm", {"budget": 14}),
    ("streaming_llm", {"budget": 0.4}),
    ("knorm", {"budget": 14}),
    ("random", {"budget": 14}),
    ("window", {"budget": 0.4}),
]
LENGTHS = (24, 17, 6)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
    made = {"llama": LlamaForCausalLM(LlamaConfig(**sizes)), "qwen3": Qwen3ForCausalLM(Qwen3Config(**sizes))}
    for model in made.values():
        for weight in model.parameters():
            weight.data.mul_(4 if weight.ndim > 1 else 1)  # attention that is far from even
    return {name: model.eval() for name, model in made.items()}


def _held(run: Any, cache: Any, row: int, pads: int) -> list[list[list[int]]]:
    held = [layer[row].expand(2, -1).tolist() for layer in run.kept(cache).values()]
    return [[[p - pads for p in head if p >= 0] for head in layer] for layer in held]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("name", "options"), ON_MODELS, ids=str)
def test_generation(models: dict[str, Any], kind: str, name: str, options: dict[str, Any]) -> None:
    """A padded batch, single rows and chunks hold the same tokens and give the same logits; beams agree as well."""
    torch.manual_seed(1)
    model, most = models[kind], max(LENGTHS)
    ids = [torch.randint(1, 60, (1, n)) for n in LENGTHS]
    batch = torch.cat([torch.nn.functional.pad(row, (most - row.shape[1], 0)) for row in ids])
    mask = torch.stack([torch.arange(most) >= most - n for n in LENGTHS]).long()
    greedy = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    beams = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with elision.apply(model, name, **options) as run:
        together = run.cache()
        out = model.generate(batch, attention_mask=mask, past_key_values=together, **greedy)
        searched = model.generate(batch, attention_mask=mask, **beams)
        for i, row in enumerate(ids):
            for more in ({}, {"prefill_chunk_size": 7}):
                alone = run.cache()
                single = model.generate(row, past_key_values=alone, **greedy, **more)
                for mine, others in zip(single.logits, out.logits, strict=True):
                    torch.testing.assert_close(mine[0], others[i], atol=1e-5, rtol=0)
                assert _held(run, alone, 0, 0) == _held(run, together, i, most - row.shape[1])
            assert torch.equal(model.generate(row, **beams)[0, row.shape[1] :], searched[i, most:])


@pytest.mark.parametrize(("name", "options"), ON_MODELS, ids=str)
def test_prompt_lookup_and_turns(models: dict[str, Any], name: str, options: dict[str, Any]) -> None:
    """Tokens that were guessed wrong leave again, and what is held is what a turn later reads."""
    torch.manual_seed(2)
    model = models["llama"]
    words = torch.randint(1, 60, (1, 12))
    with elision.apply(model, name, **options) as run:
        cache = run.cache()
        text = model.generate(
            torch.cat([words] * 3, 1),
            max_new_tokens=9,
            do_sample=False,
            prompt_lookup_num_tokens=3,
            past_key_values=cache,
        )
        for held in run.kept(cache).values():
            assert held.max() < text.shape[1]
            assert (held.diff(dim=-1) > 0).all()
        text = torch.cat([text, torch.randint(1, 60, (1, 8))], 1)
        text = model.generate(text, max_new_tokens=3, do_sample=False, past_key_values=cache)
        held, budget = run.kept(cache), options["budget"]
        limit = budget if isinstance(budget, int) else int(budget * text.shape[1])
        more = 3 if name == "pyramidkv" else 0  # nothing leaves while it decodes, and its slope is rounded up
        assert sum(layer.shape[-1] for layer in held.values()) <= 2 * (limit + more)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "glm", "cohere"])
def test_a_turn_is_the_models_own_to_the_bit(kind):
    """Halves (most models) take a short cut; interleaved pairs (GLM, Cohere) must not."""
    attention = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    owner = next(c for n, c in vars(attention).items() if n.endswith("Attention") and issubclass(c, torch.nn.Module))
    x, angles = torch.randn(2, 3, 5, 16), torch.randn(2, 5, 8)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    att = Attention(owner.__new__(owner), 0, x, x, x, None, (cos, sin), {})
    theirs = attention.apply_rotary_pos_emb(x, x, cos, sin)[1]
    assert torch.equal(att.turn(x, cos, sin), theirs)
