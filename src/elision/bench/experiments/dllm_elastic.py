"""Claims of Elastic-Cache for diffusion models (arXiv 2510.14973). Its published numbers were measured on an A100."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from scipy.stats import spearmanr

from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.dllm.lab import UNCACHED, DllmLab
from elision.bench.dllm.measure import Arm
from elision.dllm.methods.elastic_cache_dllm import ElasticCache

RIGHT = "share of right answers, difference"
GAMMAS = (0.5, 0.9, 0.95, 0.98, 0.99)  # a small model's attention moves less, so the sweep goes further up
ELASTIC = Arm.of("elastic_cache_dllm")


def _parallel() -> dict[str, Any]:
    """The window and the threshold of the defaults, for arms that shall decode in the same way."""
    method = ElasticCache()
    return {"window": method.beta, "threshold": method.eps}


@claim(
    "elastic_cache_dllm/fixed-interval",
    "At equal token-layers, refreshing by attention drift is better than refreshing by the clock",
    paper="LLaDA-1.5, GSM8K: 83.7 % at 53.6 times the speed; refreshed every 20 steps 81.4 % at 23.4 times",
    metric=RIGHT,
    baseline="everything every N calls, same window and threshold, the largest N that costs as much",
)
def against_clock(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Both decode in the same window with the same threshold."""
    for gamma in (0.9, 0.98):
        ours = Arm.of(f"elastic_cache_dllm:gamma={gamma}")
        yield lab.versus(ours, lab.clocked(ours, length, **_parallel()), length)


@claim(
    "elastic_cache_dllm/dkv-cache",
    "At equal token-layers it is better than dKV-Cache",
    paper="LLaDA-1.5, GSM8K: 83.7 % at 53.6 times the speed against 67.02 % at 5.7 times",
    metric=RIGHT,
    baseline="dKV-Cache with as many commits per call as still cost as much, the better of N = 8 and 32",
)
def against_dkv(lab: DllmLab, length: int) -> Iterator[Measured]:
    """dKV-Cache commits a fixed number per call: several at once are what lets it be as cheap."""
    for gamma in (0.9, 0.98):
        ours = Arm.of(f"elastic_cache_dllm:gamma={gamma}")
        yield lab.versus(ours, _dkv_like(lab, ours, length), length)


def _dkv_like(lab: DllmLab, like: Arm, length: int) -> Arm:
    """dKV-Cache at the nearest cost above that of `like`: the better of two intervals."""
    target, block = lab.total(like, "token_layers", length), lab.questions(length)[0].block
    found: list[tuple[float, Arm]] = []
    for interval in (8, 32):
        for per_call in (16, 8, 4, 2, 1):
            if per_call > block:
                continue
            arm = Arm.of(f"dkv_cache:interval={interval}", per_call=per_call)
            if lab.total(arm, "token_layers", length) >= target:
                found.append((lab.exact(arm, length), arm))
                break
    return max(found, key=lambda pair: pair[0])[1] if found else Arm.of("dkv_cache:interval=1")


@claim(
    "elastic_cache_dllm/gamma",
    "A larger γ refreshes more",
    paper="about 10 % of the layers at γ = 0.9, up to 20 % at 0.95; 138.6 tokens per second at 0.7, 98.4 at 0.95",
    metric="ratio of token-layers",
    baseline="the next smaller γ",
    bound=1.0,
)
def gamma_costs(lab: DllmLab, length: int) -> Iterator[Measured]:
    """The sweep over γ."""
    for low, high in itertools.pairwise(GAMMAS):
        one, two = (Arm.of(f"elastic_cache_dllm:gamma={g}") for g in (low, high))
        told = f"{lab.cost(two, length):.1%} and {lab.cost(one, length):.1%} of the uncached token-layers"
        setting = f"N = {length}: γ = {high} against {low}"
        yield Measured(setting, lab.ratio(two, one, "token_layers", length), told)


@claim(
    "elastic_cache_dllm/accuracy",
    "A larger γ answers better",
    paper="LLaDA-1.5, GSM8K: 83.0 % at γ = 0.95, 77.6 % at 0.7",
    metric=RIGHT,
    baseline="γ = 0.5",
)
def gamma_helps(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Against the smallest γ of the sweep."""
    for gamma in GAMMAS[1:]:
        yield lab.versus(Arm.of(f"elastic_cache_dllm:gamma={gamma}"), Arm.of("elastic_cache_dllm:gamma=0.5"), length)


@claim(
    "elastic_cache_dllm/uncached",
    "It answers as well as without a cache, within one point",
    paper="LLaDA-8B, GSM8K at 512: 77.71 % against 77.10 %; MBPP 15.6 % against 15.0 %",
    metric="share of right answers lost",
    direction="at most",
    bound=0.01,
    baseline="no cache, one token per call",
)
def against_uncached(lab: DllmLab, length: int) -> Iterator[Measured]:
    """With its own threshold, and with one token per call, where only the cache differs."""
    yield lab.loss(ELASTIC, length)
    yield lab.loss(Arm.of("elastic_cache_dllm:eps=2"), length)
    yield lab.loss(Arm.of("elastic_cache_dllm:gamma=0.98,track=4"), length)


@claim(
    "elastic_cache_dllm/cache",
    "The cache itself loses nothing against the same decoding without it, within one point",
    paper="no figure; the published baseline commits one token per call",
    metric="share of right answers lost",
    direction="at most",
    bound=0.01,
    baseline="no cache, same window and threshold",
)
def against_parallel(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Separates the cache from committing in parallel."""
    plain = Arm.of("no_cache", **_parallel())
    for gamma in (0.9, 0.98):
        ours = Arm.of(f"elastic_cache_dllm:gamma={gamma}")
        told = f"{lab.exact(ours, length):.0%} and {lab.exact(plain, length):.0%} right"
        yield Measured(f"N = {length}: γ = {gamma}", lab.lead(plain, ours, length), told)


@claim(
    "elastic_cache_dllm/fewer-steps",
    "At equal token-layers it is better than plain decoding with fewer steps",
    paper="no figure; the purpose of any cache",
    metric=RIGHT,
    baseline="no cache, as few calls as cost at least as much",
)
def against_fewer(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Costs are matched from above."""
    yield lab.versus(ELASTIC, lab.fewer(ELASTIC, length), length)


@claim(
    "elastic_cache_dllm/requery",
    "Tokens must be computed once more after their commit: frozen as masks they spoil what follows",
    paper="no figure; the query set of the algorithm holds them",
    metric=RIGHT,
    baseline="requery=false",
)
def requery(lab: DllmLab, length: int) -> Iterator[Measured]:
    """The ablation of the query set."""
    yield lab.versus(ELASTIC, Arm.of("elastic_cache_dllm:requery=false"), length)


@claim(
    "elastic_cache_dllm/depth",
    "Drift of keys and values grows with depth",
    paper="monotone beyond a transition layer: the reason to refresh from a layer upwards",
    metric="rank correlation of layer and drift",
    baseline="no trend",
)
def depth(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Decided tokens between neighbouring calls of uncached decoding; the first layer's depend on nothing else."""
    rows = [found.decided for found in lab.drifts(length)]
    ranks = [float(spearmanr(range(len(row)), row.tolist()).statistic) for row in rows]
    told = "drift by layer " + " ".join(f"{x:.3f}" for x in torch.stack(rows).mean(dim=0).tolist())
    yield Measured(f"N = {length}, all layers, {len(ranks)} questions", stats.mean(ranks), told)
    upper = [float(spearmanr(range(1, len(row)), row[1:].tolist()).statistic) for row in rows]
    yield Measured(f"N = {length}, without the first layer", stats.mean(upper), told)


@claim(
    "elastic_cache_dllm/attended",
    "The most attended token drifts no more than decided tokens do on average",
    paper="bound of the paper; mean cosine 0.948 to 0.985 against 0.947 to 0.980 of all",
    metric="its drift over the mean drift, mean over layers and calls",
    direction="below",
    baseline="a decided token on average",
    bound=1.0,
)
def attended(lab: DllmLab, length: int) -> Iterator[Measured]:
    """The reason why one token can tell for all."""
    found = lab.drifts(length)
    ratios = stats.ratio([float(d.attended[1:].mean()) for d in found], [float(d.each[1:].mean()) for d in found])
    told = " ".join(f"{float(d.attended[1:].mean()):.3f}/{float(d.each[1:].mean()):.3f}" for d in found)
    yield Measured(f"N = {length}, {len(found)} questions", ratios, told)


@claim(
    "elastic_cache_dllm/length",
    "Tokens per second grow with the length",
    paper="LLaDA-1.5: 58.0, 117.2, 169.8 tokens per second at 256, 512, 1024",
    metric="ratio of tokens per second, wall clock",
    baseline="half the length",
    bound=1.0,
)
def by_length(lab: DllmLab, length: int) -> Iterator[Measured]:
    """On an accelerator a call costs the same for few rows or many; on a processor it does not."""
    totals = (length // 2, length, 2 * length)
    speeds = lab.race([(ELASTIC, total) for total in totals])
    for place in (1, 2):
        one, two = speeds[place - 1], speeds[place]
        told = f"{statistics.fmean(two):.0f} and {statistics.fmean(one):.0f} tokens per second"
        yield Measured(f"N = {totals[place]} against {totals[place - 1]}", stats.ratio(two, one), told)


@claim(
    "elastic_cache_dllm/gain-by-length",
    "What it saves grows with the length",
    paper="no figure of savings; tokens per second nearly triple from 256 to 1024",
    metric="token-layers saved as a factor, ratio of factors",
    baseline="half the length",
    bound=1.0,
)
def gain_by_length(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Counted, not timed."""
    saved = []
    for total in (length // 2, length):
        plain, ours = (lab.values(arm, "token_layers", total) for arm in (UNCACHED, ELASTIC))
        saved.append([a / b for a, b in zip(plain, ours, strict=True)])
    told = f"{statistics.fmean(saved[1]):.1f} and {statistics.fmean(saved[0]):.1f} times fewer"
    yield Measured(f"N = {length} against {length // 2}", stats.ratio(saved[1], saved[0]), told)


@claim(
    "elastic_cache_dllm/speed",
    "It decodes at least three times as fast as without a cache",
    paper="LLaDA-8B on an A100, GSM8K at 512: 25.2 times",
    metric="ratio of tokens per second, wall clock, one question at a time",
    baseline="no cache, one token per call",
    bound=3.0,
)
def speed(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Both the cache and committing in parallel; the next claim is of the cache alone."""
    for total in (length // 2, length):
        yield lab.speedup(ELASTIC, total)


@claim(
    "elastic_cache_dllm/speed-of-cache",
    "It decodes faster than the same window and threshold without a cache",
    paper="one token per call: 18.1 times",
    metric="ratio of tokens per second, wall clock, one question at a time",
    baseline="no cache, same window and threshold",
    bound=1.0,
)
def speed_of_cache(lab: DllmLab, length: int) -> Iterator[Measured]:
    """What is left of the speed-up when committing in parallel is not counted."""
    yield lab.speedup(ELASTIC, length, base=Arm.of("no_cache", **_parallel()))


@claim(
    "elastic_cache_dllm/fast-dllm",
    "It decodes faster than Fast-dLLM",
    paper="LLaDA-8B, GSM8K at 512: 90.1 against 44.0 tokens per second",
    metric="ratio of tokens per second, wall clock, one question at a time",
    baseline="Fast-dLLM, dual cache",
    bound=1.0,
)
def against_fast(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Same threshold on both sides."""
    yield lab.speedup(ELASTIC, length, base=Arm.of("fast_dllm"))
