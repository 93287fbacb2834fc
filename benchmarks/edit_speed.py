"""Speed of RegionE on an editing model in which computing dominates, against the ideal of what it computes.

    python benchmarks/edit_speed.py --rounds 5 --out results/edit_speed.jsonl

The model is that of `denoise_speed.py` (12 blocks, width 512, random weights) in Kontext's layout: 64 text tokens, 256
noise tokens and 256 of the picture, 28 Euler steps of one call. The ideal row computes the same tokens at the same
steps against ready keys and values of full length, and pays for nothing else: no taps, no scatter, no writing.
Figures are medians over rounds of ratios within a round, of CPU seconds of this process and its one thread, so that
others on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import elision
from denoise_ideals import Bench, build
from denoise_speed import environment
from elision.denoise.methods.regione import RegionE
from elision.hooks.attention import AttentionCalls

STEPS, SIDE, TEXT = 28, 16, 64


class EditBench(Bench):
    """The miniature pipeline with a picture: the opposite of the noise in a corner of `corner` tokens a side."""

    def __init__(self, corner: int) -> None:
        super().__init__(build(), SIDE, TEXT)
        side = torch.arange(SIDE).float()
        self.given["img_ids"] = torch.cartesian_prod(torch.arange(2).float(), side, side)
        noise = torch.randn(1, self.tokens, 64, generator=torch.Generator().manual_seed(2))
        self.picture = noise.clone()
        self.picture.view(1, SIDE, SIDE, 64)[:, :corner, :corner] *= -1
        self.live: Tensor | None = None
        self.ready: tuple[Tensor, Tensor] | None = None

    def call(self, x: Tensor, t: Tensor) -> Tensor:
        """One call of the denoiser; with `live` tokens on these against ready keys and values."""
        if self.live is None:
            return super().call(torch.cat([x, self.picture], dim=1), t)[:, : self.tokens]
        assert self.ready is not None
        key, value = self.ready

        def change(call: Mapping[str, Any]) -> Mapping[str, Any]:
            return {**call, "key": key, "value": value}

        given = self.given | {"img_ids": self.given["img_ids"][self.live]}
        with AttentionCalls(change):
            out = self.transformer(x[:, self.live], timestep=t.expand(1) / 1000, return_dict=False, **given)[0]
        return x.new_zeros(x.shape).index_copy_(1, self.live, out)

    def timed(self, steps: int) -> dict[str, Any]:
        """A sample, and the CPU seconds it took."""
        started = time.process_time()
        out = self(steps)
        return {"out": out, "seconds": time.process_time() - started}

    def ideal(self, full: Sequence[int], region: Sequence[int], live: Tensor) -> dict[str, Any]:
        """The loop that computes all tokens at `full` steps, live ones at `region` steps, and nothing at others."""
        head = self.transformer.config.attention_head_dim
        shape = (1, self.transformer.config.num_attention_heads, TEXT + 2 * self.tokens, head)
        self.ready = torch.randn(shape), torch.randn(shape)
        self.skip = set(range(STEPS)) - {*full, *region}

        def each(n: int) -> None:
            self.live = live if n in region else None

        self.each = each
        try:
            return self.timed(STEPS)
        finally:
            self.each, self.live, self.skip = (lambda n: None), None, set()


def ours(pipe: EditBench, method: RegionE) -> dict[str, Any]:
    """A run of the method."""
    with elision.apply(pipe, method) as run:
        found = pipe.timed(STEPS)
    report: Any = run.report()
    mask = torch.tensor(report.last.extra["regione"]["mask"][0]).flatten()
    s = report.seconds
    whole = report.flops_computed + report.flops_elided
    return found | {
        "states": report.strip(),
        "live": mask.nonzero().flatten(),
        "bytes": report.bytes_peak,
        "flops_share": report.flops_computed / whole,
        "deciding_share": s.deciding / s.total,
        "standing_in_share": s.standing_in / s.total,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--corner", type=int, default=8, help="side of the edited corner, of 16 tokens")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pipe = EditBench(asked.corner)
    arms = {"regione": RegionE(preset="kontext"), "regione, delta 0": RegionE(delta=0, eta=0.93)}
    facts = {name: ours(pipe, method) for name, method in arms.items()}  # also warms up
    lines: list[dict[str, Any]] = [{"kind": "head", "environment": environment(), "rounds": asked.rounds}]
    seconds: dict[str, list[float]] = {name: [] for name in ("uncached", *(f"{a}{b}" for a in arms for b in ("", "!")))}
    for _ in range(asked.rounds):
        seconds["uncached"].append(pipe.timed(STEPS)["seconds"])
        for name, method in arms.items():
            about = facts[name]
            full = [n for n, letter in enumerate(about["states"]) if letter == "C"]
            region = [n for n, letter in enumerate(about["states"]) if letter == "m"]
            seconds[name].append(ours(pipe, method)["seconds"])
            seconds[f"{name}!"].append(pipe.ideal(full, region, about["live"])["seconds"])
    for name in arms:
        about = facts[name]
        speedups = [b / s for b, s in zip(seconds["uncached"], seconds[name], strict=True)]
        ideals = [b / s for b, s in zip(seconds["uncached"], seconds[f"{name}!"], strict=True)]
        lines.append(
            {
                "row": name,
                "states": about["states"],
                "live_share": len(about["live"]) / pipe.tokens,
                "flops_share": about["flops_share"],
                "bytes": about["bytes"],
                "seconds": statistics.median(seconds[name]),
                "speedup": statistics.median(speedups),
                "ideal_speedup": statistics.median(ideals),
                "of_ideal": statistics.median(s / i for s, i in zip(speedups, ideals, strict=True)),
                "deciding_share": about["deciding_share"],
                "standing_in_share": about["standing_in_share"],
            }
        )
    text = "\n".join(json.dumps(line) for line in lines)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
