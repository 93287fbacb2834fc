"""Fast-dLLM: block-wise prefix or dual cache, and parallel decoding above a confidence threshold.

Paper: "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding",
Wu et al., 2025, https://arxiv.org/abs/2505.22618

Blocks are decoded from left to right. The first call of a block computes everything, fills the cache and commits
tokens; the block is then finished with calls that compute

    prefix   everything from the block's start to the end of the sequence; K and V before it are frozen
    dual     the block alone; K and V on both sides are frozen, its own rows are overwritten in place

Each call commits every token of the block whose probability reaches the threshold, at least one; without a threshold a
fixed number per call. On models with shifted outputs (Dream) the first call commits the first position of the block
alone, whatever its confidence, since the row that predicts it lies before the block.

Reproduced from the released code: tokens, rows that are run and logits. After the first call the released LLaDA code
always makes a second one, even when nothing is left to decide; `extra_call=False` saves it. Different: batches of any
size are served row by row of the same block (the released dual cache mixes the rows of a batch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elision.dllm.decode import Step
from elision.dllm.model import MaskedLM
from elision.dllm.policy import DllmMethod, Policy
from elision.method import Paper, option, register


@register
@dataclass(frozen=True)
class FastDLLM(DllmMethod):
    """Freezes K/V outside the block until the block is done; decodes in parallel above a threshold."""

    name: ClassVar[str] = "fast_dllm"
    description: ClassVar[str] = "block-wise prefix or dual cache with confidence-threshold decoding"
    paper: ClassVar[Paper | None] = Paper(
        "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding",
        "arXiv 2025",
        "https://arxiv.org/abs/2505.22618",
    )

    cache: str = option(
        "dual", "which K and V are frozen: those before the block, or on both sides", choices=("prefix", "dual")
    )
    threshold: float | None = option(
        0.9, "least probability of a token that is committed in parallel; None commits a fixed number per call", ge=0
    )
    extra_call: bool = option(
        True,
        "unshifted models: make the second call of a block even if it is complete (released code)",
        choices=(True, False),
    )

    def decoding(self, asked: Mapping[str, Any], lm: MaskedLM) -> dict[str, Any]:
        """Threshold decoding, and the first call's rule on shifted models."""
        out = dict(asked) if self.threshold is None else self._prescribe(asked, threshold=self.threshold)
        if lm.shift:
            return self._prescribe(out, first_call="first_position")
        return self._prescribe(out, min_calls=2 if self.extra_call else 1)

    def policy(self, lm: MaskedLM) -> Policy:
        """Fresh state for one generation."""
        return _Blocks(self.cache)


class _Blocks(Policy):
    def __init__(self, cache: str) -> None:
        self.cache = cache

    def rows(self, step: Step) -> Tensor | None:
        if step.i == 0:
            return None
        out = torch.zeros_like(step.masked)
        out[:, step.start : step.end if self.cache == "dual" else None] = True
        return out
