"""Claims of dKV-Cache (arXiv 2505.15781). Its published numbers are of LLaDA-8B and Dream-7B."""

from __future__ import annotations

from collections.abc import Iterator

from elision.bench.claims import Measured, claim
from elision.bench.dllm.lab import UNCACHED, DllmLab
from elision.bench.dllm.measure import Arm

RIGHT = "share of right answers, difference"
POINT = 0.01  # what "no loss" may be: one point


@claim(
    "dkv_cache/delay",
    "Tokens must be cached one step late: cached in the step that decides them, they are frozen as masks",
    paper="figure 3: without the delay accuracy collapses as more is cached",
    metric=RIGHT,
    baseline="delay=false, same interval",
)
def delay(lab: DllmLab, length: int) -> Iterator[Measured]:
    """The only difference is when a row enters the cache."""
    for interval in (4, 8, 16):
        ours, control = f"dkv_cache:interval={interval}", f"dkv_cache:interval={interval},delay=false"
        yield lab.versus(Arm.of(ours), Arm.of(control), length)


@claim(
    "dkv_cache/uncached",
    "It answers as well as without a cache, within one point",
    paper="LLaDA-8B, GSM8K: 78.85 % against 77.56 %; N = 16 instead of 8 costs little",
    metric="share of right answers lost",
    direction="at most",
    bound=POINT,
    baseline="no cache",
)
def against_uncached(lab: DllmLab, length: int) -> Iterator[Measured]:
    """The sweep over the interval."""
    for interval in (2, 4, 8, 16):
        yield lab.loss(Arm.of(f"dkv_cache:interval={interval}"), length)


@claim(
    "dkv_cache/fewer-steps",
    "At equal token-layers it is better than plain decoding with fewer steps",
    paper="LLaDA-8B, HumanEval: 46.34 % at 1.83 times the speed against 33.54 % with half the steps",
    metric=RIGHT,
    baseline="no cache, as few calls as cost at least as much",
)
def against_fewer(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Costs are matched from above, so that rounding favours the baseline."""
    for interval in (8, 16):
        ours = Arm.of(f"dkv_cache:interval={interval}")
        yield lab.versus(ours, lab.fewer(ours, length), length)


@claim(
    "dkv_cache/speed",
    "It decodes faster than without a cache",
    paper="LLaDA-8B on an A6000: 1.8 to 2.4 times as many tokens per second",
    metric="ratio of tokens per second, wall clock, one question at a time",
    baseline="no cache",
    bound=1.0,
)
def speed(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Longer sequences have more to gain."""
    for total in (length // 2, length):
        yield lab.speedup(Arm.of("dkv_cache"), total)


@claim(
    "dkv_cache/greedy",
    "Greedy, which leaves masked rows stale, answers worse than Decode",
    paper="LLaDA-8B, GSM8K: 67.93 % (from 72.25 %) against 78.85 % (from 77.56 %)",
    metric=RIGHT,
    direction="below",
    baseline="variant decode, N = 8",
)
def greedy(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Greedy also decodes in a random order, which costs by itself: the remark of the next claim tells how much."""
    yield lab.versus(Arm.of("dkv_cache:variant=greedy,interval=2"), Arm.of("dkv_cache"), length)


@claim(
    "dkv_cache/window",
    "A window of masked neighbours helps Greedy",
    paper="LLaDA-8B, GSM8K: 68.23 % with four, 67.93 % without",
    metric=RIGHT,
    baseline="no window",
)
def window(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Around the tokens to be decided next, as released, and around those just decided, as in the paper's text."""
    for interval in (2, 4):
        bare = Arm.of(f"dkv_cache:variant=greedy,interval={interval},window=0")
        for centre in ("next", "committed"):
            ours = f"dkv_cache:variant=greedy,interval={interval},window=4,window_on={centre}"
            yield lab.versus(Arm.of(ours), bare, length)


@claim(
    "dkv_cache/random-order",
    "In a random order more is lost than by confidence, with or without a cache",
    paper="LLaDA-8B, GSM8K, no cache: 72.25 % at random against 77.56 %",
    metric=RIGHT,
    direction="below",
    baseline="by confidence",
)
def random_order(lab: DllmLab, length: int) -> Iterator[Measured]:
    """What Greedy starts from."""
    yield lab.versus(Arm.of("no_cache", remasking="random_order"), UNCACHED, length)


@claim(
    "dkv_cache/prefill",
    "A long prompt that is cached once and never again costs nothing, within one point",
    paper="Dream-7B, GPQA: 35.27 % against 36.83 %; MMLU: 71.76 % against 72.19 %",
    metric="share of right answers lost",
    direction="at most",
    bound=POINT,
    baseline="no cache",
)
def prefill(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Recall has the longest prompts: nearly half of the sequence."""
    for variant in ("prefill", "pd"):
        yield lab.loss(Arm.of(f"dkv_cache:variant={variant}"), length, ("recall",))


@claim(
    "dkv_cache/pd",
    "PD computes less than Prefill",
    paper="Dream-7B, GSM8K: no faster there (50.2 against 53.6 tokens per second)",
    metric="ratio of token-layers",
    direction="below",
    bound=1.0,
    baseline="variant prefill",
)
def pd_costs_less(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Decided tokens are cached, too."""
    ours, theirs = Arm.of("dkv_cache:variant=pd"), Arm.of("dkv_cache:variant=prefill")
    told = f"{lab.cost(ours, length):.1%} and {lab.cost(theirs, length):.1%} of the uncached token-layers"
    yield Measured(f"N = {length}", lab.ratio(ours, theirs, "token_layers", length), told)


@claim(
    "dkv_cache/shift",
    "Where outputs are shifted by one, rows must stay until the token that they predict is decided",
    paper="Dream-7B, GSM8K: 76.34 % (un) and 77.71 % (un_right) against 32.68 % (right)",
    metric=RIGHT,
    baseline="shift_type=right",
)
def shift(lab: DllmLab, length: int) -> Iterator[Measured]:
    """Only on a model with shifted outputs."""
    if not lab.subject.lm.shift:
        why = f"{lab.subject.name} predicts every token at its own position: its outputs are not shifted"
        yield Measured("", None, why)
        return
    for kind in ("un", "un_right"):
        ours = Arm.of(f"dkv_cache:interval=4,shift_type={kind}")
        yield lab.versus(ours, Arm.of("dkv_cache:interval=4,shift_type=right"), length)
