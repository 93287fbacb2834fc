"""Claims of ZipCache (arXiv 2405.14256) and MiKV (arXiv 2402.18096), and of plain rounding as a baseline.

Shares of bytes are of a 16-bit cache, as published, whatever the type of the model at hand (see `KVLab.share`).
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.bench.claims import Measured, claim
from elision.bench.experiments.kv_eviction import NATS, RIGHT
from elision.bench.kv.lab import KVLab, method

# rounding alone: what is packed is all but a few of the newest tokens
RTN = "uniform_rtn:bits={},residual=32"


def h2o_of(lab: KVLab, other: str, task: str, length: int) -> str:
    """H2O with a budget that holds about as many bytes as another method."""
    share = lab.share(method(other), task, length)
    return f"h2o:budget={min(max(round(share, 3), 0.01), 1.0)}"


@claim(
    "uniform_rtn/bits",
    "Two bits for every number cost more than four",
    paper="no paper: a baseline",
    metric=NATS,
    direction="below",
    baseline="four bits",
)
def bits_matter(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose and on a fact in it."""
    for task in ("continuation", "needle"):
        yield lab.versus(RTN.format(2), RTN.format(4), task, length)


@claim(
    "zipcache/two-bits",
    "Four bits for salient tokens and two for the rest are better than two for all",
    paper="GSM8k, LLaMA2-7B: 13.50 against KIVI 13.19; no figure for two bits alone",
    metric=NATS,
    baseline="uniform rounding at two bits",
)
def above_two_bits(lab: KVLab, length: int) -> Iterator[Measured]:
    """More bytes than two bits, fewer than four."""
    for task in ("continuation", "needle"):
        yield lab.versus("zipcache", RTN.format(2), task, length)


@claim(
    "zipcache/four-bits",
    "Four bits for salient tokens and two for the rest are no better than four for all",
    paper="no figure; the order of sizes",
    metric=NATS,
    direction="at most",
    baseline="uniform rounding at four bits",
)
def below_four_bits(lab: KVLab, length: int) -> Iterator[Measured]:
    """The other end."""
    for task in ("continuation", "needle"):
        yield lab.versus("zipcache", RTN.format(4), task, length)


@claim(
    "zipcache/normalised",
    "Attention divided by how many probes see a token chooses better than by how many rows do",
    paper="GSM8k, LLaMA3-8B, probes: all rows 52.54, random 47.46, recent 51.10, random and recent 52.08",
    metric=NATS,
    baseline="norm=full_count (released code)",
)
def normalised(lab: KVLab, length: int) -> Iterator[Measured]:
    """On a fact in prose."""
    yield lab.versus("zipcache", "zipcache:norm=full_count", "needle", length)


@claim(
    "zipcache/h2o",
    "At equal bytes, packing everything keeps facts that eviction loses",
    paper="GSM8k, Mistral-7B: 41.24 at 4.98× against 41.62 uncompressed",
    metric=RIGHT,
    baseline="H2O at as many bytes",
)
def zip_against_h2o(lab: KVLab, length: int) -> Iterator[Measured]:
    """Facts in prose, asked for at its end and later."""
    for task in ("needle", "turns"):
        yield lab.versus("zipcache", h2o_of(lab, "zipcache", task, length), task, length, "exact")


@claim(
    "zipcache/mikv",
    "It is better than MiKV at two bits",
    paper="GSM8k, LLaMA3-8B: 53.75 at 4.69× against MiKV 35.48; line retrieval, 200 lines: +42 points",
    metric=NATS,
    baseline="MiKV, importance tier 20 % at four bits, the rest at two",
)
def zip_against_mikv(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose and on a fact in it."""
    for task in ("continuation", "needle"):
        yield lab.versus("zipcache", "mikv:hi_bits=4", task, length)


@claim(
    "mikv/int4",
    "With the rest at four bits it loses nothing against the full cache",
    paper="line retrieval, 20 % in the importance tier: 100 % (table 1)",
    metric="share of right answers lost",
    direction="at most",
    bound=0.05,
    baseline="the full cache",
)
def four_bits_lose_nothing(lab: KVLab, length: int) -> Iterator[Measured]:
    """Right answers of the full cache minus those of MiKV."""
    ours = method("mikv:lo_bits=4")
    for task in ("needle", "turns", "lines"):
        full = lab.values(None, "exact", task, length)
        share, right = lab.share(ours, task, length), sum(full) / len(full)
        held = f"{share:.1%} of a 16-bit cache's bytes; full cache {right:.0%} right"
        yield Measured(f"{task}, mikv:lo_bits=4", lab.lead(None, ours, "exact", task, length), held)


@claim(
    "mikv/eviction",
    "Keeping the rest at two bits keeps facts that dropping it loses",
    paper="line retrieval, 20 %: eviction 4.0 %, two bits 92.6 %, four bits 100 %",
    metric=RIGHT,
    baseline="the same importance tier alone (lo_bits=drop)",
)
def retained_or_dropped(lab: KVLab, length: int) -> Iterator[Measured]:
    """The same tokens are kept exact."""
    for task in ("needle", "turns"):
        yield lab.versus("mikv", "mikv:lo_bits=drop", task, length, "exact")


@claim(
    "mikv/h2o",
    "At equal bytes it keeps facts that H2O loses",
    paper="line retrieval: two bits 92.6 % at a third of the size, H2O 4.0 % at a fifth",
    metric=RIGHT,
    baseline="H2O at as many bytes",
)
def mikv_against_h2o(lab: KVLab, length: int) -> Iterator[Measured]:
    """Facts in prose."""
    for task in ("needle", "turns"):
        yield lab.versus("mikv", h2o_of(lab, "mikv", task, length), task, length, "exact")


@claim(
    "mikv/balancer",
    "Balancing the channels of keys improves two bits",
    paper="line retrieval, two bits: 92.6 % with the balancer, 64.0 % without (table 2)",
    metric=NATS,
    baseline="balance=false",
)
def balancer(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose and on a fact in it."""
    for task in ("continuation", "needle"):
        yield lab.versus("mikv", "mikv:balance=false", task, length)


@claim(
    "mikv/uniform",
    "It is better than rounding every token at two bits",
    paper="a port with SmolLM2-1.7B, 20 lines: 56.7 % (35 % of the size) against 33.3 % (18.8 %)",
    metric=NATS,
    baseline="uniform rounding at two bits",
)
def mikv_against_uniform(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose and on a fact in it."""
    for task in ("continuation", "needle"):
        yield lab.versus("mikv", RTN.format(2), task, length)
