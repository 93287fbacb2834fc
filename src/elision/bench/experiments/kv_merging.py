"""Claims of PrefixKV (arXiv 2412.03409) and Elastic Cache (arXiv 2407.18121), published for vision-language models.

Here they are tested on text alone; the published figures are perplexities of LLaVA-1.5 on image descriptions.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.experiments.kv_eviction import NATS
from elision.bench.kv.lab import KVLab, method

SHARES = (0.2, 0.5)


@claim(
    "prefixkv/even",
    "Layers cut at one threshold of cumulative importance are better than layers cut alike by the same scores",
    paper="the design of the method; no figure for this baseline",
    metric=NATS,
    baseline="the same scores, the same share of every layer",
)
def against_even(lab: KVLab, length: int) -> Iterator[Measured]:
    """The same average share."""
    layers = lab.subject.model.config.num_hidden_layers
    for share in SHARES:
        even = "(" + ",".join([f"{1 - share:g}"] * layers) + ")"
        found = lab.versus(f"prefixkv:budget={share}", f"prefixkv:ratios={even}", "continuation", length)
        yield Measured(f"continuation, {share:.0%} of the tokens", found.value, found.why)


@claim(
    "prefixkv/h2o",
    "At equal tokens it is better than H2O",
    paper="LLaVA-Description 7B, perplexity at 20 %: 3.69 against 48.3; at 50 %: 3.41 against 12.9",
    metric=NATS,
    baseline="H2O as in those tables, one set for all layers, and H2O itself",
)
def prefix_against_h2o(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose."""
    for share in SHARES:
        for other in (f"layer_shared:budget={share}", f"h2o:budget={share}"):
            yield lab.versus(f"prefixkv:budget={share}", other, "continuation", length)


@claim(
    "prefixkv/window",
    "At equal tokens it is better than the newest tokens alone",
    paper="LLaVA-Description 7B, perplexity at 20 %: 3.69 against 105; at 50 %: 3.41 against 33.8",
    metric=NATS,
    baseline="a window, same budget",
)
def prefix_against_window(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose."""
    for share in SHARES:
        yield lab.versus(f"prefixkv:budget={share}", f"window:budget={share}", "continuation", length)


@claim(
    "prefixkv/stable",
    "What a layer keeps varies less from prompt to prompt than from layer to layer, so ten prompts can stand for all",
    paper="10 calibration samples; shown as a figure",
    metric="spread over prompts over spread over layers",
    direction="below",
    bound=1.0,
    baseline="the spread over layers",
)
def stable_over_prompts(lab: KVLab, length: int) -> Iterator[Measured]:
    """Standard deviations of tokens held, per layer over prompts."""
    held = lab.layers(method("prefixkv:budget=0.5"), "continuation", length)
    between = float(held.mean(0).std())
    if between == 0:
        yield Measured("50 % of the tokens", None, "all layers hold the same")
        return
    yield Measured("50 % of the tokens", stats.mean((held.std(0) / between).tolist()), "intervals are over layers")


@claim(
    "prefixkv/profile",
    "Ratios averaged over ten other prompts are no worse than those found on the prompt itself",
    paper="released and evaluated as files of 10 samples; no figure for the difference",
    metric="nats per answer token by which the profile is worse",
    direction="at most",
    baseline="the same method without a profile",
)
def profile_or_search(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose, of which the profile is made, and on a fact in it."""
    for task in ("continuation", "needle"):
        yield lab.fitted("prefixkv:budget=0.5", task, length)


@claim(
    "elastic_cache/merge",
    "Merging what leaves into its nearest anchor is no worse than dropping it",
    paper="the design of the method; its tables are published as images only",
    metric="nats per answer token by which dropping the same tokens is better",
    direction="at most",
    baseline="the same indices, dropped",
)
def merge_or_drop(lab: KVLab, length: int) -> Iterator[Measured]:
    """The same tokens stay."""
    for share in SHARES:
        yield lab.versus(
            f"elastic_cache:budget={share},merge=false", f"elastic_cache:budget={share}", "continuation", length
        )


@claim(
    "elastic_cache/ranks",
    "Ranking as in the paper is better than the released code's test of the sorting permutation",
    paper="no figure; the released selection overlaps the ranked one at chance level",
    metric=NATS,
    baseline="mode=released",
)
def ranks(lab: KVLab, length: int) -> Iterator[Measured]:
    """Both merge."""
    for share in SHARES:
        yield lab.versus(
            f"elastic_cache:budget={share}", f"elastic_cache:budget={share},mode=released", "continuation", length
        )


@claim(
    "elastic_cache/h2o",
    "At equal tokens it is better than H2O and than a window",
    paper="LLaVA-Description 7B, perplexity at 20 %: 14.0 against H2O 48.3 and a window 105 (PrefixKV's table)",
    metric=NATS,
    baseline="H2O and a window as in that table, one set for all layers, and H2O itself",
)
def elastic_against_others(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose."""
    for share in SHARES:
        for other in ("layer_shared:", "layer_shared:kind=local,", "h2o:"):
            yield lab.versus(f"elastic_cache:budget={share}", f"{other}budget={share}", "continuation", length)


@claim(
    "layer_shared/own",
    "One set of tokens for all layers is worth less than a set for every layer and head",
    paper="no figure; the baseline called H2O in the tables of Elastic Cache and PrefixKV is this one",
    metric=NATS,
    direction="below",
    baseline="H2O, same budget",
)
def shared_or_own(lab: KVLab, length: int) -> Iterator[Measured]:
    """As released, and without the defects of the release."""
    for share in SHARES:
        for mode in ("released", "paper"):
            ours = f"layer_shared:budget={share},mode={mode}"
            yield lab.versus(ours, f"h2o:budget={share}", "continuation", length)
