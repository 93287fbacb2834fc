from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import elision
from elision.kv.methods.zipcache import ZipCache
from elision.kv.probes import Probes, draw, normalise
from tests.kv.models import decode, llama
from tests.kv.rig import Rig, recorded

CASES = recorded("zipcache")


def _recorded_rows(monkeypatch: pytest.MonkeyPatch, probes: Tensor) -> None:
    """Let the random probes be those of the recorded run: `probes` [P], or [L, P]."""
    at = probes.view(-1, probes.shape[-1])
    monkeypatch.setattr(Probes, "rows", lambda self, lengths, layer, turn: (at[layer].expand(len(lengths), -1), None))


def _decoded(rig: Rig, n: int, layer: int = 0) -> tuple[Tensor, Tensor]:
    """Packed keys and values in the order of positions, [B, G, n, D]."""
    store = rig.book.stores[layer]
    keys, values = store.read(rig.book.scratch)
    order = store.positions()[..., :n].long().argsort(-1)[..., None]
    return tuple(x[:, :, :n].gather(2, order.expand(-1, -1, -1, x.shape[-1])).clone() for x in (keys, values))


@pytest.mark.parametrize("name", ["saliency_gqa", "saliency_mha_batch2", "saliency_short"])
@pytest.mark.parametrize("norm", ["full_count", "probe_nnz"])
def test_recorded_saliency_and_classes(monkeypatch: pytest.MonkeyPatch, name: str, norm: Any) -> None:
    case = CASES[name]
    _recorded_rows(monkeypatch, case["probes"])
    method = ZipCache(low_ratio=case.options["low_ratio"], norm=norm, params="float32")
    found = {}
    real = Probes.score
    monkeypatch.setattr(Probes, "score", lambda *args: found.setdefault("score", real(*args)))
    rig = Rig(method)
    rig.feed(0, case["q"], case["k"], phase="prompt_end")
    key = {"full_count": "released", "probe_nnz": "probe_nnz"}[norm]
    torch.testing.assert_close(found["score"], case[f"saliency_{key}"], rtol=1e-5, atol=1e-7)
    others, salient = rig.book.stores[0].tiers
    assert torch.equal(others.meta["pos"].long(), case[f"other_ids_{key}"])
    both = torch.cat([others.meta["pos"], salient.meta["pos"]], -1).sort(-1).values
    assert torch.equal(both.long(), torch.arange(case.scalars["S"]).expand_as(both))


def test_the_rows_of_the_release() -> None:
    for name in ("saliency_gqa", "saliency_mha_batch2", "saliency_short"):
        case = CASES[name]
        rows = draw(case.scalars["S"], 0.05, 0.05, torch.rand(99, dtype=torch.float64))
        n = case.scalars["recent_probes"]
        assert torch.equal(rows[:n], case["probes"][:n])
        assert len(rows) == n + case.scalars["random_probes"]
        assert (rows[n:] < case.scalars["S"] - n).all()


@pytest.mark.parametrize("gap", ["block", "all"])
def test_recorded_streaming(monkeypatch: pytest.MonkeyPatch, gap: Any) -> None:
    """Classes, decoded tensors and outputs through two recompressions; with "block" up to the first."""
    case = CASES["streaming_gqa"]
    _recorded_rows(monkeypatch, case["probes"])
    rig = Rig(ZipCache(norm="full_count", requant=gap, gap=8, params="float32"))
    q, k, v = (case[x][None] for x in "qkv")
    outs, prompt = [], case.scalars["S"]
    for t, out in enumerate(rig.run(q, k, v, prompt)):
        outs.append(out[0])
        store = rig.book.stores[0]
        assert store.dense.n == case["buffer_len"][t]
        assert store.n - store.dense.n == case["compressed_len"][t]
        if t in (0, 8, 16) and (gap == "all" or t == 0):
            tag = "prompt" if t == 0 else str(t)
            assert torch.equal(store.tiers[0].meta["pos"].long(), case[f"other_ids_{tag}"])
            keys, values = _decoded(rig, prompt + t)
            torch.testing.assert_close(keys, case[f"k_hat_{t}"], rtol=0, atol=1e-5)
            torch.testing.assert_close(values, case[f"v_hat_{t}"], rtol=0, atol=1e-5)
        if gap == "block" and t == 8:
            others = torch.cat([tier.meta["pos"] for tier in store.tiers[::2]], -1)
            assert torch.equal(others.long(), case["other_ids_8"])
    stop = prompt + (20 if gap == "all" else 8)
    torch.testing.assert_close(torch.cat(outs, 2)[:, :, :stop], case["out"][:, :, :stop], rtol=0, atol=5e-5)


@pytest.mark.parametrize("norm", ["full_count", "probe_nnz"])
def test_recorded_logits(monkeypatch: pytest.MonkeyPatch, norm: Any) -> None:
    case = CASES["e2e"]
    model = llama(case)
    full = decode(model, case["prompt_ids"], case["forced_ids"])
    torch.testing.assert_close(full[0], case["logits_full"], atol=1e-4, rtol=0)
    _recorded_rows(monkeypatch, case["probes"])
    with elision.apply(model, "zipcache", norm=norm, gap=8, params="float32") as run:
        cache = run.cache()
        logits = decode(model, case["prompt_ids"], case["forced_ids"], cache)
    name = "logits" if norm == "full_count" else "logits_probe_nnz"
    torch.testing.assert_close(logits[0], case[name], atol=1e-4, rtol=0)
    for layer, store in enumerate(cache.layers):
        ids = case["other_ids_prompt" if norm == "full_count" else "other_ids_prompt_probe_nnz"][layer]
        assert torch.equal(store.store.tiers[0].meta["pos"][..., : ids.shape[-1]].long(), ids)
        assert store.store.n - store.store.dense.n == case["final_compressed_len"][layer]


def _inputs(s: int, t: int = 0, *, heads: int = 4, groups: int = 2, d: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    """q [1, 2, Hq, S + T, D], k and v [1, 2, G, S + T, D]."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, h, s + t, d, generator=g) for h in (heads, groups, groups))


def test_degenerate_channels() -> None:
    """The recorded constant key channel; a zero value channel comes back as zero, all others as they should."""
    case = CASES["degenerate"]
    rig = Rig(ZipCache(params="float32"))
    n, others = case["k"].shape[2], case["other_ids"]
    real = Probes.score
    score = torch.full((1, 2, n), 1.0).scatter_(-1, others, torch.arange(8.0).expand(1, 2, -1) / 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probes, "score", lambda *args: (real(*args), score)[1])
        rig.feed(0, case["k"], case["k"], case["v"], "prompt_end")
    keys, values = _decoded(rig, n)
    torch.testing.assert_close(keys, case["k_hat"], rtol=0, atol=1e-5)
    assert bool(case["v_hat_is_nan"].all())
    zero = (case["v"] == 0).all(2)[:, :, None].expand_as(values)
    assert bool((values[zero] == 0).all())
    assert (values - case["v"]).abs().max() < case["v"].abs().max()


@pytest.mark.parametrize("low_ratio", [0.0, 1.0, 0.4])
@pytest.mark.parametrize("length", [1, 2, 3, 12])
def test_empty_classes_and_short_prompts(low_ratio: float, length: int) -> None:
    q, k, v = _inputs(length, 5)
    rig = Rig(ZipCache(low_ratio=low_ratio, gap=2))
    for out in rig.run(q, k, v, length):
        assert torch.isfinite(out[0]).all()
    assert torch.equal(rig.kept(), torch.arange(length + 5).expand(2, 2, -1))


def test_error_is_half_a_step_and_the_buffer_is_exact() -> None:
    q, k, v = _inputs(40, 7)
    rig = Rig(ZipCache(gap=50))
    list(rig.run(q, k, v, 40))
    store = rig.book.stores[0]
    assert torch.equal(store.dense["k"], k[0][:, :, 40:])
    assert torch.equal(store.dense["v"], v[0][:, :, 40:])
    for tier in store.tiers:
        b, g, n = tier.meta["pos"].shape
        index = tier.meta["pos"].long()[..., None].expand(b, g, n, 8)
        keys, values = (torch.empty(b, g, n, 8) for _ in "kv")
        tier.read(keys, values)
        key_step = tier.keys.step.float().view(b, 1, g, 8).transpose(1, 2)  # [B, G, 1, D]
        value_step = tier.values.step.float()[:, None] * tier.values.scale.float().view(b, 1, g, 8).transpose(1, 2)
        assert ((keys - k[0].gather(2, index)).abs() <= key_step / 2 + 1e-5).all()
        assert ((values - v[0].gather(2, index)).abs() <= value_step / 2 + 1e-5).all()


def test_bytes_are_those_of_the_paper() -> None:
    """Codes; 2 h d parameters of keys per class; h d scales and 2 n per class of values, all of two bytes."""
    q, k, v = _inputs(50, heads=3, groups=3, d=16)
    rig = Rig(ZipCache())
    rig.feed(0, q[0], k[0], v[0], "prompt_end")
    store, h, d, n_low = rig.book.stores[0], 3, 16, 20
    codes = 2 * 2 * ((50 - n_low) * h * d * 4 + n_low * h * d * 2) // 8
    params = 2 * 2 * (2 * 2 * h * d + h * d + 2 * 50)
    assert store.nbytes == codes + params + 2 * 2 * h * 50  # and two bytes for every token's position
    assert store.dense.nbytes == 0


def test_the_paper_setting_is_four_and_a_half_times_smaller_than_sixteen_bits() -> None:
    q = torch.randn(1, 9, 4096, 64, dtype=torch.bfloat16)
    k = torch.randn(1, 3, 4096, 64, dtype=torch.bfloat16)
    rig = Rig(ZipCache())
    store = rig.book.stores[0]
    store.append(k, k, None)
    call = rig.call(0, q, "prompt_end")
    for rule in rig.rules:
        rule.scorer.observe(call)
        rule.act(call)
    assert 2 * k.numel() * 2 / store.nbytes > 4.5


def test_saliency_of_uniform_attention() -> None:
    """Row i spreads 1 / (i + 1): sums fall with the position, means over the rows that see a column do not mislead."""
    n = 24
    found: dict[str, Tensor] = {}
    for norm in ("probe_nnz", "full_count"):
        rig = Rig(ZipCache(recent_probes=1.0, random_probes=0.0, norm=norm))
        store, k = rig.book.stores[0], torch.randn(1, 1, n, 8)
        store.append(k, k, None)
        call = rig.call(0, torch.zeros(1, 2, n, 8), "prompt_end")
        scorer = rig.rules[0].scorer
        scorer.observe(call)
        found[norm] = scorer.score(call, store)[0, 0]
    torch.testing.assert_close(found["probe_nnz"], found["full_count"])
    weights = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
    sums = 2 * weights.sum(0)
    assert (sums.diff() < 0).all()
    torch.testing.assert_close(found["probe_nnz"], sums / (n - torch.arange(n)))


def test_probes_see_what_is_before_them() -> None:
    """The number of probes that see a column, by brute force, with padded probes and duplicates."""
    at = torch.tensor([[9, 8, 3, 3, 0], [5, 9, 9, 1, 7]])
    ok = torch.tensor([[True, True, True, True, False], [True] * 5])
    columns = torch.arange(10).expand(2, 1, 10)
    seen = ((at[:, None, :] >= columns[:, 0, :, None]) & ok[:, None, :]).sum(-1)[:, None]
    sums = torch.rand(2, 3, 10)
    torch.testing.assert_close(normalise(sums, at, ok, columns, 10 - columns, "probe_nnz"), sums / seen.clamp(min=1))


def test_seeds() -> None:
    q, k, v = _inputs(200, heads=2, groups=2)

    def low(seed: int, layer: int = 0) -> Tensor:
        rig = Rig(ZipCache(seed=seed, norm="full_count"), layers=2)
        for i in range(2):
            rig.feed(i, q[0], k[0], v[0], "prompt_end")
        return rig.book.stores[layer].tiers[0].meta["pos"]

    assert torch.equal(low(1), low(1))
    assert not torch.equal(low(1), low(2))
    assert not torch.equal(low(1), low(1, layer=1))


def test_classes_of_old_tokens_never_change() -> None:
    q, k, v = _inputs(30, 24)
    for requant in ("all", "block"):
        rig, before = Rig(ZipCache(gap=6, requant=requant)), [set(), set()]  # type: ignore[arg-type]
        for step, _ in enumerate(rig.run(q, k, v, 30)):
            tiers = rig.book.stores[0].tiers
            for i in (0, 1):
                held = {int(p) for tier in tiers[i::2] for p in tier.meta["pos"][0, 0]}
                assert before[i] <= held
                before[i] = held
            packed = 30 + step // 6 * 6
            assert len(before[0]) == int(0.4 * 30) + step // 6 * int(0.4 * 6)
            assert before[0] | before[1] == set(range(packed))
            assert not before[0] & before[1]


def test_error_grows_with_the_share_of_low_bits() -> None:
    q, k, v = _inputs(120, heads=4, groups=2, d=16)
    errors = []
    for ratio in (0.0, 0.25, 0.5, 0.75, 1.0):
        rig = Rig(ZipCache(low_ratio=ratio))
        rig.feed(0, q[0], k[0], v[0], "prompt_end")
        keys, values = _decoded(rig, 120)
        errors.append(float((keys - k[0]).square().mean() + (values - v[0]).square().mean()))
    assert errors == sorted(errors)
    assert errors[-1] > 5 * errors[0]


def test_order_of_the_lists_changes_values_only() -> None:
    """A range per token spans the heads, so the order inside the lists decides who shares one (h > 1)."""
    q, k, v = _inputs(60)
    found = []
    for order in ("saliency", "position"):
        rig = Rig(ZipCache(low_order=order))  # type: ignore[arg-type]
        rig.feed(0, q[0], k[0], v[0], "prompt_end")
        found.append(_decoded(rig, 60))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


def test_shared_ranges_tie_the_rows_of_a_batch() -> None:
    q, k, v = _inputs(40)
    for shared in (False, True):
        rig, alone = (Rig(ZipCache(shared_ranges=shared)) for _ in "ab")
        rig.feed(0, q[0], k[0], v[0], "prompt_end")
        alone.feed(0, q[0][:1], k[0][:1], v[0][:1], "prompt_end")
        assert torch.equal(_decoded(rig, 40)[0][:1], _decoded(alone, 40)[0]) is not shared


@pytest.mark.parametrize("bits_salient", [4, 16])
def test_tokens_after_a_crop_are_packed_in_their_turn(bits_salient: int) -> None:
    q, k, v = _inputs(30, 40)
    rig = Rig(ZipCache(gap=8, bits_salient=bits_salient))
    store = rig.book.stores[0]
    for _ in rig.run(q[:, :, :, :46], k[:, :, :, :46], v[:, :, :, :46], 30):
        pass
    store.crop(11)  # into what was packed at the second gap
    for t in range(35, 70):
        step = slice(t, t + 1)
        out = rig.feed(0, q[0][:, :, step], k[0][:, :, step], v[0][:, :, step])
        assert torch.isfinite(out).all()
        exact = store.dense.get("valid")
        exact = store.dense.n if exact is None else int(exact.sum(-1).max())
        salient = 0 if bits_salient == 4 else sum(int(0.6 * n) + 1 for n in (30, 8)) + 5 * (t - 34) // 8
        assert exact <= salient + 7
    held = rig.kept()
    assert torch.equal(held[..., -70:], torch.arange(70).expand_as(held[..., -70:]))


@pytest.mark.parametrize(("low_ratio", "prompt"), [(0.0, 30), (0.4, 2), (0.4, 1), (1.0, 30)])
@pytest.mark.parametrize("requant", ["all", "block"])
def test_classes_keep_their_bits_when_one_of_them_was_empty(low_ratio: float, prompt: int, requant: Any) -> None:
    q, k, v = _inputs(prompt, 16)
    rig = Rig(ZipCache(low_ratio=low_ratio, gap=5, requant=requant))
    low = int(low_ratio * prompt)
    for step, _ in enumerate(rig.run(q, k, v, prompt)):
        low += int(low_ratio * 5) if step and step % 5 == 0 else 0
        held = {2: 0, 4: 0}
        for tier in rig.book.stores[0].tiers:
            held[tier.keys.grid.bits] += tier.meta.n  # type: ignore[attr-defined]
        assert held == {2: low, 4: prompt + step // 5 * 5 - low}


def test_a_block_beside_exact_tokens_has_its_own_channel_scale() -> None:
    q, k, v = _inputs(20, 10)
    v[0, :, :, :20] *= 50
    rig = Rig(ZipCache(bits_salient=16, gap=10, requant="block", params="float32"))
    list(rig.run(q, k, v, 20))
    block = rig.book.stores[0].tiers[1]
    peak = v[0][:, :, 20:].abs().amax(2).flatten(1)
    torch.testing.assert_close(block.values.scale[:, 0], peak.sqrt())  # type: ignore[attr-defined]


def test_old_codes_are_rounded_anew_also_when_no_new_token_is_packed() -> None:
    """One new token at a time, none of them low: the released code packs the old ones again all the same."""
    q, k, v = _inputs(20, 3)
    rig = Rig(ZipCache(bits_salient=16, gap=1, params="float32"))
    seen = [rig.book.stores[0].tiers[0].values for _ in rig.run(q, k, v, 20)]  # type: ignore[attr-defined]
    assert len({id(values) for values in seen}) == 4
    assert rig.book.stores[0].tiers[0].meta.n == 8


@pytest.mark.parametrize("bits_salient", [4, 16])
def test_packing_anew_closes_the_gaps_of_a_crop(bits_salient: int) -> None:
    """Tokens taken back from packed lists cost no bytes after the next gap, and what is left is in its class."""
    q, k, v = _inputs(30, 30)
    rig = Rig(ZipCache(gap=8, bits_salient=bits_salient, params="float32"))
    store = rig.book.stores[0]
    for _ in rig.run(q[:, :, :, :46], k[:, :, :, :46], v[:, :, :, :46], 30):
        pass
    store.crop(14)  # all that was packed at the second gap, and most of the first
    low = [set(p[p < 32].tolist()) for p in store.tiers[0].meta["pos"].flatten(0, 1)]
    for t in range(32, 40):
        step = slice(t, t + 1)
        rig.feed(0, q[0][:, :, step], k[0][:, :, step], v[0][:, :, step])
    for tier in store.tiers:
        valid = tier.meta.get("valid")
        real = torch.full((2, 2), tier.meta.n) if valid is None else valid.sum(-1)
        assert int(real.max()) == tier.meta.n
        assert valid is None or not bool(valid.all())
    held = store.tiers[0].meta
    for head, before in enumerate(low):
        listed = held["pos"].flatten(0, 1)[head]
        listed = listed if "valid" not in held else listed[held["valid"].flatten(0, 1)[head]]
        assert {p for p in listed.tolist() if p < 32} == before
        assert sum(p >= 32 for p in listed.tolist()) == int(0.4 * 8)
