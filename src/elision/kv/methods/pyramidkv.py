"""PyramidKV: SnapKV's selection with budgets that shrink from the first layer to the last.

"PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", 2024,
https://arxiv.org/abs/2406.02069.

Reproduced is the released arithmetic. With the average budget c, the window w, L layers and a prompt of S tokens, the
middle of C = c - w tokens is sloped: the last layer gets low = C // beta and the first high = 2C - low; if high exceeds
S - w, high is S - w and low = 2C - high. Layer l keeps high - l * ((high - low) // (L - 1)) middle tokens and the
window. Prompts below c tokens are left alone, prompts below 2C tokens get C everywhere. Because the slope is rounded
down, the layers together hold up to L (L - 1) / 2 tokens more than c L; `slope="exact"` rounds each layer down instead
and never does (an option of this library). Nothing is dropped while decoding. Layers are counted among those managed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elision.kv.actions import Evict
from elision.kv.budgets import Even
from elision.kv.method import KVHost
from elision.kv.methods.snapkv import SnapKV, WindowSum
from elision.kv.parts import Call, Keep, Rule, prompt_end
from elision.method import Paper, option, register


@register
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keep what the prompt's last queries attend to, more of it in the first layers."""

    name: ClassVar[str] = "pyramidkv"
    description: ClassVar[str] = "SnapKV's selection with budgets that shrink from the first layer to the last"
    paper: ClassVar[Paper] = Paper(
        "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
        "arXiv 2024",
        "https://arxiv.org/abs/2406.02069",
    )

    beta: int = option(20, "how many times fewer tokens than the average the last layer gets", ge=1)
    slope: str = option(
        "released",
        "how the slope is made whole: rounded once, or exactly for each layer",
        choices=("released", "exact"),
    )

    def middle(self, layer: int, layers: int, length: int, budget: int) -> int:
        """Tokens before the window that layer `layer` of `layers` keeps of a prompt of `length` tokens."""
        mean, before = max(budget - self.window, 0), length - self.window
        if length < budget:
            return max(before, 0)
        if length < 2 * mean or layers == 1:
            return mean
        low = mean // self.beta
        high = 2 * mean - low
        if high >= before:
            high = before
            low = 2 * mean - high
        if self.slope == "exact":
            return (high * (layers - 1) - layer * (high - low)) // (layers - 1)
        return high - layer * ((high - low) // (layers - 1))

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One: evict when the prompt is through."""
        layers = {layer: i for i, layer in enumerate(host.layers)}

        def keep(call: Call) -> Keep:
            budget, index = self.tokens(call), layers[call.layer]

            def row(length: int, tokens: int) -> int:
                return self.window + self.middle(index, len(layers), length, tokens)

            if not isinstance(call.lengths, Tensor):
                assert isinstance(budget, int)
                return row(call.lengths, budget)
            lengths = call.lengths.tolist()
            budgets = budget.tolist() if isinstance(budget, Tensor) else [budget] * len(lengths)
            kept = [row(*pair) for pair in zip(lengths, budgets, strict=True)]
            return torch.tensor(kept, device=call.lengths.device)

        scorer = WindowSum(self.window, self.reduce, self.kernel, self.pooling)  # type: ignore[arg-type]
        return [Rule(prompt_end, scorer, Even(keep), Evict(recent=self.window, order="time"))]
