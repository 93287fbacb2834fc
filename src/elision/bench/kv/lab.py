"""Where experiments on KV methods run: one model, prompts by seed, and a memory of everything that was tried."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elision.bench import stats
from elision.bench.claims import Measured
from elision.bench.kv import measure
from elision.bench.kv.measure import Outcome, Truth
from elision.bench.kv.subject import LanguageSubject
from elision.bench.kv.tasks import TASKS, Prompt, prompts
from elision.bench.spec import parse
from elision.bench.stats import Estimate
from elision.errors import OptionError
from elision.kv.fit import record
from elision.kv.method import KVMethod
from elision.kv.parts import Call
from elision.profile import Profile

_REMEMBERED = 8192  # tokens whose queries, keys, values and outputs are kept: 1.5 GB of SmolLM2
Trial = tuple[KVMethod, bool, str, int]  # whether it is fitted


@dataclass
class KVLab:
    """Tries methods on demand; what was tried once is remembered, so that claims share their runs.

    Attributes:
        subject: the model.
        seeds: a prompt for each; every number is paired over them.
        told: called with what runs next.
        rows: prompts in one batch.
    """

    subject: LanguageSubject
    seeds: Sequence[int]
    told: Callable[[str], None] = field(default=lambda text: None)
    rows: int = 8
    _truths: OrderedDict[tuple[str, int], list[Truth]] = field(default_factory=OrderedDict)
    _tried: dict[Trial, list[Outcome]] = field(default_factory=dict)
    _full: dict[tuple[str, int], list[Outcome]] = field(default_factory=dict)
    _profiles: dict[KVMethod, Profile] = field(default_factory=dict)
    _oracles: dict[tuple[int, int], dict[int, Tensor]] = field(default_factory=dict)

    def prompts(self, task: str, length: int) -> list[Prompt]:
        """A prompt per seed."""
        return prompts(TASKS[task], self.subject, length, self.seeds)

    def truths(self, task: str, length: int) -> list[Truth]:
        """The full runs of a task, the latest of which are remembered."""
        key = (task, length)
        if key in self._truths:
            self._truths.move_to_end(key)
            return self._truths[key]
        made = self.prompts(task, length)
        while self._truths and self._tokens() + sum(len(p.turns[0].ids) for p in made) > _REMEMBERED:
            self._truths.popitem(last=False)
            self._oracles.clear()
        found = []
        for batch in measure.batches(made, self.rows):
            self.told(f"{task}, full cache, seeds {batch[0].seed} to {batch[-1].seed}")
            found.append(measure.full(self.subject, batch))
        self._truths[key] = found
        self._full[key] = self._sorted(outcome for truth in found for outcome in measure.plain(truth).outcomes)
        return found

    def _tokens(self) -> int:
        return sum(truth.recording.tokens for truths in self._truths.values() for truth in truths)

    def _sorted(self, outcomes: Any) -> list[Outcome]:
        places = {seed: place for place, seed in enumerate(self.seeds)}
        return sorted(outcomes, key=lambda o: places[o.seed])

    def full(self, task: str, length: int) -> list[Outcome]:
        """The full cache's outcomes, in the order of the seeds."""
        if (task, length) not in self._full:
            self.truths(task, length)
        return self._full[task, length]

    def outcomes(self, method: KVMethod, task: str, length: int, fitted: bool = False) -> list[Outcome]:
        """A method's outcomes, in the order of the seeds; a profile is fitted on other prompts."""
        fitted = fitted or method.needs_profile
        key = (method, fitted, task, length)
        if key not in self._tried:
            truths, profile = self.truths(task, length), self.profile(method, length) if fitted else None
            self.told(f"{task}, {method.name}")
            trials = [measure.trial(self.subject, method, truth, profile) for truth in truths]
            self._tried[key] = self._sorted(outcome for trial in trials for outcome in trial.outcomes)
        return self._tried[key]

    def profile(self, method: KVMethod, length: int, count: int = 10) -> Profile:
        """What a method learns from `count` prompts of prose with seeds that no experiment uses."""
        if method not in self._profiles:
            self.told(f"{method.name}, offline part")
            texts = [TASKS["continuation"].make(self.subject, length, 10_000 + i, 0.5) for i in range(count)]
            self._profiles[method] = method.fit(
                self.subject.model, [self.subject.tensor([p.turns[0].ids]) for p in texts]
            )
        return self._profiles[method]

    # -- comparisons ---------------------------------------------------------------------------------------------------

    def values(self, method: KVMethod | None, what: str, task: str, length: int, fitted: bool = False) -> list[float]:
        """One number per prompt: "nll", "kl", "exact", "agree" or "share"; `None` is the full cache."""
        found = self.full(task, length) if method is None else self.outcomes(method, task, length, fitted)
        values = [getattr(outcome, what) for outcome in found]
        if any(value is None for value in values):
            raise OptionError(f"{task} has no right answer, so {what!r} is not defined")
        return [float(value) for value in values]

    def lead(self, ours: KVMethod | None, theirs: KVMethod | None, what: str, task: str, length: int) -> Estimate:
        """How much better `ours` is, paired by prompt: positive where it has less loss, or more right answers."""
        mine, other = (self.values(method, what, task, length) for method in (ours, theirs))
        return stats.difference(mine, other) if what in ("exact", "agree") else stats.difference(other, mine)

    def share(self, method: KVMethod, task: str, length: int) -> float:
        """Bytes held as a share of a full cache in 16 bits, on average.

        A model in float32 holds tokens that are not packed in twice as many bytes as it is published with; codes and
        their parameters take the same. Counted against float32, packing would look twice as good beside eviction.
        """
        times = float(self.subject.model.dtype.itemsize) / 2
        values = [o.share * times - o.exact_share * (times - 1) for o in self.outcomes(method, task, length)]
        return sum(values) / len(values)

    def versus(self, ours: str, theirs: str, task: str, length: int, what: str = "nll") -> Measured:
        """The lead of one method over another, each as text; what was held stands in the setting."""
        mine, other = method(ours), method(theirs)
        held = (
            f"{self.share(mine, task, length):.1%} and {self.share(other, task, length):.1%} of a 16-bit cache's bytes"
        )
        value = self.lead(mine, other, what, task, length)
        return Measured(f"{task}, {ours} against {theirs}", value, held)

    def against_full(self, ours: str, task: str, length: int, what: str = "nll") -> Measured:
        """The lead of a method over the full cache."""
        mine = method(ours)
        full = self.values(None, what, task, length)
        remark = (
            f"{self.share(mine, task, length):.1%} of a 16-bit cache's bytes; full cache {sum(full) / len(full):.3g}"
        )
        return Measured(f"{task}, {ours} against the full cache", self.lead(mine, None, what, task, length), remark)

    def fitted(self, ours: str, task: str, length: int) -> Measured:
        """How many nats more a method loses with a profile from other prompts than without one."""
        with_profile, without = (self.values(method(ours), "nll", task, length, fitted) for fitted in (True, False))
        return Measured(f"{task}, {ours}", stats.difference(with_profile, without), "profile of 10 prompts of prose")

    # -- what is kept --------------------------------------------------------------------------------------------------

    def layers(self, ours: KVMethod, task: str, length: int) -> Tensor:
        """Tokens held after the prompt, [prompts, layers]."""
        return torch.tensor([outcome.layers for outcome in self.outcomes(ours, task, length)])

    @torch.no_grad()
    def recall(self, ours: KVMethod, task: str, length: int, budget: int) -> list[float]:
        """How much of what decoding will look at is kept: share of the `budget` prompt tokens with most attention from
        the answer's own queries, per layer and KV head, that the method holds after the prompt; one per prompt."""
        found: dict[int, float] = {}
        profile = self.profile(ours, length) if ours.needs_profile else None
        for truth in self.truths(task, length):
            best = self._oracle(truth, budget)
            kept = measure.kept(self.subject, ours, truth, profile)
            hits = [_hits(best[layer], positions) for layer, positions in kept.items()]  # each [B]
            for prompt, value in zip(truth.prompts, torch.stack(hits).mean(0).tolist(), strict=True):
                found[prompt.seed] = value
        return [found[seed] for seed in self.seeds]

    def _oracle(self, truth: Truth, budget: int) -> dict[int, Tensor]:
        """Per layer the prompt tokens that the answer's queries attend to most, [B, G, budget]."""
        key = (id(truth), budget)
        if key not in self._oracles:
            answer, length = truth.answers[0], truth.recording.ids.shape[1]
            best: dict[int, Tensor] = {}

            def seen(call: Call) -> None:
                weights = call.probs(answer.shape[1])[..., :length].sum(3).mean(2)  # [B, G, n]
                best[call.layer] = weights.topk(min(budget, length)).indices

            record(self.subject.model, [torch.cat([truth.recording.ids, answer], 1)], seen)
            self._oracles[key] = best
        return self._oracles[key]


def method(text: str) -> KVMethod:
    """A method from its text."""
    found = parse(text).method
    assert isinstance(found, KVMethod)
    return found


def _hits(best: Tensor, kept: Tensor) -> Tensor:
    """Share of `best` [B, G, k] that is among `kept` [B, G or 1, n], per row."""
    kept = kept.expand(-1, best.shape[1], -1).to(best.device)
    return (best[..., None] == kept[..., None, :]).any(-1).float().mean((1, 2))
