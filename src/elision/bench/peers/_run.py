"""One run of a pipeline with a cache of another library on it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from elision.bench.peers._base import Peer, Stage
from elision.bench.peers._watch import Watch
from elision.denoise.report import DenoiseReport, RunRecord, StepRecord, Tally
from elision.errors import ElisionError, UnsupportedTarget
from elision.session import storage_bytes

if TYPE_CHECKING:
    from elision.bench.subject import Subject

_CALIBRATION = 30_000  # added to no seed of a comparison


@dataclass
class _Facts:
    """What an uncached run of two steps shows of a pipeline."""

    calls: int
    batched: bool
    image: bool
    memory: dict[Any, Any] = field(default_factory=dict)


_FACTS: weakref.WeakKeyDictionary[Any, dict[str, _Facts]] = weakref.WeakKeyDictionary()


def run_peer(subject: Subject, peer: Peer, steps: int, seed: int) -> tuple[Tensor, float, DenoiseReport]:
    """Sample with another library's cache on; gives images, seconds and a report.

    Putting the cache on and taking it off is outside of the measured time. The bytes that it keeps are counted during
    the first run of every setting, whose time nobody should use.
    """
    facts = _facts(subject)
    watch = Watch(subject.pipe)
    stage = Stage(
        watch.denoisers,
        steps,
        facts.calls,
        facts.batched,
        facts.image,
        watch.time,
        lambda: watch.branch,
        lambda: _ignore(subject.sample(steps, _CALIBRATION)),
        facts.memory,
    )
    bytes_of = facts.memory.setdefault("bytes", {})
    watch.before = stage.before_call
    with as_found(subject.pipe, watch.denoisers):
        with _foreign(peer, subject):
            peer.prepare(stage)
        watch.start()
        try:
            with _foreign(peer, subject), peer.on(stage) as kept:
                if (peer, steps) not in bytes_of:
                    most = [0]
                    watch.after = [lambda: _raise_to(most, storage_bytes(kept()))]
                images, seconds = subject.sample(steps, seed)
                if watch.after:
                    bytes_of[peer, steps] = most[0]
        finally:
            watch.stop()
    report = _report(peer, watch, type(subject.pipe).__name__)
    report.bytes_peak = bytes_of[peer, steps]
    report.notes = list(stage.notes)
    return images, seconds, report


def _ignore(result: Any) -> None:
    del result


def _raise_to(most: list[int], size: int) -> None:
    most[0] = max(most[0], size)


def _facts(subject: Subject) -> _Facts:
    """Known after one uncached run of two steps, which is also when the operations are counted."""
    known = _FACTS.setdefault(subject.pipe, {})
    key = repr((len(subject.prompts), subject.guidance, sorted(subject.arguments)))
    if key not in known:
        watch = Watch(subject.pipe)
        watch.start()
        try:
            subject.sample(2, _CALIBRATION)
        finally:
            watch.stop()
        calls = sum(call.n == 0 for call in watch.calls)
        batched = calls == 1 and watch.rows == 2 * len(subject.prompts)
        known[key] = _Facts(max(1, calls), batched, watch.image)
    return known[key]


@contextmanager
def _foreign(peer: Peer, subject: Subject) -> Iterator[None]:
    """Errors of the other library name it, so that a comparison can go on without it."""
    try:
        yield
    except ElisionError:
        raise
    except Exception as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedTarget(f"{peer.name} does not run on {type(subject.pipe).__name__}: {told[0]}") from error


@contextmanager
def as_found(pipe: Any, denoisers: Sequence[nn.Module]) -> Iterator[None]:
    """Put every instance attribute of the pipeline and of the denoisers' modules back at the end, in its order.

    Libraries leave hook registries, replaced forwards and markers behind. cache-dit also exchanges lists of blocks
    during calls, by which they move behind their siblings, and caches that go by the order of the blocks would then
    begin at the wrong one.
    """
    owners = [pipe, *(m for model in denoisers for m in model.modules())]
    before = [_contents(owner) for owner in owners]
    try:
        yield
    finally:
        for owner, (attributes, inner) in zip(owners, before, strict=True):
            _refill(vars(owner), attributes)
            for name, entries in inner.items():
                _refill(attributes[name], entries)


def _contents(owner: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The attributes of an object, and what those of a module hold that are dictionaries: its children, its weights."""
    attributes = dict(vars(owner))
    if not isinstance(owner, nn.Module):
        return attributes, {}
    return attributes, {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}


def _refill(now: dict[str, Any], before: dict[str, Any]) -> None:
    same = len(now) == len(before) and all(a == b and now[a] is before[b] for a, b in zip(now, before, strict=True))
    if not same:
        now.clear()
        now.update(before)


def _report(peer: Peer, watch: Watch, target: str) -> DenoiseReport:
    """The watch's counts in the form that all reports have."""
    report = DenoiseReport([peer.name], target, run_count=1, calls=len(watch.calls))
    computed = whole = 0
    times = watch.scheduler.timesteps
    steps = 1 + max(call.n for call in watch.calls)
    run = RunRecord(0, steps)
    for n in range(steps):
        costs = [watch.cost(call) for call in watch.calls if call.n == n]
        computed += sum(ran for ran, _ in costs)
        whole += sum(full for _, full in costs)
        tally = _tally(peer, [ran / full > 0.999 for ran, full in costs])
        run.steps.append(StepRecord(n, float(times[min(n, len(times) - 1)]), None, {peer.name: tally}))
        report.outputs_computed += tally.computed
        report.outputs_stood_in += tally.stood_in
    report.runs = [run]
    report.steps_computed, report.steps_reused = run.count("computed"), run.count("reused")
    report.steps_predicted, report.steps_mixed = run.count("predicted"), run.count("mixed")
    report.flops_computed, report.flops_elided = computed, whole - computed
    return report


def _tally(peer: Peer, full: Sequence[bool]) -> Tally:
    """Per call of the step whether it was computed whole. Elsewhere every place that the cache holds stood in."""
    some = len(full) - sum(full)
    return Tally(sum(full), predicted=some) if peer.kind == "predicted" else Tally(sum(full), reused=some)
