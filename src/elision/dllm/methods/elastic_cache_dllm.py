"""Elastic-Cache: the attention of the most-attended token decides when, and from which layer up, K/V are refreshed.

Paper: "Attention Is All You Need for KV Cache in Diffusion LLMs", Nguyen-Tri, Ranjan, Shen, ICLR 2026,
https://arxiv.org/abs/2510.14973

Decoding goes through a window of the β left-most masks; every token of probability ε is committed, at least one. With
T the most-attended decided token of every layer at the step before, ΔD the tokens committed there, and σ the cosine
between the attention rows of T at both steps, a step computes layer by layer

    reuse     rows Q = T ∪ ΔD ∪ window alone; their K, V and layer inputs overwrite the stored ones
    refresh   every position, in all layers above the first one with σ < γ; its input mixes stored inputs with fresh Q

and picks the new T of each layer by the attention that the window's rows pay to decided tokens. The first step takes
everything. `force_full` makes every step such a step; γ ≤ −1 never refreshes; γ > 1 refreshes layers 2..L every time.

No official code was available. Reproduced: the algorithm of the paper as its tables and secondary texts describe it,
against trajectories on which two independent implementations agree. What these sources leave open is an option whose
text says "inferred"; the defaults are those of the trajectories. For shifted models (Dream) the rows that predict the
window belong to Q. Decisions are read once per layer, or once per step (`sync`): then all layers reuse first and those
above the trigger are refreshed afterwards, which changes no result and costs |Q| rows a layer. Under guidance, which
the published runs do not use, each branch has slots and tracked tokens of its own and both refresh when one triggers
(inferred).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elision.dllm.decode import Step
from elision.dllm.drift import Drift, RowMemory, over_heads
from elision.dllm.model import MaskedLM, Rotation
from elision.dllm.passes import Net
from elision.dllm.policy import DllmMethod, Policy
from elision.method import Paper, option, register
from elision.tensors.slots import Rows

NO_TEST = 2.0  # σ of a layer at which nothing was compared


@register
@dataclass(frozen=True)
class ElasticCache(DllmMethod):
    """Refreshes the layers above the first one whose most-attended token attends differently than a step ago."""

    name: ClassVar[str] = "elastic_cache_dllm"
    description: ClassVar[str] = "attention drift decides when and from which layer K/V are refreshed"
    paper: ClassVar[Paper | None] = Paper(
        "Attention Is All You Need for KV Cache in Diffusion LLMs", "ICLR 2026", "https://arxiv.org/abs/2510.14973"
    )

    gamma: float = option(
        0.9, "γ, attention similarity below which the layers above are refreshed; larger refreshes more", ge=-2, le=2
    )
    beta: int = option(16, "β, masks in the decoding window (published: 16, 32; larger hurts LLaDA)", ge=1)
    eps: float = option(0.9, "ε, least probability of a token that is committed; above 1 commits one per step", gt=0)
    track: int = option(1, "most-attended tokens tracked per layer", ge=1)
    mask_block: int = option(32, "length of the blocks in which the masked tail is grouped, for far_tail='keep'", ge=1)
    far_tail: str = option(
        "refresh",
        "whether a refresh takes every position or keeps the mask blocks behind the window as they are (inferred)",
        choices=("refresh", "keep"),
    )
    force_full: bool = option(False, "every step takes everything: the exact anchor", choices=(True, False))
    heads: str = option("mean", "how the attention of all query heads becomes one (inferred)", choices=("mean", "max"))
    sigma: str = option(
        "rows",
        "mean cosine of the tracked tokens' rows, or one cosine of all rows joined (inferred)",
        choices=("rows", "joined"),
    )
    unseen: str = option(
        "last",
        "a token that becomes tracked without having been computed a step ago: compare with its last row, or leave it "
        "out of the test (inferred)",
        choices=("last", "skip"),
    )
    query: str = option(
        "union",
        "Q holds the present window and the tokens just committed; or the window of the step before, which contains "
        "them: masks that are new in the window then wait one step, unless a refresh takes them (inferred: sources "
        "disagree)",
        choices=("union", "previous"),
    )
    requery: bool = option(
        True,
        "compute tokens once more after their commit; False freezes them as masks, as a control",
        choices=(True, False),
    )
    batch: str = option(
        "alone",
        "samples of a batch one by one, or together, refreshing for all what one of them triggers (inferred)",
        choices=("alone", "together"),
    )
    sync: str = option(
        "auto",
        "when decisions reach the host: after every layer, after every step, or by device",
        choices=("auto", "layer", "step"),
    )

    def decoding(self, asked: Mapping[str, Any], lm: MaskedLM) -> dict[str, Any]:
        """A sliding window, and commits above ε."""
        return self._prescribe(asked, window=self.beta, threshold=self.eps)

    def alone(self, lm: MaskedLM) -> bool:
        """Whether samples of a batch are generated one by one."""
        return self.batch == "alone"

    def policy(self, lm: MaskedLM) -> Policy:
        """Fresh state for one generation."""
        late = self.sync == "step" or (self.sync == "auto" and lm.device.type != "cpu")
        return _Elastic(self, late)


class _Elastic(Policy):
    slots: ClassVar[bool | str] = "h"

    def __init__(self, options: ElasticCache, late: bool) -> None:
        self.o, self.late = options, late
        self.memory: RowMemory | None = None
        self.tracked: Rows | None = None  # T of the step before, [B, τ]
        self.drift: Drift | None = None  # from its attention rows there
        self.window = self.sources = torch.empty(0)  # of the step before, [B, N]: window, rows that predict it
        self.log: dict[str, list[Any]] = {"sigma": [], "lstar": [], "tracked": []}

    def forward(self, step: Step, net: Net) -> tuple[Tensor, Rows | None]:
        first = self.memory is None
        if self.memory is None:
            self.memory = RowMemory(net.lm.blocks, net.batch, net.length, net.mask, self.o.heads)
        if self.o.unseen == "skip":
            self.memory.forget()
        now = _Now(self, step, net)
        if first or self.o.force_full:
            h, rows, lstar = now.refresh(net.embed(step), 0), None, 0
            net.note(None, 0)
        else:
            h, rows, lstar = now.step()
        self.tracked = Rows.where(torch.zeros_like(now.decided).scatter_(1, torch.cat(now.picks, dim=1), True))
        found, valid = self.memory.recall(self.tracked)
        self.drift = Drift(found, valid & self.tracked.real(), self.o.sigma)
        self.window, self.sources = now.eligible, now.sources
        self.log["sigma"].append(torch.stack(now.sigma, dim=1))
        self.log["lstar"].append(lstar)
        self.log["tracked"].append(torch.stack(now.picks))
        return h, rows

    def tensors(self) -> Iterator[Tensor]:
        yield from self.memory.tensors() if self.memory else ()
        yield from self.drift.before if self.drift else ()

    def facts(self) -> dict[str, Any]:
        """σ [calls, B, L], the last layer that reused [calls], tracked positions [calls, L, B, track]."""
        cpu = {name: torch.stack(self.log[name]).cpu() for name in ("sigma", "tracked") if self.log[name]}
        return {**cpu, "lstar": torch.tensor(self.log["lstar"])}


class _Now:
    """One step: the loop of the algorithm box."""

    def __init__(self, state: _Elastic, step: Step, net: Net) -> None:
        assert state.memory is not None
        self.state, self.o, self.step_, self.net, self.memory = state, state.o, step, net, state.memory
        self.eligible = net.expand(step.eligible)
        self.sources = net.expand(step.need.mask())
        self.previous = self.o.query == "previous" and state.tracked is not None
        if self.previous:
            self.window = Rows.where(state.window)
        else:
            self.window = step.need.repeat(net.branches) if not net.lm.shift else Rows.where(self.eligible)
        self.weight = self.window.real().float()  # [B, β]
        self.decided = ~net.expand(step.masked)
        if net.mask is not None:
            self.decided &= net.mask[:, 0, 0]
        L = net.lm.layers
        self.picks: list[Tensor] = [torch.empty(0)] * L
        self.sigma = [torch.full((net.batch,), NO_TEST, device=net.lm.device)] * L

    def step(self) -> tuple[Tensor, Rows | None, int]:
        """Reuse up to the first trigger, refresh above it."""
        net, o, L = self.net, self.o, self.net.lm.layers
        assert self.state.tracked is not None
        rows = Rows.where(self.state.tracked.mask() | self._wanted())
        rotation, h = net.rotation.at(rows.pos), net.embed(self.step_, rows)
        place, there = self.window.index_in(rows)
        voters = torch.zeros(rows.pos.shape, device=rows.pos.device).scatter_add_(1, place, self.weight * there)
        tracked = self.state.tracked.index_in(rows)[0][:, :, None].expand(-1, -1, net.length)
        lstar = L
        for layer in range(L):
            h = self._reuse(layer, h, rows, rotation, tracked, voters)
            if not self.state.late and bool((self.sigma[layer] < o.gamma).any()):
                lstar = layer + 1
                break
        if self.state.late:
            fired = (torch.stack(self.sigma) < o.gamma).any(dim=1).tolist()
            lstar = next((layer + 1 for layer in range(L) if fired[layer]), L)
        if lstar == L:
            net.note(rows, L)
            return h, rows, L
        if not self.state.late:
            net.held.write_h(lstar, rows, h)
        for layer in range(lstar, L):
            self.sigma[layer] = torch.full_like(self.sigma[layer], NO_TEST)
        reach = self._reach()
        h = self.refresh(net.held.h(lstar)[:, :reach], lstar, reach)
        net.note(rows, lstar, reach)
        return h, None, lstar

    def _wanted(self) -> Tensor:
        """Q [B, N] without the tracked tokens."""
        committed = self.net.expand(self.step_.committed)
        window, sources = self.eligible, self.sources
        if self.previous:
            window, sources = self.state.window, self.state.sources
        window = window | committed if self.o.requery else window & ~committed
        return window | sources if self.net.lm.shift else window

    def _reuse(self, layer: int, h: Tensor, rows: Rows, rotation: Rotation, tracked: Tensor, voters: Tensor) -> Tensor:
        block, slots = self.net.lm.blocks[layer], self.net.held
        assert self.state.drift is not None
        slots.write_h(layer, rows, h)
        q, k, v = block.project(h, rotation)
        slots.write(layer, rows, k, v)
        self.net.count(rows)
        weights = block.weights(q, slots.k(layer), self.net.mask)
        attention = over_heads(weights, self.o.heads)  # S [B, |Q|, N]
        self.sigma[layer] = self.state.drift.sigma(layer, attention.gather(1, tracked))
        self._pick(layer, attention, voters)
        self.memory.took(layer, rows, attention)
        return block.finish(h, block.mix(weights, slots.v(layer)))

    def refresh(self, h: Tensor, start: int, reach: int | None = None) -> Tensor:
        """Layers `start`.. on every position (in reach) h [B, N', d]."""
        for layer in range(start, self.net.lm.layers):
            h = self.net.whole_layer(layer, h, reach, self._watch)
        return h

    def _watch(self, layer: int, q: Tensor, k: Tensor) -> None:
        if k is self.net.held.k(layer):
            k = k.clone()  # partial steps write into it
        self.memory.took_all(layer, q, k)
        index = self.window.pos[:, :, None, None].expand(-1, -1, *q.shape[2:])
        attention = over_heads(self.net.lm.blocks[layer].weights(q.gather(1, index), k, self.net.mask), self.o.heads)
        self._pick(layer, attention, self.weight)

    def _pick(self, layer: int, attention: Tensor, voters: Tensor) -> None:
        """The decided tokens that the window's rows attend most; attention [B, m, N], voters [B, m] 1 at these rows."""
        score = (voters[:, None] @ attention)[:, 0].masked_fill(~self.decided, -1)
        best = score.topk(min(self.o.track, score.shape[1]), dim=1)
        self.picks[layer] = torch.where(best.values >= 0, best.indices, best.indices[:, :1])  # fewer real tokens

    def _reach(self) -> int | None:
        if self.o.far_tail == "refresh":
            return None
        last = int((self.decided | self.eligible).any(dim=0).nonzero().max()) + 1 - self.step_.prompt
        return min(self.step_.prompt + -(-last // self.o.mask_block) * self.o.mask_block, self.net.length)
