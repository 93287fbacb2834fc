"""The report of a session on a masked-diffusion language model: which rows of which layers ran at every call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elision.session import Report


@dataclass
class DllmRun:
    """One generation.

    Attributes:
        batch: samples that were generated together.
        prompt: length of the prompt, and
        generated: of what was generated.
        layers: layers of the model.
        calls: calls of the model.
        full_calls: calls in which every row went through every layer.
        token_layers: rows that went through a layer, summed over layers and calls, and
        token_layers_asked: what the sampler that was asked for would have run at least without a cache (its scheduled
            calls, or the calls that were made where none are scheduled), and
        token_layers_uncached: what the calls that were made would have run without a cache.
        padding: rows that only filled up batches of unequal sets.
        head_rows: rows that went through the head.
        committed: tokens that were decided.
        seconds: of the whole generation, on the host.
        query: [calls, B, N] bool, positions that went through every layer.
        depth: [calls] layers that took the query alone; the layers above took every position in reach.
        reach: [calls] positions that the layers above took.
        stale: in shadow mode, [calls, L] relative error of the K and V held after the call against the true ones, and
        drift: [calls, L] relative change of the true K and V since the call before (0 at the first).
        facts: what the method adds.
    """

    batch: int
    prompt: int
    generated: int
    layers: int
    calls: int = 0
    full_calls: int = 0
    token_layers: int = 0
    token_layers_asked: int = 0
    token_layers_uncached: int = 0
    padding: int = 0
    head_rows: int = 0
    committed: int = 0
    seconds: float = 0.0
    query: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    depth: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    reach: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    stale: Tensor | None = None
    drift: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def computed(self) -> Tensor:
        """[calls, B, N] how many layers every position went through at every call; for a strip picture."""
        where = torch.arange(self.query.shape[-1])
        above = (where < self.reach[:, None]).long() * (self.layers - self.depth)[:, None]  # [calls, N]
        return self.query.long() * self.depth[:, None, None] + above[:, None, :]


@dataclass
class DllmReport(Report):
    """What a session on a masked-diffusion language model did.

    Attributes:
        runs: the latest generations, oldest first (at most 64 are kept in detail).
        run_count: how many there were.
        calls: calls of the model over all runs, and so on for
        full_calls: calls that computed everything,
        token_layers: rows times layers that ran,
        token_layers_asked: and those that the sampler would have run without the method.
    """

    runs: list[DllmRun] = field(default_factory=list)
    run_count: int = 0
    calls: int = 0
    full_calls: int = 0
    token_layers: int = 0
    token_layers_asked: int = 0

    @property
    def last(self) -> DllmRun | None:
        """The latest run."""
        return self.runs[-1] if self.runs else None

    @property
    def cache_ratio(self) -> float:
        """Share of the rows times layers that was not computed."""
        return 1 - self.token_layers / self.token_layers_asked if self.token_layers_asked else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers; sets of positions as strings of 0 and 1 per call and sample."""
        out = super().to_dict()
        for plain, run in zip(out["runs"], self.runs, strict=True):
            plain["query"] = [["".join("01"[x] for x in row) for row in call] for call in run.query.long().tolist()]
            for name in ("depth", "reach", "stale", "drift"):
                value = getattr(run, name)
                plain[name] = None if value is None else value.tolist()
            plain["facts"] = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in run.facts.items()}
        return out

    def __str__(self) -> str:
        """A few lines for people."""
        head = f"{' + '.join(self.methods)} on {self.target}: {self.calls} calls, {self.full_calls} of them full"
        lines = [head + (f", in {self.run_count} runs" if self.run_count != 1 else "")]
        lines.append(
            f"  rows      {self.token_layers:,} token-layers computed, {self.token_layers_asked:,} without the method "
            f"({self.cache_ratio:.0%} elided)"
        )
        run = self.last
        if run is not None and run.seconds:
            made = run.committed / run.seconds
            lines.append(f"  last run  {run.committed} tokens in {run.seconds:.2f} s ({made:.1f} per second)")
        s = self.seconds
        lines.append(f"  seconds   {s.computing:.2f} computing, {s.deciding:.3f} deciding")
        lines.append(f"  bytes     {self.bytes_held:,} held, {self.bytes_peak:,} at the peak")
        if run is not None and run.stale is not None and run.drift is not None:
            for name, rows in (("stale", run.stale), ("drift", run.drift[1:])):
                lines.append(f"  {name}     " + " ".join(f"{x:.3f}" for x in rows.mean(dim=0).tolist()) + "  by layer")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
