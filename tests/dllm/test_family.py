"""Every method of the family: limits, books, undo, isolation, and which rows enter linear layers."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elision
from elision import dllm
from elision.dllm.decode import Step
from elision.dllm.engine import DllmApplied
from elision.dllm.passes import Net
from elision.errors import Closed, Conflict, ElisionWarning, OptionError
from elision.method import create
from tests.dllm.support import KINDS, MASK, lm_of, prompts, tiny
from tests.models import changed, snapshot

P, G, L = 6, 12, 3
BLOCKS: dict[str, Any] = {"gen_length": G, "steps": G, "block_length": 6}
WINDOW: dict[str, Any] = {"gen_length": G}
Setting = tuple[str, dict[str, Any], dict[str, Any]]

# At these settings everything is computed and the output is that of the sampler without a method, bit for bit.
LIMITS: list[Setting] = [
    ("dkv_cache", {"interval": 1}, BLOCKS),
    ("dkv_cache", {"interval": 1, "variant": "greedy"}, BLOCKS),
    ("elastic_cache_dllm", {"force_full": True, "beta": 4, "eps": 0.9, "batch": "together"}, WINDOW),
    ("fast_dllm", {"threshold": None, "extra_call": False}, {"gen_length": G, "steps": 2, "block_length": 6}),
    ("fewer_steps", {"factor": 1}, BLOCKS),
    ("fixed_interval", {"interval": 1}, BLOCKS),
    ("no_cache", {}, BLOCKS),
]
# At these settings rows are left out.
ACTIVE: list[Setting] = [
    ("dkv_cache", {"interval": 4}, BLOCKS),
    ("dkv_cache", {"variant": "greedy", "interval": 3, "window": 2}, BLOCKS),
    ("dkv_cache", {"variant": "prefill"}, BLOCKS),
    ("dkv_cache", {"variant": "pd", "interval": 4}, BLOCKS),
    ("dkv_cache", {"delay": False, "interval": 4}, BLOCKS),
    ("elastic_cache_dllm", {"gamma": 0.95, "beta": 4, "eps": 1.5}, WINDOW),
    ("elastic_cache_dllm", {"gamma": 0.95, "beta": 4, "eps": 1.5, "far_tail": "keep", "mask_block": 4}, WINDOW),
    ("elastic_cache_dllm", {"gamma": 0.6, "beta": 4, "batch": "together", "sync": "step"}, WINDOW),
    ("fast_dllm", {"cache": "dual", "threshold": None}, BLOCKS),
    ("fast_dllm", {"cache": "prefix", "threshold": 0.9}, BLOCKS),
    ("fewer_steps", {"factor": 3}, BLOCKS),
    ("fixed_interval", {"interval": 3}, BLOCKS),
    ("fixed_interval", {"interval": 3, "window": 4, "threshold": 0.9}, WINDOW),
]


def label(setting: Setting) -> str:
    return setting[0] + "".join(f"-{k}={v}" for k, v in setting[1].items())


def go(setting: Setting, lm: Any, ids: Tensor, seed: int = 0, **more: Any) -> tuple[Tensor, dllm.DllmReport]:
    name, options, how = setting
    with elision.apply(lm, name, **options) as run:
        assert isinstance(run, DllmApplied)
        out = run.generate(ids, generator=torch.Generator().manual_seed(seed), **how, **more)
    return out, run.report()


def plain(setting: Setting, lm: Any, ids: Tensor, **more: Any) -> Tensor:
    """The sampler that the method prescribes, without it."""
    name, options, how = setting
    settings = create(name, **options).decoding(how, lm)  # type: ignore[attr-defined]
    return dllm.generate(lm, ids, generator=torch.Generator().manual_seed(0), **settings, **more)


active = pytest.mark.parametrize("setting", ACTIVE, ids=label)


def test_every_method_is_declared() -> None:
    names = [row.name for row in elision.methods("dllm")]
    assert sorted({name for name, _, _ in LIMITS}) == names
    assert sorted({name for name, _, _ in ACTIVE} | {"no_cache"}) == names


@pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
@pytest.mark.parametrize("setting", LIMITS, ids=label)
@pytest.mark.parametrize("kind", ["gqa", "qk_norm"])
def test_limit_settings_equal_the_uncached_sampler(setting: Setting, kind: str) -> None:
    lm, ids = lm_of(kind), prompts(2, P)
    seen: list[list[Tensor]] = [[], []]
    out, report = go(setting, lm, ids, on_step=lambda s, x, n: seen[0].append(x))
    assert torch.equal(out, plain(setting, lm, ids, on_step=lambda s, x, n: seen[1].append(x)))
    for a, b in zip(*seen, strict=False):
        assert a.shape == b.shape
        if setting[0] != "fast_dllm":  # which freezes rows after the first call of a block
            assert torch.equal(a, b)
    if setting[0] != "fast_dllm":
        assert report.cache_ratio == 0


@pytest.mark.filterwarnings("error::elision.errors.ElisionWarning")
@active
@pytest.mark.parametrize("shift", [False, True])
def test_active_settings_elide_and_do_not_warn(setting: Setting, shift: bool) -> None:
    lm, ids = lm_of("gqa", shift=shift), prompts(2, P)
    out, report = go(setting, lm, ids)
    assert 0 < report.cache_ratio < 1
    assert torch.equal(out[:, :P], ids)
    assert MASK not in out
    assert sum(run.committed for run in report.runs) == 2 * G


@pytest.mark.parametrize("setting", [s for s in LIMITS if s[0] not in ("no_cache", "fast_dllm")], ids=label)
def test_a_run_that_elides_nothing_says_so_with_numbers(setting: Setting) -> None:
    with pytest.warns(ElisionWarning, match=rf"{setting[0]} elided nothing: [\d,]+ token-layers ran in \d+ calls"):
        go(setting, lm_of("mha"), prompts(1, P))


class Rows:
    """Hooks on every linear layer, norm and the embedding of a model; all that enters is noted."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.ids: list[Tensor] = []
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                self.handles.append(module.register_forward_pre_hook(lambda m, args: self.ids.append(args[0].clone())))
            elif isinstance(module, nn.Linear) or "norm" in name:
                self.handles.append(module.register_forward_pre_hook(self._note(name)))

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.calls.append((name, args[0].shape[0], args[0].shape[1]))

        return hook

    def take(self) -> tuple[list[tuple[str, int, int]], list[Tensor]]:
        out = self.calls, self.ids
        self.calls, self.ids = [], []
        return out

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@active
@pytest.mark.parametrize(("kind", "shift"), [*((kind, False) for kind in KINDS), ("gqa", True)])
def test_no_linear_layer_sees_a_row_outside_the_query_set(setting: Setting, kind: str, shift: bool) -> None:
    """The embedding gets the tokens at the query's positions, and every linear layer and norm as many rows as that."""
    lm = lm_of(kind, shift=shift)
    rows, partial = Rows(lm.model), 0
    counted = 0

    def on_step(step: Step, logits: Tensor, net: Net) -> None:
        nonlocal partial, counted
        calls, ids = rows.take()
        query, depth, reach = net.book.query[-1][0], net.book.depth[-1], net.book.reach[-1]
        expected = step.ids[0][query] if depth else step.ids[0]
        assert torch.equal(ids[0][0], expected)
        assert len(ids) == 1
        seen: Counter[str] = Counter()
        for name, batch, n in calls:
            assert batch == 1
            if ".layers." not in name:  # the final norm and the head see what the sampler asked for
                assert n == step.need.pos.shape[1]
                continue
            layer = int(name.split(".layers.")[1].split(".")[0])
            allowed = {int(query.sum())} if layer < depth else {reach}
            if setting[1].get("sync") == "step" and depth:
                allowed.add(int(query.sum()))  # reused first, then refreshed
            assert n in allowed, (name, n, allowed)
            seen[name] += 1
            counted += n if name.endswith("q_proj") else 0
        assert len({name for name in seen if "proj" in name}) == 7 * L
        partial += depth == L

    try:
        _, report = go(setting, lm, prompts(1, P), on_step=on_step)
    finally:
        rows.remove()
    assert report.token_layers == counted
    assert partial or setting[0] == "fewer_steps"


@active
def test_half_precision_and_eager_models(setting: Setting) -> None:
    model = copy.deepcopy(lm_of("gqa").model).to(torch.bfloat16)
    model.config._attn_implementation = "eager"  # type: ignore[union-attr]
    out, report = go(setting, dllm.masked_lm(model), prompts(2, P))
    assert MASK not in out
    assert report.cache_ratio > 0


@active
def test_the_report_adds_up(setting: Setting) -> None:
    lm, ids = lm_of("gqa"), prompts(2, P)
    heads: list[int] = []
    _, report = go(setting, lm, ids, on_step=lambda s, x, n: heads.append(x.shape[0] * x.shape[1]))
    total = 0
    for run in report.runs:
        assert run.query.shape == (run.calls, run.batch, P + G)
        assert run.depth.shape == run.reach.shape == (run.calls,)
        if setting[1].get("sync") != "step":
            assert run.token_layers == int(run.computed().sum())
        assert run.token_layers_uncached == run.calls * run.batch * (P + G) * L
        assert run.full_calls == int((run.depth == 0).sum())
        assert run.seconds > 0
        total += run.head_rows
    assert total == sum(heads)
    assert report.calls == sum(run.calls for run in report.runs)
    assert report.token_layers == sum(run.token_layers for run in report.runs)
    assert report.bytes_held == 0
    width = 2 * lm.kv_heads * lm.head_dim * 4
    slots = report.runs[0].batch * L * (P + G) * width
    if setting[0] == "fewer_steps":
        assert report.bytes_peak == 0
    elif setting[0] == "elastic_cache_dllm":  # also the layers' inputs, and what drift compares
        assert report.bytes_peak > slots * (1 + 32 * 4 / width)
    else:
        assert report.bytes_peak == slots
    assert report.seconds.total == pytest.approx(sum(run.seconds for run in report.runs))
    text = json.loads(json.dumps(report.to_dict()))
    assert len(text["runs"][0]["query"]) == report.runs[0].calls
    assert f"{report.token_layers:,} token-layers computed" in str(report)


@active
def test_undo_is_exact(setting: Setting) -> None:
    model = tiny("gqa", seed=9)
    lm, ids = dllm.masked_lm(model), prompts(1, P)
    before, logits = snapshot(model), lm.logits(ids)
    run = elision.apply(lm, setting[0], **setting[1])
    assert changed(before, snapshot(model)) == []
    run.generate(ids, **setting[2])  # type: ignore[attr-defined]
    assert changed(before, snapshot(model)) == []
    run.remove()
    run.remove()
    assert changed(before, snapshot(model)) == []
    assert torch.equal(lm.logits(ids), logits)
    with pytest.raises(Closed, match=r"generate\(\) after remove\(\)"):
        run.generate(ids)  # type: ignore[attr-defined]
    assert run.report().calls > 0  # type: ignore[attr-defined]


@active
def test_runs_do_not_leak_into_each_other(setting: Setting) -> None:
    lm, a, b = lm_of("gqa"), prompts(2, P), prompts(2, P + 3, seed=7)
    name, options, how = setting
    with elision.apply(lm, name, **options) as run:
        assert isinstance(run, DllmApplied)
        made = [run.generate(x, generator=torch.Generator().manual_seed(0), **how) for x in (a, b, a)]
        report = run.report()
        run.reset()
        empty = run.report()
        again = run.generate(a, generator=torch.Generator().manual_seed(0), **how)
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[0], again)
    for out, ids in zip(made, (a, b, a), strict=True):
        assert torch.equal(out, go(setting, lm, ids)[0])
    assert report.run_count == 3 * (2 if name == "elastic_cache_dllm" and options.get("batch") != "together" else 1)
    assert (empty.calls, empty.run_count, empty.token_layers, empty.bytes_peak, empty.runs) == (0, 0, 0, 0, [])
    assert empty.seconds.total == 0


class Boom(Exception):
    """What the tests throw."""


@active
def test_an_exception_in_a_run_leaves_everything_usable(setting: Setting) -> None:
    lm, ids = lm_of("gqa"), prompts(1, P)
    name, options, how = setting

    def boom(step: Step, logits: Tensor, net: Net) -> None:
        if step.n == 2:
            raise Boom

    with elision.apply(lm, name, **options) as run:
        assert isinstance(run, DllmApplied)
        with pytest.raises(Boom):
            run.generate(ids, on_step=boom, **how)
        report = run.report()
        assert report.calls == 3
        assert report.token_layers_asked == 3 * L * (P + G)  # what was never reached is not counted as elided
        out = run.generate(ids, generator=torch.Generator().manual_seed(0), **how)
    assert torch.equal(out, go(setting, lm, ids)[0])


CHOICES = [
    (name, f.name, value)
    for name in ("dkv_cache", "elastic_cache_dllm")
    for f in create(name).options().values()
    for value in f.metadata["choices"] or ()
    if value != f.default
]


@pytest.mark.filterwarnings("ignore::elision.errors.ElisionWarning")
@pytest.mark.parametrize(("name", "option", "value"), CHOICES)
@pytest.mark.parametrize("shift", [False, True])
def test_every_choice_finishes(name: str, option: str, value: Any, shift: bool) -> None:
    """Alone and together with the choices after it; every mask is decided, the prompt stays."""
    lm, ids = lm_of("gqa", shift=shift), prompts(2, P)
    later = {o: v for n, o, v in CHOICES if n == name and o > option and o not in ("force_full", "variant")}
    for more in ({}, later):
        options = {option: value, **more}
        how = BLOCKS if name == "dkv_cache" else WINDOW
        small = {"interval": 4} if name == "dkv_cache" else {"beta": 4, "gamma": 0.9, "mask_block": 4}
        out, _ = go((name, {**small, **options}, how), lm, ids)
        assert MASK not in out
        assert torch.equal(out[:, :P], ids)


def test_two_models_are_isolated_and_one_is_taken_once() -> None:
    one, two = tiny("gqa"), copy.deepcopy(tiny("gqa"))
    ids = prompts(1, P)
    with elision.apply(one, "dkv_cache", interval=4) as a, elision.apply(two, "dkv_cache", interval=2) as b:
        assert isinstance(a, DllmApplied)
        assert isinstance(b, DllmApplied)
        assert not torch.equal(a.generate(ids, **BLOCKS), torch.zeros(1))
        b.generate(ids, **BLOCKS)
        assert a.report().full_calls < b.report().full_calls
        with pytest.raises(Conflict, match="already has dkv_cache applied"):
            elision.apply(one, "fast_dllm")
    elision.apply(one, "fast_dllm").remove()


def test_a_kept_report_does_not_keep_the_model() -> None:
    model = copy.deepcopy(tiny("mha"))
    ref = weakref.ref(model)
    with elision.apply(model, "dkv_cache", interval=2) as run:
        run.generate(prompts(1, P), **BLOCKS)  # type: ignore[attr-defined]
    report = run.report()
    del model
    gc.collect()
    assert ref() is None
    assert report.target == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("more", "words"),
    [({"steps": 8}, "steps=8 means nothing"), ({"cond": slice(1)}, "cond="), ({"branches": ("a",)}, "branches=")],
)
def test_settings_of_other_families_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        elision.apply(tiny("mha"), "dkv_cache", **more)


def test_methods_do_not_act_together() -> None:
    with pytest.raises(Conflict, match="dkv_cache, fast_dllm: each decides which rows"):
        elision.apply(tiny("mha"), ["dkv_cache", "fast_dllm"])
    with pytest.raises(Conflict, match="different families"):
        elision.apply(tiny("mha"), ["dkv_cache", "easycache"])


@active
def test_shadow_changes_no_result_and_measures_drift(setting: Setting) -> None:
    lm, ids = lm_of("gqa"), prompts(1, P)
    name, options, how = setting
    with elision.apply(lm, name, shadow=True, **options) as run:
        assert isinstance(run, DllmApplied)
        out = run.generate(ids, generator=torch.Generator().manual_seed(0), **how)
    report = run.report()
    plain_out, plain_report = go(setting, lm, ids)
    assert torch.equal(out, plain_out)
    assert report.token_layers == plain_report.token_layers
    last = report.last
    assert last is not None
    assert last.stale is not None
    assert last.drift is not None
    assert last.stale.shape == last.drift.shape == (last.calls, L)
    whole = last.depth == 0
    assert bool((last.stale[whole] < 1e-6).all())
    assert bool((last.drift[0] == 0).all())
    if name != "fewer_steps":
        assert float(last.stale[~whole].max()) > 1e-4
    assert float(last.drift[1:].max()) > 1e-3
    assert "shadow" in str(report)


def test_fewer_steps_divides_the_calls() -> None:
    lm, ids = lm_of("mha"), prompts(1, P)
    for factor, calls in ((2, 6), (3, 4), (100, 2), (1.5, 8)):
        out, report = go(("fewer_steps", {"factor": factor}, BLOCKS), lm, ids)
        assert report.calls == calls
        assert torch.equal(out, dllm.generate(lm, ids, **{**BLOCKS, "steps": calls}))
        assert report.cache_ratio == pytest.approx(1 - calls / G)
    with pytest.raises(OptionError, match="a threshold has none"):
        go(("fewer_steps", {}, {"gen_length": G, "threshold": 0.5}), lm, ids)


def test_fixed_interval_computes_candidates_and_the_last_commits() -> None:
    lm = lm_of("mha")
    steps: list[Step] = []
    setting: Setting = ("fixed_interval", {"interval": 4}, BLOCKS)
    _, report = go(setting, lm, prompts(1, P), on_step=lambda s, x, n: steps.append(s))
    assert report.last is not None
    for i, step in enumerate(steps):
        expected = torch.ones_like(step.masked) if i % 4 == 0 else step.eligible | step.committed
        assert torch.equal(report.last.query[i], expected)


def test_fast_dllm_serves_samples_of_a_batch_as_alone() -> None:
    lm, ids = lm_of("gqa"), prompts(3, P)
    for cache in ("dual", "prefix"):
        setting: Setting = ("fast_dllm", {"cache": cache, "threshold": 0.95}, {"gen_length": G, "block_length": 6})
        out, _ = go(setting, lm, ids)
        for i in range(3):
            assert torch.equal(out[i : i + 1], go(setting, lm, ids[i : i + 1])[0])


def test_fast_dllm_can_save_the_extra_call() -> None:
    lm, ids = lm_of("mha"), prompts(1, P)
    made = {}
    for extra in (True, False):
        setting: Setting = ("fast_dllm", {"threshold": 0.0, "extra_call": extra}, {"gen_length": G, "block_length": 6})
        made[extra] = go(setting, lm, ids) if extra else None
    out, report = made[True]  # type: ignore[misc]
    assert report.calls == 4
    with pytest.warns(ElisionWarning, match="elided nothing"):  # two full calls are all there is
        other, fewer = go(("fast_dllm", {"threshold": 0.0, "extra_call": False}, setting[2]), lm, ids)
    assert fewer.calls == 2
    assert torch.equal(out, other)


def test_the_extra_call_of_fast_dllm_computes_the_block_alone() -> None:
    """Also where the schedule has a single call per block."""
    setting: Setting = ("fast_dllm", {"threshold": None}, {"gen_length": G, "steps": 2, "block_length": 6})
    with pytest.warns(ElisionWarning, match="elided nothing"):
        _, report = go(setting, lm_of("mha"), prompts(1, P))
    assert report.last is not None
    assert report.last.query[:, 0].sum(dim=1).tolist() == [P + G, 6, P + G, 6]


def test_measure_returns_tokens_counters_and_seconds() -> None:
    lm, ids = lm_of("gqa"), prompts(2, P)
    for method in ("no_cache", create("dkv_cache", interval=4), create("elastic_cache_dllm", beta=4, eps=1.5)):
        how = WINDOW if getattr(method, "name", "") == "elastic_cache_dllm" else BLOCKS
        made = dllm.measure(lm, method, ids, **how)  # type: ignore[arg-type]
        assert made.tokens.shape == (2, P + G)
        assert made.run.batch == 2
        assert made.run.committed == 2 * G
        assert made.tokens_per_second == pytest.approx(2 * G / made.run.seconds)
    with pytest.raises(OptionError, match="easycache is no method for masked-diffusion"):
        dllm.measure(lm, "easycache", ids)
