"""The adapter for lm-eval, with a stand-in for the package: it needs its three kinds of requests and nothing else."""

from __future__ import annotations

import importlib
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import elision
from elision.bench.kv.harness import Requests, adapter, evaluate
from elision.bench.kv.lab import method
from elision.bench.kv.subject import LanguageSubject
from elision.errors import MissingDependency

CONTEXT = "When the apple fell on the stone, the river said: "


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    package, api, model = (types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"))
    package.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    model.LM = type("LM", (), {})  # type: ignore[attr-defined]

    def simple_evaluate(model: Any, tasks: list[str], limit: int | None) -> dict[str, Any]:
        request = SimpleNamespace(args=(CONTEXT, " a stone"))
        return {"results": {task: {"ll": model.loglikelihood([request])[0][0], "limit": limit} for task in tasks}}

    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    for module in (package, api, model):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_without_the_package_the_error_says_what_to_install(tiny: LanguageSubject) -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed")
    with pytest.raises(MissingDependency, match="pip install lm-eval"):
        evaluate(tiny, "snapkv", ["wikitext"])


def test_every_arm_is_evaluated(tiny: LanguageSubject, lm_eval: None) -> None:
    found = evaluate(tiny, ["snapkv:budget=8,window=4", "window:budget=4"], ["one", "two"], limit=3)
    assert list(found) == ["DynamicCache", "snapkv:budget=8,window=4", "window:budget=4"]
    assert found["DynamicCache"]["one"]["limit"] == 3
    assert found["DynamicCache"]["one"]["ll"] != found["window:budget=4"]["one"]["ll"]


@torch.no_grad()
def test_likelihoods_of_the_full_cache_are_the_models(tiny: LanguageSubject) -> None:
    got, greedy = Requests(tiny, None).loglikelihood(CONTEXT, "a stone fell")
    prompt = tiny.encode(CONTEXT.rstrip())
    whole = tiny.encode(CONTEXT.rstrip() + " a stone fell")
    assert whole[: len(prompt)] == prompt
    rows = tiny.model(tiny.tensor([whole])).logits[0].log_softmax(-1)
    want = sum(float(rows[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
    assert got == pytest.approx(want, abs=1e-3)
    assert not greedy


@torch.no_grad()
def test_rolling_likelihood_of_the_full_cache_is_the_models(tiny: LanguageSubject) -> None:
    got = Requests(tiny, None).rolling(CONTEXT)
    ids = [tiny.tokenizer.bos_token_id, *tiny.encode(CONTEXT)]
    rows = tiny.model(tiny.tensor([ids])).logits[0].log_softmax(-1)
    assert got == pytest.approx(sum(float(rows[i - 1, ids[i]]) for i in range(1, len(ids))), abs=1e-3)
    assert Requests(tiny, method("window:budget=4")).rolling(CONTEXT) != pytest.approx(got, abs=1e-3)


def test_generation_ends_where_it_is_told(tiny: LanguageSubject) -> None:
    plain = Requests(tiny, None).generate(CONTEXT, {"max_gen_toks": 8, "until": []})
    assert plain
    stop = plain[len(plain) // 2]
    assert stop not in Requests(tiny, None).generate(CONTEXT, {"max_gen_toks": 8, "until": [stop]})
    kept = Requests(tiny, method("snapkv:budget=1024")).generate(CONTEXT, {"max_gen_toks": 8})
    assert kept == plain


def test_the_model_is_clean_after_every_request(tiny: LanguageSubject, lm_eval: None) -> None:
    made = adapter(tiny, method("window:budget=4"))
    made.loglikelihood([SimpleNamespace(args=(CONTEXT, "a stone"))])
    made.loglikelihood_rolling([SimpleNamespace(args=(CONTEXT,))])
    made.generate_until([SimpleNamespace(args=(CONTEXT, {"max_gen_toks": 2}))])
    with elision.apply(tiny.model, "window", budget=4) as run:  # nothing else is applied any more
        tiny.model(tiny.tensor([tiny.encode(CONTEXT)]), past_key_values=run.cache())  # type: ignore[attr-defined]
        assert run.report().bytes_held > 0
