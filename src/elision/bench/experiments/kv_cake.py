"""Claims of CAKE (arXiv 2503.12491)."""

from __future__ import annotations

from collections.abc import Iterator

from elision.bench import stats
from elision.bench.claims import Measured, claim
from elision.bench.experiments.kv_eviction import NATS
from elision.bench.kv.lab import KVLab, method

BUDGETS = (48, 64, 128)


@claim(
    "cake/snapkv",
    "At equal tokens, dividing them by entropy and shift is better than as many for every layer",
    paper="LongBench, Llama2-7B, 128 tokens: 29.29 against SnapKV 28.09; Llama3.1-8B: 43.39 against 42.53",
    metric=NATS,
    baseline="SnapKV, same budget on average",
)
def against_snapkv(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose and on a fact in it."""
    for task in ("continuation", "needle"):
        for budget in BUDGETS:
            yield lab.versus(f"cake:budget={budget}", f"snapkv:budget={budget}", task, length)


@claim(
    "cake/h2o",
    "At equal tokens it is better than H2O",
    paper="LongBench, Llama2-7B, 128 tokens: 29.29 against H2O 26.06",
    metric=NATS,
    baseline="H2O, same budget",
)
def against_h2o(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose and on a fact in it."""
    for task in ("continuation", "needle"):
        yield lab.versus("cake:budget=64", "h2o:budget=64", task, length)


@claim(
    "cake/window",
    "At equal tokens it is better than the newest tokens alone",
    paper="no figure for this baseline",
    metric=NATS,
    baseline="a window, same budget",
)
def against_window(lab: KVLab, length: int) -> Iterator[Measured]:
    """On prose and on a fact in it."""
    for task in ("continuation", "needle"):
        yield lab.versus("cake:budget=64", "window:budget=64", task, length)


@claim(
    "cake/small-budgets",
    "Its lead over SnapKV is largest where the budget is smallest",
    paper="LongBench, Llama2-7B: +1.20 at 128 tokens, +0.48 at 1024",
    metric="lead at 48 tokens minus lead at 128, nats per answer token",
    baseline="its own lead at 128 tokens",
)
def largest_where_small(lab: KVLab, length: int) -> Iterator[Measured]:
    """Paired by prompt."""
    for task in ("continuation", "needle"):
        leads = []
        for budget in (48, 128):
            ours, theirs = method(f"cake:budget={budget}"), method(f"snapkv:budget={budget}")
            mine, other = (lab.values(m, "nll", task, length) for m in (ours, theirs))
            leads.append([b - a for a, b in zip(mine, other, strict=True)])
        yield Measured(task, stats.difference(leads[0], leads[1]))


@claim(
    "cake/layers",
    "Layers get different budgets",
    paper="shown as a figure: budgets differ by layer, model and prompt",
    metric="coefficient of variation of tokens over layers",
    bound=0.05,
    baseline="the same budget for every layer (0)",
)
def layers_differ(lab: KVLab, length: int) -> Iterator[Measured]:
    """After the prompt, per prompt."""
    for task in ("continuation", "needle"):
        held = lab.layers(method("cake:budget=64"), task, length)
        values = (held.std(1) / held.mean(1)).tolist()
        most, least = held.mean(0).max(), held.mean(0).min()
        yield Measured(f"{task}, 64 tokens on average", stats.mean(values), f"from {least:.0f} to {most:.0f} tokens")


@claim(
    "cake/prompts",
    "Budgets of layers depend on the prompt",
    paper="shown as a figure: the same layer gets different budgets on different tasks",
    metric="mean distance of a layer's tokens from their average over prompts, as a share of the budget",
    bound=0.01,
    baseline="fixed budgets (0)",
)
def prompts_differ(lab: KVLab, length: int) -> Iterator[Measured]:
    """Within a task, where prompts are most alike."""
    for task in ("continuation", "needle"):
        held = lab.layers(method("cake:budget=64"), task, length)
        values = ((held - held.mean(0)).abs().mean(1) / 64).tolist()
        yield Measured(f"{task}, 64 tokens on average", stats.mean(values))


@claim(
    "cake/cascade",
    "Cutting layers while the prompt passes holds less at the peak than cutting them after it",
    paper="Mistral-7B, 1024 tokens: peak memory 48.6 % less at 128K (against the full cache)",
    metric="peak bytes, cascading over one-shot",
    direction="below",
    bound=1.0,
    baseline="one-shot CAKE, the same sets",
)
def cascade_peaks_lower(lab: KVLab, length: int) -> Iterator[Measured]:
    """From the storages of all layers."""
    cascading, once = (method(f"cake:budget=64{rest}") for rest in ("", ",schedule=one_shot"))
    peaks = [lab.values(m, "bytes_peak", "continuation", length) for m in (cascading, once)]
    yield Measured("continuation, 64 tokens on average", stats.ratio(peaks[0], peaks[1]))
