"""Claims of DapQ (arXiv 2603.11564)."""

from __future__ import annotations

from collections.abc import Iterator

from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.experiments.kv_eviction import NATS
from elision.bench.kv.lab import KVLab, method


@claim(
    "dapq/recall",
    "Pseudo queries at decoding positions find more of what decoding attends to than the prompt's last ones",
    paper="cosine of weights to those of true decoding at window 32: 0.9726 against SnapKV 0.9508",
    metric="recall of the best K prompt tokens by the answer's own attention, difference",
    baseline="SnapKV (without pooling) and H2O, as many tokens",
)
def recall(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose, whose end is no question; K tokens per layer and KV head are kept by each."""
    for budget in (64, 128):
        ours = lab.recall(method(f"dapq:budget={budget}"), "continuation", length, budget)
        for name in (f"snapkv:budget={budget},kernel=1", f"h2o:budget={budget}"):
            theirs = lab.recall(method(name), "continuation", length, budget)
            remark = f"{sum(ours) / len(ours):.1%} against {sum(theirs) / len(theirs):.1%}"
            yield Measured(f"K = {budget}, against {name}", stats.difference(ours, theirs), remark)


@claim(
    "dapq/position",
    "Recall falls where pseudo queries stand away from the end of the prompt",
    paper="the positions matter more than the content; content changes the average by about 1 %",
    metric="recall, difference",
    baseline="pseudo tokens 128 positions after the prompt, and 128 before its end",
)
def position_matters(lab: KVLab, length: int) -> Iterator[Measured]:
    """The same content, moved."""
    ours = lab.recall(method("dapq:budget=64"), "continuation", length, 64)
    for offset in (128, -128):
        theirs = lab.recall(method(f"dapq:budget=64,offset={offset}"), "continuation", length, 64)
        yield Measured(f"K = 64, offset {offset:+d}", stats.difference(ours, theirs))


@claim(
    "dapq/snapkv",
    "At equal tokens it is better than SnapKV",
    paper="LongBench, LLaMA-3-8B, 256 tokens: 46.40 against SnapKV 45.61; 128: 44.40 against 43.68",
    metric=NATS,
    baseline="SnapKV, same budget",
)
def against_snapkv(lab: KVLab, length: int) -> Iterator[Measured]:
    """The paper's small budgets."""
    for task in ("continuation", "needle"):
        for budget in (64, 128):
            yield lab.versus(f"dapq:budget={budget}", f"snapkv:budget={budget}", task, length)


@claim(
    "dapq/h2o",
    "At equal tokens it is better than H2O",
    paper="LongBench, LLaMA-3-8B, 256 tokens: 46.40 against H2O 44.02; needle 99.5 against 66.81",
    metric=NATS,
    baseline="H2O, same budget",
)
def against_h2o(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose and on a fact in it."""
    for task in ("continuation", "needle"):
        yield lab.versus("dapq:budget=64", "h2o:budget=64", task, length)
