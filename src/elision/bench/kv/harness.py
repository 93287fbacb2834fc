"""Tasks of the package lm-eval (RULER's among them) on a model with a method applied. The package is optional.

    from elision.bench.kv.harness import evaluate
    evaluate("HuggingFaceTB/SmolLM2-1.7B-Instruct", "cake:budget=0.25", ["niah_single_1"], limit=50)

Every request is one conversation with a cache of its own: lm-eval asks for log-likelihoods by passing prompt and answer
in one forward, after which a method has nothing left to change; here the prompt is passed first, the method acts, and
the answer follows token by token.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from elision.bench.kv.measure import applied
from elision.bench.kv.subject import LanguageSubject, load_language
from elision.bench.spec import parse_many
from elision.errors import MissingDependency
from elision.kv.method import KVMethod


def evaluate(
    model: Any, methods: str | Iterable[str], tasks: Sequence[str], *, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Scores by arm and task: the full cache, and every method.

    Args:
        model: a zoo name, a hub id, a local path, a pair (model, tokenizer) or a `LanguageSubject`.
        methods: texts like "cake:budget=0.25".
        tasks: names that lm-eval knows.
        limit: samples of every task.

    Raises:
        MissingDependency: lm-eval is not installed.
    """
    harness = _package()
    from elision.bench.kv.compare import AUTO

    subject = load_language(model)
    specs = parse_many(AUTO if methods == "auto" else methods)
    arms: list[tuple[str, KVMethod | None, Any]] = [("DynamicCache", None, None)]
    arms += [(spec.label, spec.method, spec.profile) for spec in specs]  # type: ignore[misc]
    found: dict[str, dict[str, Any]] = {}
    for label, method, profile in arms:
        lm = adapter(subject, method, profile)
        found[label] = harness.simple_evaluate(model=lm, tasks=list(tasks), limit=limit)["results"]
    return found


def adapter(subject: LanguageSubject, method: KVMethod | None, profile: Any = None) -> Any:
    """A model with a method applied, as an `LM` of lm-eval; `None` is the full cache."""
    base = importlib.import_module(f"{_package().__name__}.api.model").LM
    requests = Requests(subject, method, profile)

    class Adapter(base):  # type: ignore[misc, valid-type]
        """Hands the harness's requests over."""

        def loglikelihood(self, given: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            del kwargs
            return [requests.loglikelihood(*request.args) for request in given]

        def loglikelihood_rolling(self, given: Any, **kwargs: Any) -> list[float]:
            del kwargs
            return [requests.rolling(request.args[0]) for request in given]

        def generate_until(self, given: Any, **kwargs: Any) -> list[str]:
            del kwargs
            return [requests.generate(*request.args) for request in given]

    return Adapter()


class Requests:
    """What lm-eval asks for, one conversation for each request; knows nothing of that package."""

    def __init__(self, subject: LanguageSubject, method: KVMethod | None, profile: Any = None) -> None:
        self.subject, self.method, self.profile = subject, method, profile

    @torch.no_grad()
    def _score(self, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
        """Log-likelihood of `answer` after `prompt`, and whether greedy decoding says the same."""
        total, greedy = 0.0, True
        model = self.subject.model
        with self._cache() as cache:
            logits = model(self.subject.tensor([prompt]), past_key_values=cache, use_cache=True).logits[0, -1]
            for token in answer:
                row = logits.float().log_softmax(-1)
                total += float(row[token])
                greedy = greedy and int(row.argmax()) == token
                logits = model(self.subject.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
        return total, greedy

    def _cache(self) -> _Conversation:
        return _Conversation(self.subject.model, self.method, self.profile)

    def _start(self) -> list[int]:
        tokenizer = self.subject.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [first]

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Of one continuation; spaces at the end of the context belong to it, as in lm-eval."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        prompt = self.subject.encode(stripped) if stripped else self._start()
        whole = self.subject.encode(stripped + continuation)
        answer = whole[len(prompt) :] if stripped and whole[: len(prompt)] == prompt else None
        return self._score(prompt, self.subject.encode(continuation) if answer is None else answer)

    def rolling(self, text: str) -> float:
        """Of a whole text, half of which is the prompt, since a cache is compressed once a prompt is through.

        The first half counts as well: its likelihood is that of the model's own forward.
        """
        ids = [*self._start(), *self.subject.encode(text)]
        half = max(len(ids) // 2, 1)
        with torch.no_grad():
            rows = self.subject.model(self.subject.tensor([ids[:half]])).logits[0, :-1].float().log_softmax(-1)
        first = float(rows.gather(-1, self.subject.tensor([ids[1:half]])[0, :, None]).sum()) if half > 1 else 0.0
        return first + self._score(ids[:half], ids[half:])[0]

    def generate(self, context: str, options: dict[str, Any]) -> str:
        """Greedy, until one of the texts in `until` or `max_gen_toks` tokens."""
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(options.get("max_gen_toks", 256))
        ids = self.subject.tensor([self.subject.encode(context) or self._start()])
        with self._cache() as cache:
            pad = self.subject.tokenizer.eos_token_id
            mask = torch.ones_like(ids)
            made = self.subject.model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=pad,
                stop_strings=stops or None,
                tokenizer=self.subject.tokenizer if stops else None,
            )
        text: str = self.subject.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        ends = [text.find(stop) for stop in stops if stop and stop in text]
        return text[: min(ends)] if ends else text


class _Conversation:
    """A fresh cache, with the method applied as long as it lives."""

    def __init__(self, model: Any, method: KVMethod | None, profile: Any) -> None:
        self._model, self._around = model, None if method is None else applied(model, method, profile, [])

    def __enter__(self) -> DynamicCache:
        if self._around is None:
            return DynamicCache(config=self._model.config)
        return self._around.__enter__().cache()

    def __exit__(self, *error: Any) -> None:
        if self._around is not None:
            self._around.__exit__(*error)


def _package() -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependency("lm-eval is not installed: pip install lm-eval")
    return importlib.import_module("lm_eval")
