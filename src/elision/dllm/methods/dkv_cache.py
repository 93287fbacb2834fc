"""dKV-Cache: keys and values of decoded tokens are cached one step late and refreshed on a clock.

Paper: "dKV-Cache: The Cache for Diffusion Language Models", Ma, Yu, Fang, Wang, 2025,
https://arxiv.org/abs/2505.15781

In a masked-diffusion model every K and V may change at every step, but those of tokens that are already decided change
little, except in the very step in which [MASK] becomes a word. With U_i the positions that are no longer masked after
call i and D_i = U_i \\ U_{i-1}, call i computes

    everything                   at a refresh (every N calls; for unshifted models also the first two of a block)
    R = complement of U_{i-2}    otherwise: the masked rows and D_{i-1}, with their real token ids

and attention reads fresh K, V at R and stored ones elsewhere. The rows D_{i-1} are stored by being computed once more
after their decision: that is the delay. `delay=False` stores them as they were when they were still [MASK].

The variants: `decode` as above. `prefill` keeps the prompt's rows from the first call on and computes the rest at every
call. `pd` does both: the prompt is never refreshed, decided tokens are cached with delay, and a refresh computes
everything outside the prompt. `greedy` knows the order of decoding beforehand (remasking "random_order") and computes
only D_i (to be decided now), D_{i-1} and a window of masked neighbours; all other rows, masked ones too, are stale.

Models with shifted outputs (Dream; the row of position t predicts token t + 1) may drop a row when the token that it
predicts is decided, not when its own is; `shift_type` says which. Their first call is the only extra full one.

Reproduced from the released code: tokens, rows that are run, logits and cached rows. Different: rows are kept in place
of their position and not reordered, which changes the order of summation only; keys are kept rotated; several samples
may decide different numbers of tokens, and padding is masked for every model. Under guidance each branch has slots of
its own and both compute the same rows (inferred: the released code refuses guidance). `prefill` and `pd` were released
for Dream only; for unshifted models the whole prompt is kept (inferred). `greedy` was released for LLaDA only; on
shifted models P_i also holds the rows that predict D_i (inferred). Where the paper's text and the released greedy
code differ on the window's centre, the code is the default (`window_on`).
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

Variant = str


@register
@dataclass(frozen=True)
class DKVCache(DllmMethod):
    """Decided tokens are cached one step late and refreshed every `interval` calls."""

    name: ClassVar[str] = "dkv_cache"
    description: ClassVar[str] = "K/V of decided tokens cached one step late, refreshed on a clock"
    paper: ClassVar[Paper | None] = Paper(
        "dKV-Cache: The Cache for Diffusion Language Models", "arXiv 2025", "https://arxiv.org/abs/2505.15781"
    )

    variant: Variant = option(
        "decode", "which rows are cached: see the text above", choices=("decode", "prefill", "pd", "greedy")
    )
    interval: int = option(
        8, "N, a refresh every so many calls (published: 8; greedy 2; Dream 4); prefill never refreshes", ge=1
    )
    window: int = option(4, "masked neighbours computed per anchor, greedy only", ge=0)
    window_on: str = option(
        "next",
        "greedy: anchors are the tokens to be decided next (released code) or those just committed (paper's text)",
        choices=("next", "committed"),
    )
    shift_type: str = option(
        "un",
        "shifted models: row t is cached once token t+1 (un), both t and t+1 (un_right), or token t (right) is decided",
        choices=("un", "un_right", "right"),
    )
    missing: str = option(
        "skip",
        "a masked token whose predicting row is cached, possible under shift_type='right' only, waits for the next "
        "refresh (skip) or is committed as token 0, as the released code does (zero)",
        choices=("skip", "zero"),
    )
    delay: bool = option(True, "False caches tokens in the step that decides them, as a control", choices=(True, False))

    def decoding(self, asked: Mapping[str, Any], lm: MaskedLM) -> dict[str, Any]:
        """Greedy needs a known order."""
        out = self._prescribe(asked, missing=self.missing)
        return self._prescribe(out, remasking="random_order") if self.variant == "greedy" else out

    def policy(self, lm: MaskedLM) -> Policy:
        """Fresh state for one generation."""
        if self.variant == "greedy":
            return _Greedy(self, lm.shift)
        return _Decode(self, lm.shift) if self.variant == "decode" else _Prompt(self, lm.shift)


class _Decode(Policy):
    """Variant decode, and what the variants that keep the prompt share with it."""

    def __init__(self, options: DKVCache, shift: bool) -> None:
        self.o, self.shift = options, shift

    def rows(self, step: Step) -> Tensor | None:
        if step.i % self.o.interval == 0 or (step.i == 1 and not self.shift):
            return None
        return ~self.cached(step, first=step.n == 1)

    def cached(self, step: Step, *, first: bool) -> Tensor:
        """Rows that this call reads from the slots; `first`: the call before kept the prompt alone."""
        masked = step.before if self.o.delay else step.masked
        if not self.shift:
            return ~masked
        if first and self.o.delay:
            return torch.arange(masked.shape[1], device=masked.device).expand_as(masked) < step.prompt - 1
        if self.o.shift_type == "right":
            return ~masked
        if self.o.shift_type == "un":
            return ~masked.roll(-1, dims=1)  # the last row wraps to position 0, which is prompt
        both = ~masked[:, :-1] & ~masked[:, 1:]
        return torch.cat((both, both[:, -1:]), dim=1)  # the last row goes with the one before it


class _Prompt(_Decode):
    """Variants prefill and pd: after the first call the prompt's rows are never computed again."""

    def rows(self, step: Step) -> Tensor | None:
        if step.n == 0:
            return None
        kept = torch.arange(step.ids.shape[1], device=step.ids.device).expand_as(step.ids) < step.prompt - int(
            self.shift
        )
        if self.o.variant == "pd" and step.i % self.o.interval:
            kept = kept | self.cached(step, first=step.n == 1)
        return ~kept


class _Greedy(Policy):
    """Variant greedy: P_i = D_i ∪ D_{i-1} ∪ W."""

    def __init__(self, options: DKVCache, shift: bool) -> None:
        self.o, self.shift = options, shift

    def rows(self, step: Step) -> Tensor | None:
        assert step.next is not None
        if step.i % self.o.interval == 0:
            return None
        chosen = step.next | step.committed if self.o.delay else step.next
        if self.shift:
            chosen = chosen | step.need.mask()  # the rows that predict D_i
        if self.o.window == 0:
            return chosen
        anchors = step.next if self.o.window_on == "next" else step.committed
        if self.o.window_on == "committed":
            low, high = -(-self.o.window // 2), self.o.window // 2
            near = torch.zeros_like(chosen)
            for d in range(-low, high + 1):
                near |= _moved(anchors, d)
            return chosen | (near & step.masked)
        return _walk(chosen, step.before if self.o.delay else step.masked, step, self.o.window)


def _moved(chosen: Tensor, by: int) -> Tensor:
    """The set moved by `by` positions, without wrapping."""
    out = torch.zeros_like(chosen)
    length = chosen.shape[1]
    if abs(by) < length:
        out[:, max(by, 0) : length + min(by, 0)] = chosen[:, max(-by, 0) : length - max(by, 0)]
    return out


def _walk(chosen: Tensor, masked: Tensor, step: Step, window: int) -> Tensor:
    """Add to `chosen` the `window` nearest positions in `masked` around every anchor in turn, left before right."""
    chosen, place = chosen.clone(), torch.arange(chosen.shape[1], device=chosen.device)
    far = 4 * len(place)
    anchors, live = _in_order(step)
    for anchor, present in zip(anchors.unbind(1), live.unbind(1), strict=True):
        distance = place - anchor[:, None]  # [B, N]
        cost = 2 * distance.abs() - (distance < 0).long()
        free = masked & ~chosen & present[:, None]
        cost = cost.masked_fill(~free, far)
        nearest = cost.topk(min(window, len(place)), dim=1, largest=False)
        chosen.scatter_(1, nearest.indices, chosen.gather(1, nearest.indices) | (nearest.values < far))
    return chosen


def _in_order(step: Step) -> tuple[Tensor, Tensor]:
    """Anchors [B, a] in the order of decoding, and which of them are real."""
    assert step.next is not None
    assert step.order is not None
    most = int(step.next.sum(dim=1).max())
    best = step.order.masked_fill(~step.next, -torch.inf).topk(most, dim=1)
    return best.indices, best.values > -torch.inf
