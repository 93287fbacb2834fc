"""Drives a method's rules on given queries, keys and values, as the engine does, without a model.

Recorded runs of official code are lists of tensors per layer; this is the shortest way from them to kept sets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from elision.kv.book import Book
from elision.kv.method import KVHost, KVMethod
from elision.kv.parts import Call

DATA = Path(__file__).parents[1] / "data"


class Session:
    """The part of a session that books and rules see."""

    closed = False
    names = "rig"
    target = "tensors"


class Rig:
    """One cache of `method` over `layers` layers with Hq query heads and G KV heads."""

    def __init__(self, method: KVMethod, layers: int = 1, heads: int = 1, groups: int = 1, profile: Any = None) -> None:
        self.rules = tuple(method.rules(KVHost(tuple(range(layers)), heads, groups, profile)))
        self.method = method
        self.book = Book(Session(), list(range(layers)))  # type: ignore[arg-type]

    def feed(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        phase: str = "step",
        *,
        starts: bool | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """One attention call of one layer: q [B, Hq, m, D], k and v [B, G, m, D]; returns the output [B, Hq, m, D]."""
        store, book = self.book.stores[layer], self.book
        m = q.shape[2]
        v = k if v is None else v
        if valid is not None and layer == 0:
            more = (~valid).sum(1)
            book.padding = more if book.padding is None else book.padding + more
        starts = phase == "prompt_end" if starts is None else starts
        if starts and store.seen:
            self.method.before(store, m)
        store.append(k, v, valid)
        call = self.call(layer, q, phase, starts=starts, valid=valid)
        values = store.read(book.scratch)[1]
        weights = call.probs(m)  # [B, G, g, m, n]
        out = (weights.to(values.dtype) @ values[:, :, None]).flatten(1, 2)
        for rule in self.rules:
            rule.scorer.observe(call)
        for rule in self.rules:
            rule.act(call)
        return out

    def call(self, layer: int, q: Tensor, phase: str, *, starts: bool = True, valid: Tensor | None = None) -> Call:
        """The call of the queries q [B, Hq, m, D] of the newest m tokens, which are in the store already."""
        store, book = self.book.stores[layer], self.book
        keys = store.read(book.scratch)[0]
        lengths: Any = store.seen if book.padding is None else store.seen - book.padding
        first = store.seen - q.shape[2]
        return Call(store, book, q, keys, first, phase, starts, q.shape[-1] ** -0.5, None, valid, lengths)  # type: ignore[arg-type]

    def run(self, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> Iterator[list[Tensor]]:
        """All layers of q, k, v [L, B, H, S + T, D]: the prompt, then step by step; yields all outputs."""
        total = q.shape[3]
        for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, total))]:
            part = slice(start, stop)
            phase = "prompt_end" if start == 0 else "step"
            yield [self.feed(i, q[i][:, :, part], k[i][:, :, part], v[i][:, :, part], phase) for i in range(len(q))]

    def kept(self, layer: int = 0) -> Tensor:
        """Positions held, ascending, [B, G or 1, n]; -1 where a row holds fewer."""
        store = self.book.stores[layer]
        positions, valid = store.positions().long(), store.valid()
        return (positions if valid is None else torch.where(valid, positions, -1)).sort(-1).values

    def order(self, layer: int = 0) -> Tensor:
        """Positions held in the order of the slots."""
        return self.book.stores[layer].positions().long()


@dataclass(frozen=True)
class Recorded:
    """A recorded case of official code."""

    name: str
    about: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def options(self) -> dict[str, Any]:
        return self.about.get("options", {})

    @property
    def scalars(self) -> dict[str, Any]:
        return self.about.get("scalars", {})

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]


def recorded(slug: str) -> dict[str, Recorded]:
    """All recorded cases of one system by name."""
    about = json.loads((DATA / f"{slug}.json").read_text())
    tensors = load_file(DATA / f"{slug}.safetensors")
    cases = {}
    for case in about["cases"]:
        mine = {k.removeprefix(case["name"] + "."): t for k, t in tensors.items() if k.startswith(case["name"] + ".")}
        cases[case["name"]] = Recorded(case["name"], case, mine)
    return cases
