from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import elision
from elision.kv.methods.h2o import H2O
from elision.kv.methods.mikv import MiKV, balancer, cache_size
from elision.kv.packed import RowTier
from tests.kv.rig import Rig


def _inputs(s: int, t: int = 0, *, heads: int = 4, groups: int = 2, d: int = 16, seed: int = 0) -> tuple[Tensor, ...]:
    """q [1, 2, Hq, S + T, D], k and v [1, 2, G, S + T, D]."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, h, s + t, d, generator=g) for h in (heads, groups, groups))


def _quantised(x: Tensor, bits: int, params: torch.dtype) -> Tensor:
    """I(x) of Eq. 1 on stored grids, in groups of D/2 channels, element by element of each group."""
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    for part in (slice(0, half), slice(half, None)):
        group = x[..., part]
        low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
        beta = low.to(params)
        assert torch.equal(beta.float(), low)  # the inputs are made so that float32 parameters are exact
        alpha = (high - beta.float()) / (2**bits - 1)
        codes = ((group - beta.float()) / alpha).round()
        out[..., part] = codes * alpha + beta.float()
    return out


def _tiers(rig: Rig) -> list[RowTier]:
    return list(rig.book.stores[0].tiers)  # type: ignore[arg-type]


@pytest.mark.parametrize("lo_bits", [2, 3, 4])
@pytest.mark.parametrize("balance", [True, False])
def test_ratio_zero_is_uniform_quantisation_bit_for_bit(lo_bits: int, balance: bool) -> None:
    q, k, v = _inputs(30)
    rig = Rig(MiKV(ratio=0.0, lo_bits=lo_bits, balance=balance, params="float32"))
    rig.feed(0, q[0], k[0], v[0], "prompt_end")
    q_max = q[0].abs().view(2, 2, 2, 30, 16).amax((2, 3))[:, :, None]  # [B, G, 1, D]
    b = (q_max / k[0].abs().amax(2, keepdim=True)).sqrt() if balance else torch.ones(2, 2, 1, 16)
    keys, values = rig.book.stores[0].read(rig.book.scratch)
    order = rig.order().argsort(-1)[..., None].expand(-1, -1, -1, 16)
    assert rig.book.stores[0].dense.n == 0
    assert torch.equal(keys.gather(2, order), _quantised(k[0] * b, lo_bits, torch.float32) / b)
    assert torch.equal(values.gather(2, order), _quantised(v[0], lo_bits, torch.float32))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_without_retained_tokens_it_is_h2o(heads: int, groups: int) -> None:
    """Token for token and output for output, with the budget frozen after the prompt."""
    q, k, v = _inputs(31, 20, heads=heads, groups=groups)
    mikv = Rig(MiKV(ratio=0.4, lo_bits="drop", size="prompt"))  # 12 tokens, 6 of them the newest
    h2o = Rig(H2O(heavy=6, recent=6, reduce="sum"))
    for a, b in zip(mikv.run(q, k, v, 31), h2o.run(q, k, v, 31), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(mikv.kept(), h2o.kept())
        assert mikv.kept().shape[-1] == 12


def test_without_retained_tokens_it_is_h2o_in_a_model(packing_model: Any) -> None:
    prompt = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    found = []
    for name, options in (
        ("mikv", {"ratio": 0.4, "lo_bits": "drop", "size": "prompt"}),
        ("h2o", {"heavy": 6, "recent": 6, "reduce": "sum"}),
    ):
        with elision.apply(packing_model, name, **options):
            kwargs: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            found.append(packing_model.generate(prompt, **kwargs))
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ratio_one_is_the_full_cache(packing_model: Any, attention: str) -> None:
    prompt = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    kwargs: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    was = packing_model.config._attn_implementation
    packing_model.set_attn_implementation(attention)
    try:
        expected = packing_model.generate(prompt, **kwargs)
        with elision.apply(packing_model, "mikv", ratio=1.0):
            assert torch.equal(packing_model.generate(prompt, **kwargs), expected)
    finally:
        packing_model.set_attn_implementation(was)


def test_balancer() -> None:
    """Both sides end at sqrt(max |q| max |k|); the logit is unchanged; dead channels are left alone."""
    q, k = torch.randn(50, 16), torch.randn(40, 16) * torch.logspace(-2, 2, 16)
    b = balancer(q.abs().amax(0), k.abs().amax(0))
    torch.testing.assert_close((q / b).abs().amax(0), (k * b).abs().amax(0))
    torch.testing.assert_close((k * b).abs().amax(0), (q.abs().amax(0) * k.abs().amax(0)).sqrt())
    torch.testing.assert_close((q / b) @ (k * b).T, q @ k.T, atol=1e-3, rtol=1e-5)
    q[:, 3], k[:, 5] = 0, 0
    b = balancer(q.abs().amax(0), k.abs().amax(0))
    assert b[3] == b[5] == 1
    huge = balancer(torch.tensor([6e4, 1.0]).half(), torch.tensor([1e-6, 6e4]).half())
    assert huge.tolist() == [1e4, pytest.approx(6e4**-0.5)]


@pytest.mark.parametrize("params", ["float16", "float32"])
def test_the_balancer_helps_with_outlier_channels(params: str) -> None:
    """Logits at two bits with one large key channel (as many models have) that queries hardly use."""
    q, k, v = _inputs(60, heads=4, groups=2)
    k = k.clone()
    k[..., 3] *= 30
    exact = q[0].view(2, 2, 2, 60, 16) @ k[0][:, :, None].transpose(-1, -2)
    error = {}
    for balance in (True, False):
        rig = Rig(MiKV(ratio=0.0, lo_bits=2, balance=balance, params=params))
        rig.feed(0, q[0], k[0], v[0], "prompt_end")
        keys = rig.book.stores[0].read(rig.book.scratch)[0]
        keys = keys.gather(2, rig.order().argsort(-1)[..., None].expand(-1, -1, -1, 16))
        logits = q[0].view(2, 2, 2, 60, 16) @ keys[:, :, None].transpose(-1, -2)
        error[balance] = float((logits - exact).square().mean())
    assert error[True] < error[False]


@pytest.mark.parametrize("size", ["ratio", "prompt"])
@pytest.mark.parametrize("hi_bits", [16, 8])
def test_tiers(size: Any, hi_bits: int) -> None:
    """Counts are exact, the newest stay, and what is demoted keeps the codes it got."""
    s, t, ratio = 33, 30, 0.3
    q, k, v = _inputs(s, t)
    rig, before = Rig(MiKV(ratio=ratio, size=size, hi_bits=hi_bits)), None
    for step, _ in enumerate(rig.run(q, k, v, s)):
        n_hi = int(ratio * (s + step if size == "ratio" else s) + 1e-9)
        store = rig.book.stores[0]
        lo = _tiers(rig)[0]
        hi = store.dense["pos"] if hi_bits == 16 else _tiers(rig)[1].meta["pos"]
        assert hi.shape[-1] == n_hi
        assert lo.meta.n == s + step - n_hi
        assert torch.equal(rig.kept(), torch.arange(s + step).expand(2, 2, -1))
        newest = hi.sort(-1).values[..., n_hi - n_hi // 2 :]
        assert torch.equal(newest.long(), torch.arange(s + step - n_hi // 2, s + step).expand_as(newest))
        codes = {name: lo.meta[name].clone() for name in ("pos", "kc", "kl", "ks", "vc", "vl", "vs")}
        if before is not None:
            for name, old in before.items():
                assert torch.equal(codes[name][:, :, : old.shape[2]], old), name
        before = codes


def test_important_tokens_are_the_heaviest_and_the_newest() -> None:
    q, k, v = _inputs(40)
    rig = Rig(MiKV(ratio=0.25))
    rig.feed(0, q[0], k[0], v[0], "prompt_end")
    logits = q[0].view(2, 2, 2, 40, 16) @ k[0][:, :, None].transpose(-1, -2) / 4
    sums = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1).sum((2, 3))
    hi = rig.book.stores[0].dense
    best = sums[..., :35].topk(5).indices
    expected = torch.cat([best, torch.arange(35, 40).expand(2, 2, -1)], -1).sort(-1).values
    assert torch.equal(hi["pos"].long().sort(-1).values, expected)
    torch.testing.assert_close(hi["score"], sums.gather(-1, hi["pos"].long()), atol=1e-5, rtol=0)
    assert torch.equal(hi["k"], k[0].gather(2, hi["pos"].long()[..., None].expand(-1, -1, -1, 16)))


@pytest.mark.parametrize("hi_bits", [16, 8])
def test_scores_are_the_columns_of_all_rows_that_read_the_cache(hi_bits: int) -> None:
    """By brute force over what was held at every step, quantised tokens included."""
    s, t = 30, 15
    q, k, v = _inputs(s, t)
    rig, sums = Rig(MiKV(ratio=0.4, hi_bits=hi_bits)), torch.zeros(2, 2, s + t)
    keys = torch.zeros(2, 2, 0, 16)
    for step in range(t + 1):
        start, stop = (0, s) if step == 0 else (s + step - 1, s + step)
        keys = torch.cat([keys, k[0][:, :, start:stop]], 2)
        logits = q[0][:, :, start:stop].view(2, 2, 2, -1, 16) @ keys[:, :, None].transpose(-1, -2) / 4
        ahead = torch.arange(stop) > torch.arange(start, stop)[:, None]
        sums[..., :stop] += logits.masked_fill(ahead, -torch.inf).softmax(-1).sum((2, 3))
        part = slice(start, stop)
        phase = "prompt_end" if step == 0 else "step"
        rig.feed(0, q[0][:, :, part], k[0][:, :, part], v[0][:, :, part], phase)
        table = rig.book.stores[0].dense if hi_bits == 16 else _tiers(rig)[1].meta
        expected = sums.gather(-1, table["pos"].long())
        torch.testing.assert_close(table["score"], expected, atol=1e-5, rtol=1e-5)
        order = rig.order().argsort(-1)[..., None].expand(-1, -1, -1, 16)
        keys = rig.book.stores[0].read(rig.book.scratch)[0].gather(2, order).clone()


@pytest.mark.parametrize(("hi_bits", "share"), [(16, 32.5), (8, 23.125), (4, 18.125), (2, 15.625)])
def test_the_table_of_sizes(hi_bits: int, share: float) -> None:
    """r = 0.2, two bits, groups of 64: the closed form and the bytes in the tiers (paper: 33 / 23 / 18 / 16 %)."""
    q, k, v = (x.bfloat16() for x in _inputs(200, heads=2, groups=2, d=128))
    rig = Rig(MiKV(ratio=0.2, hi_bits=hi_bits))
    rig.feed(0, q[0], k[0], v[0], "prompt_end")
    store = rig.book.stores[0]
    names = ("k", "v", "kc", "kl", "ks", "vc", "vl", "vs")
    tables = [store.dense, *(tier.meta for tier in store.tiers)]
    held = sum(table[n].numel() * table[n].element_size() for table in tables for n in names if n in table)
    assert 100 * cache_size(0.2, hi_bits, 2, 64) == pytest.approx(share)
    assert 100 * held / (2 * k.numel() * 2) == pytest.approx(share)


def test_all_bytes_are_accounted_for() -> None:
    """Beyond codes and parameters: positions, scores of the importance tier, one balancer."""
    q, k, v = _inputs(50, d=64)
    rig = Rig(MiKV(ratio=0.2, hi_bits=8))
    rig.feed(0, q[0], k[0], v[0], "prompt_end")
    packed = 2 * 2 * (10 * (64 + 8) + 40 * (16 + 8)) * 2  # rows, heads, K and V
    assert rig.book.stores[0].nbytes == packed + 2 * 2 * (50 * 2 + 10 * 4) + 2 * 2 * 64 * 4


def test_error_falls_with_bits_and_ratio(packing_model: Any) -> None:
    """KL of the next-token distributions to those of the full cache, averaged over prompts and steps."""
    prompt = torch.randint(3, 64, (6, 48), generator=torch.Generator().manual_seed(1))
    forced = torch.randint(3, 64, (6, 10), generator=torch.Generator().manual_seed(2))

    def run(cache: Any) -> Tensor:
        packing_model(prompt, past_key_values=cache)
        steps = [packing_model(forced[:, t : t + 1], past_key_values=cache).logits[:, -1] for t in range(10)]
        return torch.stack(steps).log_softmax(-1)

    def divergence(**options: Any) -> float:
        with elision.apply(packing_model, "mikv", **options) as applied:
            found = run(applied.cache())
        return float((full.exp() * (full - found)).sum(-1).mean())

    with torch.no_grad():
        full = run(DynamicCache(config=packing_model.config))
        by_bits = [divergence(lo_bits=bits, ratio=0.2) for bits in (2, 3, 4)]
        by_ratio = [divergence(ratio=ratio) for ratio in (0.0, 0.3, 0.6, 0.9)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_ratio == sorted(by_ratio, reverse=True)
    assert by_bits[-1] < by_bits[0] / 4
