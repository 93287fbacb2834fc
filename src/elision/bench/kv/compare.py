"""Comparisons of KV methods: full cache, methods, controls and other caches on the same prompts, in one process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers.cache_utils import DynamicCache, QuantizedCache

from elision.bench.kv import measure, tasks
from elision.bench.kv.measure import Trial, Truth
from elision.bench.kv.subject import LanguageSubject, load_language
from elision.bench.kv.summary import KVArm, KVComparison, sample_of
from elision.bench.kv.tasks import Prompt
from elision.bench.kv.timing import Entry, race
from elision.bench.spec import Spec, parse, parse_many
from elision.errors import OptionError
from elision.kv.method import KVMethod
from elision.profile import Profile

AUTO = ("cake:budget=0.25", "snapkv:budget=0.25", "h2o:budget=0.25", "zipcache", "mikv", "uniform_rtn:bits=2")
CONTROLS = ("window:budget=0.25", "random:budget=0.25")
ROWS = 8
Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, what: str) -> None:
    del done, total, what


def compare_kv(
    model: Any = "smollm2",
    methods: str | Iterable[str] = "auto",
    *,
    tasks: str | Sequence[str] | None = None,
    prompts: int | Sequence[int] = 5,
    length: int = 384,
    controls: bool = True,
    timing: int = 3,
    steps: int = 16,
    progress: Progress = _silent,
) -> KVComparison:
    """Compare KV methods on one model, each beside the full cache.

    Every prompt is passed once through the full cache, and what its attention saw is shown to every method; answers are
    decoded token by token for each. Times are measured apart, on real prompts, in rounds that run every arm once.

    Args:
        model: a zoo name, a hub id, a local path, a pair (model, tokenizer) or a `LanguageSubject`.
        methods: texts like "cake:budget=0.25", or "auto".
        tasks: names of tasks, by default all; see `elision.bench.kv.tasks`.
        prompts: how many per task, or which seeds.
        length: tokens of every prompt.
        controls: whether to add `window` and `random` at a quarter, and transformers' other caches.
        timing: rounds of the timing; 0 leaves it out.
        steps: tokens that are decoded in each round.
        progress: told how many of how many trials are done, and what runs next.
    """
    specs = parse_many(AUTO if methods == "auto" else methods)
    seeds = list(range(prompts)) if isinstance(prompts, int) else list(prompts)
    if not seeds:
        raise OptionError("prompts=0 is out of range; it must be at least 1")
    if timing < 0 or steps < 1:
        raise OptionError(f"timing={timing}, steps={steps}: at least 0 rounds of at least 1 token")
    if controls:
        specs += [parse(text) for text in CONTROLS if parse(text).label not in {spec.label for spec in specs}]
    for spec in specs:
        if not isinstance(spec.method, KVMethod):
            raise OptionError(f"{spec.name} is a method of the family {spec.method.family!r}, not of 'kv'")
    chosen = _tasks(tasks)
    subject = load_language(model)
    made = [p for task in chosen for p in _prompts(task, subject, length, seeds)]
    arms = [KVArm("full", "DynamicCache"), *_arms(specs), *(_others(subject) if controls else [])]
    trials = _Trials(subject, arms, [s.profile for s in specs], progress)
    trials.run(list(measure.batches(made, ROWS)))
    if timing:
        trials.time(length, timing, steps)
    notes = [f"{arm.label}: {arm.why}" for arm in arms if arm.why]
    if subject.model.dtype.itemsize > 2:
        kind = str(subject.model.dtype).removeprefix("torch.")
        notes.append(f"Bytes are beside a full cache in {kind}; beside one in 16 bits packed tokens save half as much")
    return KVComparison(subject.name, [t.name for t in chosen], length, seeds, arms, notes)


def _tasks(names: str | Sequence[str] | None) -> list[tasks.Task]:
    return tasks.choose(names)


def _prompts(task: tasks.Task, subject: LanguageSubject, length: int, seeds: Sequence[int]) -> list[Prompt]:
    return tasks.prompts(task, subject, length, seeds)


def _arms(specs: Sequence[Spec]) -> list[KVArm]:
    made: dict[str, KVArm] = {}
    for spec in specs:
        made.setdefault(spec.label, KVArm("control" if spec.method.control else "method", spec.label, spec=spec))
    return sorted(made.values(), key=lambda arm: arm.kind != "method")


def _others(subject: LanguageSubject) -> list[KVArm]:
    """Transformers' own compressed and offloaded caches, or why they cannot be had here."""
    found = []
    for bits in (4, 2):
        backend, why = quantized_backend()
        found.append(
            KVArm("cache", f"QuantizedCache:bits={bits}" + (f",backend={backend}" if backend else ""), why=why)
        )
    if subject.device.type != "cuda":
        why = f"moves tensors between an accelerator and main memory; this model is on the {subject.device.type}"
        found.append(KVArm("cache", "OffloadedCache", why=why))
    else:
        found.append(KVArm("cache", "OffloadedCache"))
    return found


def quantized_backend() -> tuple[str, str]:
    """The installed backend of `QuantizedCache`, and an empty text; or none and the reason."""
    for backend, package in (("quanto", "optimum.quanto"), ("hqq", "hqq")):
        try:
            if importlib.util.find_spec(package) is not None:
                return backend, ""
        except ModuleNotFoundError:
            continue
    return "", "neither of its backends is installed: pip install optimum-quanto, or hqq"


def other_cache(arm: KVArm, subject: LanguageSubject) -> Any:
    """A fresh cache of the kind that `arm` is about."""
    config = subject.model.config
    if arm.name == "OffloadedCache":
        return DynamicCache(config=config, offloading=True)
    bits = int(arm.label.partition("bits=")[2][0])
    return QuantizedCache(backend=quantized_backend()[0], config=config, nbits=bits)


class _Trials:
    """Runs all arms on all batches."""

    def __init__(
        self, subject: LanguageSubject, arms: Sequence[KVArm], profiles: Sequence[str | None], progress: Progress
    ) -> None:
        self.subject, self.arms, self.progress = subject, arms, progress
        self.live = [arm for arm in arms if not arm.why]
        self.profiles = {path: Profile.load(path) for path in profiles if path is not None}

    def run(self, batches: Sequence[Sequence[Prompt]]) -> None:
        """Every arm on every batch; the first prompt with a hidden fact is the sample."""
        total, done = len(batches) * len(self.live), 0
        sampled = False
        for batch in batches:
            self.progress(done, total, f"{batch[0].task}, full cache")
            truth = measure.full(self.subject, batch)
            for arm in self.live:
                self.progress(done, total, f"{batch[0].task}, {arm.label}")
                trial = self._trial(arm, truth)
                arm.outcomes += trial.outcomes
                arm.notes += [note for note in trial.notes if note not in arm.notes]
                if trial.kept is not None and batch[0].where is not None and not sampled:
                    arm.sample = sample_of(self.subject, batch[0], trial.kept)
                done += 1
            sampled = sampled or batch[0].where is not None

    def _trial(self, arm: KVArm, truth: Truth) -> Trial:
        if arm.kind == "full":
            return measure.plain(truth)
        if arm.spec is None:
            return measure.other_cache(self.subject, truth, other_cache(arm, self.subject))
        return measure.trial(self.subject, arm.spec.method, truth, self._profile(arm))  # type: ignore[arg-type]

    def _profile(self, arm: KVArm) -> Profile | None:
        return None if arm.spec is None or arm.spec.profile is None else self.profiles[arm.spec.profile]

    def time(self, length: int, rounds: int, steps: int) -> None:
        """Prefill and decoding of one prompt, all arms in turn."""
        ids = self.subject.tensor([tasks.continuation(self.subject, length, 0, 0.5).turns[0].ids])
        entries = {}
        for arm in self.live:
            if arm.spec is not None:
                entries[arm.label] = Entry(arm.spec.method, self._profile(arm))  # type: ignore[arg-type]
            elif arm.kind == "cache":
                entries[arm.label] = Entry(cache=lambda arm=arm: other_cache(arm, self.subject))  # type: ignore[misc]
            else:
                entries[arm.label] = Entry()
        total, place = (rounds + 1) * len(entries), [0]

        def told(name: str) -> None:
            self.progress(place[0], total, f"timing {name}")
            place[0] += 1

        times = race(self.subject.model, ids, entries, steps=steps, rounds=rounds, told=told)
        for arm in self.live:
            arm.times = times[arm.label]
        self.progress(total, total, "done")
