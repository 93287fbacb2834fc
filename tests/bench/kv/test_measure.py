"""Recorded prompts stand for real ones; outcomes are what a plain loop would find."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicCache

import elision
from elision.bench.kv import measure, tasks
from elision.bench.kv.measure import Truth
from elision.bench.kv.replay import record, replay, replayable
from elision.bench.kv.subject import LanguageSubject
from elision.bench.spec import parse
from elision.kv.engine import KVApplied

LENGTH = 288
SPECS = {
    "h2o": "h2o:budget=64",
    "snapkv": "snapkv:budget=64",
    "cake": "cake:budget=64",
    "zipcache": "zipcache",
    "mikv": "mikv",
    "uniform_rtn": "uniform_rtn:bits=4,residual=32",
    "random": "random:budget=64",
}


def specs() -> list[str]:
    """A setting at which every registered method that needs no profile leaves something out."""
    rows = [row for row in elision.methods("kv") if not row.needs_profile]
    return [SPECS.get(row.name, f"{row.name}:budget=64") for row in rows]


@pytest.fixture(scope="module")
def truth(tiny: LanguageSubject) -> Truth:
    return measure.full(tiny, tasks.prompts(tasks.TASKS["turns"], tiny, LENGTH, [3, 4]))


@pytest.mark.parametrize("text", specs())
@torch.no_grad()
def test_a_recorded_prompt_leaves_every_method_where_a_real_one_does(
    tiny: LanguageSubject, truth: Truth, text: str
) -> None:
    ids = truth.recording.ids
    with elision.apply(tiny.model, parse(text).method) as run:
        assert isinstance(run, KVApplied)
        real, shown = run.cache(), run.cache()
        tiny.model(ids, past_key_values=real, use_cache=True)
        if not replayable(run):
            pytest.skip("passed for real")
        replay(run, truth.recording, shown)
        kept, again = run.kept(real), run.kept(shown)
        assert all(torch.equal(kept[i], again[i]) for i in kept)
        nxt = truth.answers[0][:, :1]
        a = tiny.model(nxt, past_key_values=real, use_cache=True).logits
        b = tiny.model(nxt, past_key_values=shown, use_cache=True).logits
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert real.layers[0].store.nbytes == shown.layers[0].store.nbytes


def test_recordings_survive_the_methods_that_write_into_their_stores(tiny: LanguageSubject, truth: Truth) -> None:
    before = [call.k.clone() for call in truth.recording.calls]
    first = measure.trial(tiny, parse("h2o:budget=64").method, truth)  # type: ignore[arg-type]
    assert all(torch.equal(a, call.k) for a, call in zip(before, truth.recording.calls, strict=True))
    again = measure.trial(tiny, parse("h2o:budget=64").method, truth)  # type: ignore[arg-type]
    assert first.outcomes == again.outcomes


@torch.no_grad()
def test_recording_is_the_full_cache(tiny: LanguageSubject, truth: Truth) -> None:
    ids = truth.recording.ids
    recording = record(tiny.model, ids)
    out = tiny.model(ids, past_key_values=DynamicCache(config=tiny.model.config), use_cache=True)
    torch.testing.assert_close(recording.logits, out.logits[:, -1])
    assert torch.equal(recording.calls[1].k, out.past_key_values.layers[1].keys)


@torch.no_grad()
def test_outcomes_are_those_of_a_plain_loop(tiny: LanguageSubject) -> None:
    """One prompt by hand: prefill, answer token by token, a second turn on the same cache."""
    prompt = tasks.TASKS["turns"].make(tiny, LENGTH, 7, 0.5)
    truth = measure.full(tiny, [prompt])
    method = parse("snapkv:budget=48").method
    got = measure.trial(tiny, method, truth).outcomes[0]  # type: ignore[arg-type]
    logps, targets = [], []
    with elision.apply(tiny.model, method) as run:
        cache = run.cache()  # type: ignore[attr-defined]
        for place, turn in enumerate(prompt.turns):
            logits = tiny.model(tiny.tensor([turn.ids]), past_key_values=cache).logits[0, -1]
            for number, token in enumerate(turn.answer):
                if place or number:
                    logps.append(logits.log_softmax(-1)[token])
                    targets.append(token)
                logits = tiny.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        report = run.report()
    assert got.nll == pytest.approx(-float(torch.stack(logps).mean()), abs=1e-4)
    assert got.bytes_held == report.bytes_held
    assert len(targets) == sum(len(t.answer) for t in prompt.turns) - 1
    assert got.layers == [48.0] * 3
    assert got.bytes_held < got.bytes_full
    assert got.kl > 0


def test_the_full_cache_has_no_divergence_and_full_bytes(tiny: LanguageSubject, truth: Truth) -> None:
    for outcome, prompt in zip(measure.plain(truth).outcomes, truth.prompts, strict=True):
        assert outcome.kl == pytest.approx(0, abs=1e-6)
        assert outcome.agree == 1
        tokens = sum(len(t.ids) + len(t.answer) for t in prompt.turns)
        assert outcome.bytes_held == outcome.bytes_full == tokens * 3 * 2 * 2 * 32 * 4


def test_keeping_everything_is_the_full_cache(tiny: LanguageSubject, truth: Truth) -> None:
    trial = measure.trial(tiny, parse("snapkv:budget=4096").method, truth)  # type: ignore[arg-type]
    assert [o.nll for o in trial.outcomes] == pytest.approx([o.nll for o in measure.plain(truth).outcomes], abs=1e-5)
    assert any("left nothing out" in note for note in trial.notes)


def test_a_continuation_is_the_full_caches_own(tiny: LanguageSubject) -> None:
    truth = measure.full(tiny, tasks.prompts(tasks.TASKS["continuation"], tiny, 128, [0, 1]))
    outcome = measure.plain(truth).outcomes[0]
    assert outcome.exact is None
    assert truth.answers[0].shape == (2, measure.CONTINUED)
    assert torch.equal(truth.predicted[0].argmax(-1), truth.answers[0])


def test_kept_tells_held_from_packed(tiny: LanguageSubject, truth: Truth) -> None:
    kept = measure.trial(tiny, parse("snapkv:budget=48").method, truth).kept  # type: ignore[arg-type]
    assert kept is not None
    assert len(kept.held) == LENGTH or len(kept.held) == truth.recording.ids.shape[1]
    assert sum(kept.held) == pytest.approx(48, abs=1e-3)
    assert max(kept.packed) == 0
    packed = measure.trial(tiny, parse("uniform_rtn:residual=32").method, truth).kept  # type: ignore[arg-type]
    assert packed is not None
    assert [a + b for a, b in zip(packed.held, packed.packed, strict=True)] == pytest.approx([1.0] * len(packed.held))
    assert max(packed.packed) == pytest.approx(1.0)


def test_batches_hold_prompts_of_one_shape(tiny: LanguageSubject) -> None:
    made = [p for t in ("passkey", "lines") for p in tasks.prompts(tasks.TASKS[t], tiny, 200, range(5))]
    groups = list(measure.batches(made, rows=2))
    assert sum(len(g) for g in groups) == 10
    assert all(len({p.shape for p in g}) == 1 and len(g) <= 2 for g in groups)


def test_bytes_of_wrapped_tensors_are_those_of_their_parts() -> None:
    """As in quanto: a tensor that holds codes (wrapped once more), scales and shifts; many of them, none forgotten."""

    def wrapped() -> SimpleNamespace:
        outer, codes = torch.zeros(0), torch.zeros(0, dtype=torch.uint8)
        codes._data = torch.zeros(64, dtype=torch.uint8)  # type: ignore[attr-defined]
        outer._data, outer._scale, outer._shift = codes, torch.zeros(4), torch.zeros(4)  # type: ignore[attr-defined]
        return SimpleNamespace(keys=torch.zeros(2, 8), quantized=outer, again=outer)

    found = list(measure._tensors([wrapped() for _ in range(20)]))
    assert sum(t.untyped_storage().nbytes() for t in found) == 20 * (64 + 2 * 16 + 64)
