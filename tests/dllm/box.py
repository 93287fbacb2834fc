"""Elastic-Cache as its algorithm box says it, slowly: full-length layers, whole attention matrices, Python sets."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from elision.dllm import MaskedLM
from elision.dllm.methods.elastic_cache_dllm import NO_TEST, ElasticCache
from tests.dllm.oracle import rotate


@dataclass
class Call:
    """What one call did: Q, the last layer that reused, σ and T by layer."""

    query: set[int]
    lstar: int
    sigma: list[float] = field(default_factory=list)
    tracked: list[set[int]] = field(default_factory=list)


class Box:
    """One sample [1, P] with padding `real` [P], decoded to the end."""

    def __init__(self, lm: MaskedLM, options: ElasticCache, prompt: Tensor, real: Tensor, gen: int) -> None:
        self.lm, self.o, self.prompt = lm, options, prompt.shape[1]
        self.real = torch.cat((real.bool(), torch.ones(gen, dtype=torch.bool)))
        self.ids = torch.cat((prompt, torch.full((1, gen), lm.mask_id)), dim=1)
        self.masked = torch.arange(self.prompt + gen) >= self.prompt
        positions = (self.real.long().cumsum(0) - 1).masked_fill(~self.real, 1)
        self.cos, self.sin = lm.model.model.rotary_emb(lm.embed(self.ids), positions[None])
        none = torch.empty(0)
        self.k, self.v, self.h, self.s = ([none] * lm.layers for _ in range(4))
        self.has = torch.zeros(lm.layers, len(self.real), dtype=torch.bool)
        self.calls: list[Call] = []
        self.committed: set[int] = set()
        self.window: list[int] = []

    def layer(self, i: int, h: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Layer i on all of h, K and V stored at `rows` alone; its output and S [N, N]."""
        part = self.lm.model.model.layers[i]
        a, x = part.self_attn, part.input_layernorm(h)
        q, k, v = (p(x).view(1, h.shape[1], -1, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
        if hasattr(a, "q_norm"):
            q, k = a.q_norm(q), a.k_norm(k)
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        if self.k[i].numel():
            fresh = torch.zeros(1, h.shape[1], 1, 1, dtype=torch.bool)
            fresh[:, rows] = True
            k, v = torch.where(fresh, k, self.k[i]), torch.where(fresh, v, self.v[i])
        self.k[i], self.v[i] = k, v
        groups = q.shape[2] // k.shape[2]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(groups, 2)) * a.head_dim**-0.5
        weights = scores.masked_fill(~self.real, -torch.inf).softmax(-1)
        h = h + a.o_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(groups, 2)).flatten(2))
        h = h + part.mlp(part.post_attention_layernorm(h))
        return h, (weights.mean(1) if self.o.heads == "mean" else weights.amax(1))[0]

    def keep(self, i: int, h: Tensor, attention: Tensor, rows: list[int], voters: list[int]) -> None:
        """Store H and S at `rows`; pick the tokens that `voters` attend most."""
        for store, new, dim in ((self.h, h, 1), (self.s, attention, 0)):
            held = store[i].clone() if store[i].numel() else torch.zeros_like(new)
            store[i] = held.index_copy(dim, torch.tensor(rows), new.index_select(dim, torch.tensor(rows)))
        self.has[i, rows] = True
        decided = (~self.masked & self.real).nonzero()[:, 0].tolist()
        score = attention[voters].sum(0).tolist()
        self.calls[-1].tracked.append(set(sorted(decided, key=lambda p: -score[p])[: self.o.track]))

    def sigma(self, before: Tensor, now: Tensor, has: Tensor, tracked: set[int]) -> float:
        rows = [p for p in sorted(tracked) if has[p]]
        if not rows:
            return 1.0
        a, b = (before[rows], now[rows]) if self.o.sigma == "rows" else (before[rows].flatten(), now[rows].flatten())
        return float(torch.cosine_similarity(a, b, dim=-1).mean())

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The next call: logits [N, V] of the tokens at their own positions."""
        o, L, everything = self.o, self.lm.layers, list(range(len(self.real)))
        window = self.masked.nonzero()[: o.beta, 0].tolist()
        late = o.query == "previous" and bool(self.calls)
        asked = self.window if late else window
        self.window = window
        shift = int(self.lm.shift)
        embedded: Tensor = self.lm.embed(self.ids)
        if not self.calls:
            self.calls.append(Call(set(everything), 0))
            h = embedded
            for i in range(L):
                given = h
                h, attention = self.layer(i, h, everything)
                self.keep(i, given, attention, everything, window)
        else:
            tracked = set().union(*self.calls[-1].tracked)
            query = tracked | self.committed | set(asked) | {p - shift for p in asked}
            h = self.partial(embedded, sorted(query), tracked, asked)
        logits: Tensor = self.lm.model.lm_head(self.lm.model.model.norm(h))[0].roll(shift, 0)
        return logits.double()

    def commit(self, logits: Tensor) -> None:
        """Decide all tokens of probability ε in the window, at least the most probable."""
        made, shift = self.calls[-1], int(self.lm.shift)
        tokens = logits.index_fill(1, torch.tensor([self.lm.mask_id]), -torch.inf).argmax(-1)
        p = logits.softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        able = [x for x in self.window if made.lstar < self.lm.layers or x - shift in made.query]
        chosen = [x for x in able if p[x] >= self.o.eps] or sorted(able, key=lambda x: -p[x])[:1]
        self.ids[0, chosen], self.masked[chosen], self.committed = tokens[chosen], False, set(chosen)

    def partial(self, h: Tensor, query: list[int], tracked: set[int], asked: list[int]) -> Tensor:
        o, L = self.o, self.lm.layers
        before, has = [x.clone() for x in self.s], self.has.clone()
        if o.unseen == "skip":
            self.has[:] = False
        self.calls.append(made := Call(set(query), L))
        furthest = max([*self.window, *(~self.masked).nonzero()[:, 0].tolist()]) + 1 - self.prompt
        end = self.prompt + -(-furthest // o.mask_block) * o.mask_block if o.far_tail == "keep" else len(self.real)
        reach = list(range(min(end, len(self.real))))
        for i in range(L):
            rows = query if i < made.lstar else reach
            held = self.h[i].clone()  # all other rows are never looked at while reusing
            held[:, rows] = h[:, rows]
            h, attention = self.layer(i, held, rows)
            self.keep(i, held, attention, rows, asked)
            if i >= made.lstar:
                made.sigma.append(NO_TEST)
                continue
            made.sigma.append(self.sigma(before[i], attention, has[i], tracked))
            if made.sigma[-1] < o.gamma and made.lstar == L and i + 1 < L:
                made.lstar = i + 1
                mixed = self.h[i + 1].clone()  # stored inputs, and fresh rows Q
                mixed[:, query] = h[:, query]
                h = mixed
        return h

    def go(self) -> Tensor:
        while bool(self.masked.any()):
            self.commit(self.compute())
        return self.ids
