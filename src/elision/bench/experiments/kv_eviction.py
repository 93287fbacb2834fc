"""Claims of H2O (arXiv 2306.14048), and of the baselines and controls among the methods that drop tokens.

Budgets are shares of the prompt or tokens per layer and KV head, the same for both sides; what was really held stands
beside every number.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.bench.claims import Measured, claim
from elision.bench.kv.lab import KVLab

NATS = "nats per answer token by which it is better"
RIGHT = "share of right answers, difference"


@claim(
    "h2o/window",
    "At the same number of tokens, heavy hitters and recent tokens are better than recent tokens alone",
    paper="20 % heavy hitters and recent tokens keep the accuracy at which a local window of that size fails",
    metric=NATS,
    baseline="the newest tokens, as many",
)
def h2o_against_window(lab: KVLab, length: int) -> Iterator[Measured]:
    """The spec's budgets, on prose."""
    for share in (0.1, 0.2, 0.4):
        yield lab.versus(f"h2o:budget={share}", f"window:budget={share}", "continuation", length)


@claim(
    "h2o/full",
    "It is no better than the full cache",
    paper="no figure; at 20 % equal to it within noise in the paper",
    metric=NATS,
    direction="at most",
    baseline="the full cache",
)
def h2o_against_full(lab: KVLab, length: int) -> Iterator[Measured]:
    """What eviction costs on prose."""
    for share in (0.2, 0.4):
        yield lab.against_full(f"h2o:budget={share}", "continuation", length)


@claim(
    "h2o/retrieval",
    "At 20 % it loses facts whose question comes last",
    paper="MiKV, table 1: line retrieval falls to 4.0 %; a port with SmolLM2-1.7B: 3.3 % against 96.7 %",
    metric=RIGHT,
    direction="below",
    baseline="the full cache",
)
def h2o_loses_facts(lab: KVLab, length: int) -> Iterator[Measured]:
    """Right answers with 20 % of the tokens minus those with all."""
    for task in ("needle", "turns"):
        yield lab.against_full("h2o:budget=0.2", task, length, "exact")


@claim(
    "snapkv/h2o",
    "Choosing by the prompt's last queries keeps facts that accumulated attention drops",
    paper="LongBench, Llama2-7B, 128 tokens: 28.09 against H2O 26.06 (CAKE's table)",
    metric=NATS,
    baseline="H2O, same budget",
)
def snapkv_against_h2o(lab: KVLab, length: int) -> Iterator[Measured]:
    """The question is in the window, so its queries know what is asked for."""
    for budget in (64, 128):
        yield lab.versus(f"snapkv:budget={budget}", f"h2o:budget={budget}", "needle", length)


@claim(
    "snapkv/turns",
    "Facts that a later turn asks for are lost with what the first question had no use for",
    paper="no figure; the known limit of compressing once, by one question",
    metric=RIGHT,
    direction="below",
    baseline="the full cache",
)
def snapkv_forgets(lab: KVLab, length: int) -> Iterator[Measured]:
    """Three questions about one text."""
    yield lab.against_full("snapkv:budget=128", "turns", length, "exact")


@claim(
    "pyramidkv/snapkv",
    "More tokens for lower layers are better than as many for each",
    paper="LongBench, Llama2-7B, 128 tokens: 28.20 against SnapKV 28.09 (CAKE's table)",
    metric=NATS,
    baseline="SnapKV, same budget on average",
)
def pyramid_against_even(lab: KVLab, length: int) -> Iterator[Measured]:
    """The same scores, another division among layers."""
    for task in ("continuation", "needle"):
        yield lab.versus("pyramidkv:budget=64", "snapkv:budget=64", task, length)


@claim(
    "tova/h2o",
    "The newest query alone chooses what to keep as well as all queries together",
    paper="LongBench, Llama2-7B, 128 tokens: 25.31 against H2O 26.06 (CAKE's table): it does not there",
    metric=NATS,
    baseline="H2O, same budget",
)
def tova_against_h2o(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose and on a fact in it."""
    for task in ("continuation", "needle"):
        yield lab.versus("tova:budget=64", "h2o:budget=64", task, length)


@claim(
    "streaming_llm/window",
    "With the first tokens kept, a window keeps its quality",
    paper="Llama-2-13B, PG19: perplexity 5.40 with four sinks, 5158.07 without",
    metric=NATS,
    baseline="the newest tokens, as many, without sinks",
)
def sinks_matter(lab: KVLab, length: int) -> Iterator[Measured]:
    """True positions on both sides, so that sinks are the only difference; and the paper's rolled ones."""
    for budget in (64, 128):
        yield lab.versus(
            f"streaming_llm:budget={budget},rolling=false", f"window:budget={budget}", "continuation", length
        )
    yield lab.versus("streaming_llm:budget=64", "window:budget=64", "continuation", length)


@claim(
    "knorm/random",
    "Keys of small norm are worth more than others",
    paper="language modelling unharmed at 50 %, passkey kept at 90 % compression (Llama-2-7B)",
    metric=NATS,
    baseline="tokens drawn at random, as many",
)
def norms_against_chance(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose and on a fact in it, half of the tokens."""
    for task in ("continuation", "needle"):
        yield lab.versus("knorm:budget=0.5", "random:budget=0.5", task, length)


@claim(
    "random/snapkv",
    "Tokens drawn at random are worth less than chosen ones",
    paper="no paper: a negative control",
    metric=NATS,
    direction="below",
    baseline="SnapKV, same budget",
)
def chance_loses(lab: KVLab, length: int) -> Iterator[Measured]:
    """Where this fails, a comparison measures nothing."""
    for task in ("continuation", "needle"):
        yield lab.versus("random:budget=64", "snapkv:budget=64", task, length)


@claim(
    "window/snapkv",
    "The newest tokens alone are worth less than chosen ones",
    paper="no paper: a baseline",
    metric=NATS,
    direction="below",
    baseline="SnapKV, same budget",
)
def window_loses(lab: KVLab, length: int) -> Iterator[Measured]:
    """Where this fails, a comparison measures nothing."""
    for task in ("continuation", "needle"):
        yield lab.versus("window:budget=64", "snapkv:budget=64", task, length)
