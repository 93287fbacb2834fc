"""Contracts of DESIGN's kv family, over the registry and over architectures."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import elision
from elision.errors import ElisionWarning
from tests.kv.models import ARCHITECTURES, prompts, tiny
from tests.kv.settings import ACTIVE, LIMITS, PACKS, Options, cases, known_methods, label

MODES: dict[str, Options] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 8},
}


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ElisionWarning)
        yield


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> tuple[Tensor, list[Tensor]]:
    """Tokens and the logits that they were chosen by."""
    torch.manual_seed(1)
    settings = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True, **more}
    out = model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **settings)
    return out.sequences, list(out.logits)


def same(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def test_every_method_is_declared() -> None:
    assert sorted(LIMITS) == sorted(ACTIVE) == known_methods()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "options"), cases(LIMITS), ids=label)
def test_keeping_everything_changes_nothing(name: str, options: Options, mode: str) -> None:
    """Bit for bit, in every mode, with and without left padding."""
    model = tiny("llama")
    for lengths in ([30], [30, 17]):
        if mode == "prompt lookup" and len(lengths) > 1:
            continue  # transformers takes one row
        ids, mask = prompts(lengths)
        plain = generate(model, ids, mask, **MODES[mode])
        with quiet(), elision.apply(model, name, **options):
            cached = generate(model, ids, mask, **MODES[mode])
        assert same(plain, cached), lengths


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["greedy", "beams", "chunked prefill"])
def test_keeping_everything_on_every_architecture(architecture: str, mode: str) -> None:
    model = tiny(architecture)
    ids, mask = prompts([30, 21])
    plain = generate(model, ids, mask, **MODES[mode])
    with quiet(), elision.apply(model, "h2o", budget=4096):
        cached = generate(model, ids, mask, **MODES[mode])
    assert same(plain, cached)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "options"), [("h2o", {"budget": 10}), ("snapkv", {"budget": 12, "window": 4})])
def test_compressing_on_every_architecture(architecture: str, name: str, options: Options) -> None:
    """Only full-attention layers hold less; the first token is the full cache's; removal is exact."""
    model = tiny(architecture)
    ids, mask = prompts([30, 21])
    plain = generate(model, ids, mask)
    with elision.apply(model, name, **options) as run:
        cached = generate(model, ids, mask)
        report = run.report()
    assert torch.allclose(plain[1][0], cached[1][0], atol=1e-5)
    assert sum(report.evicted.values()) > 0
    assert same(plain, generate(model, ids, mask))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "options"), cases(ACTIVE), ids=label)
def test_active_methods_run_in_every_mode(name: str, options: Options, mode: str) -> None:
    model = tiny("qwen3")
    ids, mask = prompts([30])
    with elision.apply(model, name, **options) as run:
        sequences, logits = generate(model, ids, mask, **MODES[mode])
        report = run.report()
    assert all(x.isfinite().all() for x in logits)
    assert sequences.shape[1] == 38
    assert report.bytes_held < report.bytes_full
    assert report.tokens_seen == 37


@pytest.mark.parametrize("architecture", ["llama", "qwen2_5_vl", "gpt_neox"])
@pytest.mark.parametrize(("name", "options"), cases(ACTIVE), ids=label)
def test_rows_of_a_padded_batch_are_their_single_runs(name: str, options: Options, architecture: str) -> None:
    """Same kept sets and logits within 1e-5, at every step."""
    model = tiny(architecture)
    lengths = [30, 19, 7]
    ids, mask = prompts(lengths)
    steps = torch.randint(10, 64, (3, 6), generator=torch.Generator().manual_seed(5))
    with elision.apply(model, name, **options) as run:
        batch, sets = drive(run, model, ids, mask, steps)
        for row, length in enumerate(lengths):
            pads = ids.shape[1] - length
            single, alone = drive(
                run, model, ids[row : row + 1, pads:], mask[row : row + 1, pads:], steps[row : row + 1]
            )
            torch.testing.assert_close(batch[row], single[0], atol=2e-5, rtol=0)
            for layer in run.layers:
                for step, (mine, other) in enumerate(zip(sets, alone, strict=True)):
                    assert tokens(mine[layer][row], pads) == tokens(other[layer][0], 0), (step, layer, row)


def tokens(kept: Tensor, pads: int) -> list[list[int]]:
    """Positions held per head, counted from a row's first real token."""
    return [[p - pads for p in head if p >= 0] for head in kept.tolist()]


@torch.no_grad()
def drive(run: Any, model: Any, ids: Tensor, mask: Tensor, steps: Tensor) -> tuple[Tensor, list[dict[int, Tensor]]]:
    """Logits [B, 1 + T, V] after the prompt and after every given token, and the sets held then."""
    cache, logits, sets = run.cache(), [], []
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for t in range(steps.shape[1] + 1):
        new = ids if t == 0 else steps[:, t - 1 : t]
        at = places if t == 0 else places[:, -1:] + t
        seen = torch.cat([mask, mask.new_ones(len(mask), t)], 1)
        at = at[None].expand(3, -1, -1) if "Qwen2_5_VL" in type(model).__name__ else at
        out = model(new, attention_mask=seen, position_ids=at, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1])
        sets.append(run.kept(cache))
    return torch.stack(logits, 1), sets


@pytest.mark.parametrize(("name", "options"), cases(ACTIVE), ids=label)
def test_chunks_are_one_prompt(name: str, options: Options) -> None:
    """A prompt in parts, announced as one, ends with what the whole prompt ends with."""
    model = tiny("llama")
    ids, _ = prompts([30])
    with elision.apply(model, name, **options) as run, torch.no_grad():
        whole = run.cache()
        run.prompt(30)
        first = model(ids, past_key_values=whole).logits[:, -1]
        held = run.kept(whole)
        parts = run.cache()
        run.prompt(30)
        for start, stop in [(0, 16), (16, 28), (28, 29), (29, 30)]:
            last = model(ids[:, start:stop], past_key_values=parts).logits[:, -1]
        torch.testing.assert_close(first, last, atol=2e-5, rtol=0)
        assert all(torch.equal(held[i], run.kept(parts)[i]) for i in held)


def test_two_turns_are_one_prompt_when_nothing_leaves() -> None:
    model = tiny("llama")
    ids, _ = prompts([40])
    with quiet(), elision.apply(model, "h2o", budget=4096) as run:
        cache = run.cache()
        first = generate(model, ids[:, :25], past_key_values=cache)[0]
        second = torch.cat([first, ids[:, 25:]], 1)
        turns = generate(model, second, past_key_values=cache)
    plain_cache = DynamicCache(config=model.config)
    generate(model, ids[:, :25], past_key_values=plain_cache)
    assert same(turns, generate(model, second, past_key_values=plain_cache))


@pytest.mark.parametrize(("name", "options"), cases(ACTIVE), ids=label)
def test_turns_with_a_compressed_cache_read_true_positions(name: str, options: Options) -> None:
    """The second turn equals masked attention over what was kept, at true positions."""
    model = tiny("llama")
    ids, _ = prompts([44])
    with elision.apply(model, name, **options) as run:
        cache = run.cache()
        first = generate(model, ids[:, :30], past_key_values=cache)[0]
        assert cache.get_seq_length() == first.shape[1] - 1
        second = torch.cat([first, ids[:, 30:]], 1)
        out = generate(model, second, past_key_values=cache)
        assert cache.get_seq_length() == out[0].shape[1] - 1
        assert out[0].shape[1] == second.shape[1] + 8
    assert all(x.isfinite().all() for x in out[1])


@torch.no_grad()
def test_many_tokens_at_once_equal_one_by_one_over_a_compressed_cache() -> None:
    """With unequal sets in every head and row: the mask is the stored slots beside causality."""
    model = tiny("llama")
    ids, mask = prompts([30, 19])
    more = torch.randint(10, 64, (2, 9))
    ones = torch.ones(2, 9, dtype=torch.long)
    with elision.apply(model, "snapkv", budget=12, window=4) as run:
        cache = run.cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        single = copy.deepcopy(cache)
        run.prompt(99)  # the nine tokens are the start of a prompt, so nothing is evicted after them
        together = model(more, attention_mask=torch.cat([mask, ones], 1), past_key_values=cache).logits
        for t in range(9):
            seen = torch.cat([mask, ones[:, : t + 1]], 1)
            step = model(more[:, t : t + 1], attention_mask=seen, past_key_values=single).logits
            torch.testing.assert_close(step[:, 0], together[:, t], atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_masked_full_cache_is_the_oracle() -> None:
    """Outputs over what is held equal a full cache in which everything evicted is masked, head by head."""
    model = tiny("llama-mha")
    ids, _ = prompts([30])
    steps = torch.randint(10, 64, (1, 4))
    with elision.apply(model, "h2o", budget=12) as run:
        cache = run.cache()
        model(ids, past_key_values=cache)
        held = run.kept(cache)
        out = model(steps[:, :1], past_key_values=cache).logits
    from elision.hooks.transformers import Attention, Host, Out, Seam

    full = DynamicCache(config=model.config)
    model(ids, past_key_values=full)

    def attend(att: Attention) -> Out:
        n = att.k.shape[2]
        mask = torch.zeros(1, att.q.shape[1], 1, n, dtype=torch.bool)
        mask.scatter_(3, held[att.layer][:, :, None], True)
        mask[..., -1] = True
        return att.run(att.q, att.k, att.v, mask)

    host = Host.of(model)
    seam = Seam(host, host.attention, lambda inner, args, kwargs: inner(*args, **kwargs), attend)
    oracle = model(steps[:, :1], past_key_values=full).logits
    seam.remove()
    torch.testing.assert_close(out, oracle, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "options"), cases(ACTIVE), ids=label)
@torch.no_grad()
def test_rows_follow_beams(name: str, options: Options) -> None:
    """Reordering, repeating and selecting rows of a compressed cache is reordering the rows of what it answers."""
    model = tiny("llama")
    ids, mask = prompts([30, 19])
    with elision.apply(model, name, **options) as run:
        cache = run.cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        new, seen = torch.tensor([[11], [12]]), torch.cat([mask, mask.new_ones(2, 1)], 1)
        for order, move in [
            (torch.tensor([1, 0]), lambda c, i: c.reorder_cache(i)),
            (torch.tensor([0, 0, 1, 1]), lambda c, _: c.batch_repeat_interleave(2)),
            (torch.tensor([1]), lambda c, i: c.batch_select_indices(i)),
        ]:
            moved, still = copy.deepcopy(cache), copy.deepcopy(cache)
            move(moved, order)
            for _ in range(3):
                answers = model(new, attention_mask=seen, past_key_values=copy.deepcopy(still)).logits
                mine = model(new[order], attention_mask=seen[order], past_key_values=copy.deepcopy(moved)).logits
                torch.testing.assert_close(mine, answers[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "options"), cases(ACTIVE), ids=label)
@torch.no_grad()
def test_deep_copies_part(name: str, options: Options) -> None:
    model = tiny("llama")
    ids, _ = prompts([30])
    with elision.apply(model, name, **options) as run:
        cache = run.cache()
        model(ids, past_key_values=cache)
        clone = copy.deepcopy(cache)
        before = {i: t.clone() for i, t in run.kept(cache).items()}
        for token in (11, 12, 13):
            model(torch.tensor([[token]]), past_key_values=clone)
        assert all(torch.equal(before[i], t) for i, t in run.kept(cache).items())
        assert clone.get_seq_length() == cache.get_seq_length() + 3


@pytest.mark.parametrize(("name", "options"), cases(ACTIVE), ids=label)
@torch.no_grad()
def test_crop_is_by_position(name: str, options: Options) -> None:
    """Tokens taken back leave, wherever their slots are, and positions go on from there."""
    model = tiny("llama")
    ids, _ = prompts([30])
    with elision.apply(model, name, **options) as run:
        cache = run.cache()
        model(ids, past_key_values=cache)
        for token in (11, 12, 13):
            model(torch.tensor([[token]]), past_key_values=cache)
        cache.crop(-2)
        assert cache.get_seq_length() == 31
        for held in run.kept(cache).values():
            assert int(held.max()) <= 30
        out = model(torch.tensor([[14]]), past_key_values=cache).logits
        assert out.isfinite().all()
        assert cache.get_seq_length() == 32
        cache.reset()
        assert cache.get_seq_length() == 0
        again, fresh = run.cache(), model(ids, past_key_values=cache).logits
        assert torch.equal(fresh, model(ids, past_key_values=again).logits)


@pytest.mark.parametrize(("name", "options"), cases(ACTIVE), ids=label)
@torch.no_grad()
def test_rejected_drafts_leave_no_trace(name: str, options: Options) -> None:
    """While a cache records, rules wait: tokens that are taken back count for nothing."""
    model = tiny("llama")
    ids, _ = prompts([30])
    good, bad = torch.tensor([[11, 12]]), torch.tensor([[11, 12, 40, 41]])
    with elision.apply(model, name, **options) as run:
        caches = []
        for tokens_, crop in ((good, 0), (bad, 2)):
            cache = run.cache()
            model(ids, past_key_values=cache)
            cache.activate_past_recording()
            model(tokens_, past_key_values=cache)
            cache.crop(-crop)
            model(torch.tensor([[13]]), past_key_values=cache)
            caches.append(cache)
        for cache in caches:
            cache.layers[run.layers[0]].book.settle()
        kept = [run.kept(cache) for cache in caches]
        assert all(torch.equal(kept[0][i], kept[1][i]) for i in kept[0])
        answers = [model(torch.tensor([[14]]), past_key_values=cache).logits for cache in caches]
        torch.testing.assert_close(answers[0], answers[1], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "options"), cases(ACTIVE), ids=label)
def test_bfloat16(name: str, options: Options) -> None:
    model = copy.deepcopy(tiny("qwen3")).bfloat16()
    ids, mask = prompts([30, 19])
    with elision.apply(model, name, **options) as run:
        sequences, logits = generate(model, ids, mask)
        report = run.report()
    assert sequences.shape == (2, 38)
    assert all(x.isfinite().all() for x in logits)
    if name not in PACKS:  # with heads of 8 channels, parameters and positions outweigh codes
        assert report.bytes_held < report.bytes_full
