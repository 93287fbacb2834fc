"""Claims of Fast-dLLM (arXiv 2505.22618), and about baselines and controls for masked-diffusion models."""

from __future__ import annotations

from collections.abc import Iterator

from elision.bench.claims import Measured, claim
from elision.bench.dllm import shares
from elision.bench.dllm.lab import UNCACHED, DllmLab
from elision.bench.dllm.measure import Arm

RIGHT = "share of right answers, difference"


@claim(
    "no_cache/answers",
    "Without a cache the model answers nearly everything right: where it does not, nothing can be measured",
    paper="no paper: a condition",
    metric="share of right answers",
    baseline="80 %",
    bound=0.8,
)
def answers(lab: DllmLab, length: int) -> Iterator[Measured]:
    """All tasks together; the remark tells them apart."""
    told = ", ".join(f"{task} {lab.exact(UNCACHED, length, (task,)):.0%}" for task in lab.tasks)
    yield Measured(f"N = {length}", shares.share(lab.values(UNCACHED, "exact", length)), told)


@claim(
    "fewer_steps/loses",
    "Several tokens per call cost right answers",
    paper="LLaDA-8B with dKV-Cache's settings, HumanEval: 33.54 % with half the steps, 39.63 % with all",
    metric=RIGHT,
    direction="below",
    baseline="no cache, one token per call",
)
def fewer_lose(lab: DllmLab, length: int) -> Iterator[Measured]:
    """The price of saving calls instead of rows."""
    for factor in (2, 4, 8):
        yield lab.versus(Arm.of(f"fewer_steps:factor={factor}"), UNCACHED, length)


@claim(
    "fixed_interval/interval",
    "A longer interval costs right answers",
    paper="no paper: a control",
    metric=RIGHT,
    direction="below",
    baseline="N = 2",
)
def longer_loses(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Between refreshes only the block and what was just decided are computed."""
    for interval in (8, 32):
        yield lab.versus(Arm.of(f"fixed_interval:interval={interval}"), Arm.of("fixed_interval:interval=2"), length)


@claim(
    "fast_dllm/uncached",
    "Its caches cost little: within one point of no cache",
    paper="LLaDA-8B, GSM8K at 256: 78.5 % with dual cache and parallel commits against 79.3 %, 8.1 times as fast",
    metric="share of right answers lost",
    direction="at most",
    bound=0.01,
    baseline="no cache",
)
def fast_against_uncached(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Both caches, each with and without parallel commits."""
    for cache in ("prefix", "dual"):
        for threshold in ("none", "0.9"):
            yield lab.loss(Arm.of(f"fast_dllm:cache={cache},threshold={threshold}"), length)


@claim(
    "fast_dllm/threshold",
    "Committing above a threshold is better than committing a fixed number, at the same number of calls or more",
    paper="no figure: the reason for parallel commits",
    metric=RIGHT,
    baseline="no cache, a fixed number per call, at least as many calls",
)
def threshold(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Without any cache on either side."""
    ours = Arm.of("no_cache", threshold=0.9)
    yield lab.versus(ours, lab.fewer(ours, length), length)


@claim(
    "fast_dllm/speed",
    "It decodes faster than without a cache",
    paper="LLaDA-8B, GSM8K at 512: 12.3 times (Elastic-Cache's table)",
    metric="ratio of tokens per second, wall clock, one question at a time",
    baseline="no cache, one token per call",
    bound=1.0,
)
def fast_speed(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Both caches."""
    for cache in ("prefix", "dual"):
        yield lab.speedup(Arm.of(f"fast_dllm:cache={cache}"), length)
