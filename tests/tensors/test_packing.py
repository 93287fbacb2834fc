"""Packed tensors: identity on codes, the error bound on the stored grid, padding, recorded codes of ZipCache."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elision.errors import OptionError
from elision.tensors.packing import (
    BITS,
    PARAMS,
    Grid,
    channel_scale,
    pack,
    packed_width,
    quantize,
    unpack,
)
from tests.golden import cases

quick = settings(max_examples=60, deadline=None)
ZIPCACHE = cases("zipcache")


def tensor(*shape, seed=0, dtype=torch.float32, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g) * torch.exp(spread * torch.randn(shape[-1], generator=g))
    return x.to(dtype)


# --- codes ---


@given(bits=st.sampled_from(BITS), channels=st.integers(1, 70), rows=st.integers(0, 5), seed=st.integers(0, 99))
@quick
def test_pack_round_trip(bits, channels, rows, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, rows, channels), dtype=torch.uint8, generator=g)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, rows, packed_width(channels, bits))
    assert torch.equal(unpack(packed, bits, channels), codes)
    out = torch.empty(2, channels, rows).mT  # strided, another dtype
    assert torch.equal(unpack(packed, bits, channels, out), codes.float())


@pytest.mark.parametrize(("bits", "unit"), [(2, 4), (3, 8), (4, 2), (8, 1)])
def test_width_is_exact_where_it_divides(bits, unit):
    for k in range(1, 9):
        assert packed_width(unit * k, bits) * 8 == unit * k * bits


def test_layout_of_nibbles_and_quarters():
    codes = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [1 | 3 << 4, 2 | 4 << 4]
    codes = torch.tensor([1, 0, 2, 3, 3, 1, 0, 2], dtype=torch.uint8)
    assert pack(codes, 2).tolist() == [1 | 2 << 2 | 3 << 4 | 0 << 6, 0 | 3 << 2 | 1 << 4 | 2 << 6]
    assert pack(codes, 8).tolist() == codes.tolist()


def test_bad_bits_width_and_shapes():
    with pytest.raises(OptionError, match="bits=5 is not one of 2, 3, 4, 8"):
        pack(torch.zeros(4, dtype=torch.uint8), 5)
    with pytest.raises(OptionError, match="9 codes of 4 bits take 5 bytes, not 4"):
        unpack(torch.zeros(4, dtype=torch.uint8), 4, 9)
    with pytest.raises(OptionError, match="10 channels do not divide into groups of 4"):
        quantize(torch.zeros(3, 10), Grid(4, "token", group=4))
    with pytest.raises(OptionError, match=r"out has shape \(3, 9\)"):
        quantize(torch.zeros(3, 10), Grid(4)).dequantize(torch.empty(3, 9))
    for bad in ({"per": "head"}, {"group": 0}, {"params": torch.float64}):
        with pytest.raises(OptionError, match="="):
            Grid(4, **bad)
    with pytest.raises(OptionError, match="per token"):
        Grid(4, "channel").row_bytes(8)


# --- grids ---


def ranges_of(grid, shape):
    """Slow reference: for every element of [B, n, C] the key of its range."""
    b, n, c = shape
    if grid.per == "token":
        size = grid.group or c
        return [[[(i, t, j // size) for j in range(c)] for t in range(n)] for i in range(b)]
    size = grid.group or n
    return [[[(i, t // size, j) for j in range(c)] for t in range(n)] for i in range(b)]


grids = st.builds(
    Grid,
    st.sampled_from(BITS),
    st.sampled_from(["token", "channel"]),
    st.sampled_from([None, 2, 4]),
    st.sampled_from(PARAMS),
)


@given(grid=grids, n=st.integers(1, 11), seed=st.integers(0, 999), dtype=st.sampled_from(PARAMS))
@quick
def test_error_is_at_most_half_a_stored_step(grid, n, seed, dtype):
    x = tensor(2, n, 8, seed=seed, dtype=dtype)
    held = quantize(x, grid)
    back = held.dequantize()
    low, step = (p.double() for p in (held.low, held.step))
    assert held.low.dtype == grid.params
    keys = ranges_of(grid, x.shape)
    for i in range(2):
        for t in range(n):
            for j in range(8):
                _, a, b = keys[i][t][j]
                size = step[i, a, b].item()
                bound = size / 2 + 4e-7 * (abs(low[i, a, b].item()) + size * grid.levels)
                assert abs(back[i, t, j].item() - x[i, t, j].item()) <= bound


@given(grid=grids, n=st.integers(1, 11), seed=st.integers(0, 999))
@quick
def test_bytes_are_those_of_the_formula(grid, n, seed):
    held = quantize(tensor(2, n, 8, seed=seed), grid)
    groups = n * (8 // (grid.group or 8)) if grid.per == "token" else math.ceil(n / (grid.group or n)) * 8
    assert held.nbytes == 2 * (n * packed_width(8, grid.bits) + 2 * groups * grid.params.itemsize)
    if grid.per == "token":
        assert held.nbytes == 2 * n * grid.row_bytes(8)


@given(grid=grids, pad=st.integers(0, 4), n=st.integers(1, 8), seed=st.integers(0, 99))
@quick
def test_padding_counts_in_no_range(grid, pad, n, seed):
    """Junk on the left changes nothing; token groups count from the first slot, so whole groups are padded there."""
    if grid.per == "channel" and grid.group is not None:
        pad *= grid.group
    x = tensor(1, n, 8, seed=seed)
    junk = torch.full((1, pad, 8), torch.nan)
    padded = torch.cat([junk, x], 1)
    valid = torch.arange(n + pad)[None, :, None] >= pad
    held = quantize(padded, grid, valid=valid)
    assert torch.equal(held.dequantize()[:, pad:], quantize(x, grid).dequantize())
    assert torch.equal(held.codes[:, :pad], torch.zeros_like(held.codes[:, :pad]))


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("per", ["token", "channel"])
def test_constant_and_empty(per, params):
    x = torch.full((2, 5, 6), 0.75)
    assert torch.equal(quantize(x, Grid(2, per, params=params)).dequantize(), x)
    none = quantize(x[:, :0], Grid(2, per, params=params))
    assert none.dequantize().shape == (2, 0, 6)
    assert none.nbytes == 0
    invalid = quantize(x, Grid(4, per, params=params), valid=torch.zeros(2, 5, 1, dtype=torch.bool))
    assert torch.isfinite(invalid.dequantize()).all()


def test_float16_range_is_cut_off_but_finite():
    x = torch.tensor([[-1e6, 0.0, 1.0, 1e6]])
    assert torch.isfinite(quantize(x, Grid(8, params=torch.float16)).dequantize()).all()


@given(seed=st.integers(0, 99), bits=st.sampled_from(BITS), params=st.sampled_from(PARAMS))
@quick
def test_outputs_of_any_dtype_and_strides(seed, bits, params):
    held = quantize(tensor(2, 3, 7, 12, seed=seed), Grid(bits, "channel", group=3, params=params))
    want = held.dequantize()
    strided = torch.empty(2, 7, 3, 12).transpose(1, 2)
    assert held.dequantize(strided) is strided
    assert torch.equal(strided, want)
    assert torch.equal(held.dequantize(torch.empty(2, 3, 7, 12, dtype=torch.bfloat16)), want.bfloat16())
    picked = held.map(lambda t: t[[1, 1]])
    assert torch.equal(picked.dequantize(), want[[1, 1]])


# --- channel scale ---


@given(seed=st.integers(0, 999), bits=st.sampled_from(BITS), params=st.sampled_from(PARAMS))
@quick
def test_separable_error_is_at_most_half_a_scaled_step(seed, bits, params):
    v = tensor(2, 9, 8, seed=seed)
    c = channel_scale(v, params=params)
    held = quantize(v, Grid(bits, params=params), scale=c)
    bound = c.float() * held.step.float() / 2
    slack = 1e-6 * c.float() * (held.low.float().abs() + held.step.float() * held.grid.levels)
    assert ((held.dequantize() - v).abs() <= bound + slack).all()
    assert held.shape == v.shape
    assert held.nbytes == 2 * (9 * held.grid.row_bytes(8) + 8 * params.itemsize)


def test_separable_saves_the_other_channels_from_an_outlier():
    v = tensor(1, 64, 16, spread=0)
    v[..., 5] *= 100
    others = [j for j in range(16) if j != 5]
    plain = (quantize(v, Grid(8)).dequantize() - v)[..., others].square().mean()
    separable = (quantize(v, Grid(8), scale=channel_scale(v)).dequantize() - v)[..., others].square().mean()
    assert separable < plain / 20


def test_scale_of_a_zero_channel_and_of_padding():
    v = tensor(1, 4, 3)
    v[..., 1] = 0
    v[:, 0] = 1e9
    valid = torch.tensor([False, True, True, True])[:, None]
    c = channel_scale(v, valid=valid)
    assert torch.allclose(c[0, 0, [0, 2]], v[0, 1:, [0, 2]].abs().amax(0).sqrt())
    assert c[0, 0, 1] == 0
    assert torch.equal(channel_scale(v, valid=valid, root=False)[0, 0, 0], v[0, 1:, 0].abs().max())
    assert torch.equal(channel_scale(v[:, :0]), torch.zeros(1, 1, 3))


# --- recorded codes ---


def rows(x, ids=None):
    """[B, h, n, d] -> [B, n, h·d], the tokens `ids` [B, h, n] of each head where given."""
    if ids is not None:
        x = x.gather(2, ids[..., None].expand(-1, -1, -1, x.shape[-1]))
    return x.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", ["compress_gqa", "compress_batch2"])
@pytest.mark.parametrize(("tier", "bits", "ids"), [("hi", 4, "salient_ids"), ("lo", 2, "other_ids")])
def test_recorded_codes_of_zipcache(name, tier, bits, ids):
    case = ZIPCACHE[name]
    k, v = rows(case["k"], case[ids]), rows(case["v"], case[ids])
    b, n, c = k.shape
    keys = quantize(k.reshape(1, b * n, c), Grid(bits, "channel"))  # the release shares ranges over the batch
    scale = channel_scale(rows(case["v"]).reshape(1, -1, c))
    values = quantize(v, Grid(bits), scale=scale)
    assert torch.equal(scale, case["v_channel_scale"])
    for letter, held in (("k", keys), ("v", values)):
        codes = unpack(held.codes, bits, c).reshape(b, n, c)
        assert torch.equal(codes.long(), case[f"{letter}_codes_{tier}"])
        assert torch.equal(held.codes.reshape(b, n, -1).long(), case[f"{letter}_packed_{tier}"])
        torch.testing.assert_close(held.low.flatten(), case[f"{letter}_min_{tier}"].flatten(), rtol=1e-6, atol=0)
        torch.testing.assert_close(held.step.flatten(), case[f"{letter}_step_{tier}"].flatten(), rtol=1e-6, atol=0)
    for letter, held in (("k", keys), ("v", values)):
        want = rows(case[f"{letter}_hat"], case[ids])
        torch.testing.assert_close(held.dequantize().reshape(b, n, c), want, rtol=0, atol=1e-5)


def test_degenerate_channels_come_back_finite():
    case = ZIPCACHE["degenerate"]
    k, v = rows(case["k"], case["other_ids"]), rows(case["v"])
    back = quantize(k, Grid(2, "channel")).dequantize()
    torch.testing.assert_close(back, rows(case["k_hat"], case["other_ids"]), rtol=0, atol=1e-5)
    c = channel_scale(v)
    held = quantize(v, Grid(4), scale=c)
    back = held.dequantize()
    assert ((back - v).abs() <= c * held.step / 2 + 1e-5).all()
    zero = (v == 0).all(1)[0]
    assert zero.sum() == 1
    assert (back[..., zero] == 0).all()
