"""What caches held and lost, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elision.session import Report, Seconds

if TYPE_CHECKING:
    from elision.hooks.transformers import Attention
    from elision.kv.book import Book
    from elision.kv.method import KVMethod
    from elision.kv.store import LayerStore


@dataclass
class KVReport(Report):
    """Report of a KV method.

    Attributes:
        forwards: calls of the decoder that wrote a cache.
        caches: caches seen.
        tokens_seen: tokens that passed, of the last cache, per row and padding included.
        slots: slots that every managed layer of the last cache holds per head, by layer.
        evicted, demoted, merged: how many slots (per row and KV head) were dropped, packed or merged, by layer.
        images: of a vision-language model, how many image slots every layer of the last cache holds, of how many, by
            layer (all rows, mean over heads).
        bytes_full: bytes that the last cache would hold if nothing had left, without growth buffers.
        error: in shadow mode, mean relative error of the attention output by layer.
    """

    forwards: int = 0
    caches: int = 0
    tokens_seen: int = 0
    slots: dict[int, int] = field(default_factory=dict)
    evicted: dict[int, int] = field(default_factory=dict)
    demoted: dict[int, int] = field(default_factory=dict)
    merged: dict[int, int] = field(default_factory=dict)
    images: dict[int, tuple[float, int]] = field(default_factory=dict)
    bytes_full: int = 0
    error: dict[int, float] = field(default_factory=dict)

    @property
    def saving(self) -> float:
        """How many times smaller the last cache is than the full one."""
        return self.bytes_full / self.bytes_held if self.bytes_held else 1.0

    def __str__(self) -> str:
        held = sum(self.slots.values()) / max(len(self.slots), 1)
        lines = [
            f"{', '.join(self.methods)} on {self.target}",
            f"  {self.tokens_seen} tokens seen, {held:.0f} slots held per layer, on average of {len(self.slots)}",
            f"  {self.bytes_held / 2**20:.2f} MiB held of {self.bytes_full / 2**20:.2f} MiB "
            f"({self.saving:.2f} times smaller), peak {self.bytes_peak / 2**20:.2f} MiB",
            f"  {sum(self.evicted.values())} slots evicted, {sum(self.demoted.values())} packed, "
            f"{sum(self.merged.values())} merged; {self.seconds.deciding:.2f} s deciding of {self.seconds.total:.2f} s",
        ]
        if self.images:
            held, seen = (sum(x) / len(self.images) for x in zip(*self.images.values(), strict=True))
            lines.append(f"  image tokens: {held:.0f} of {seen:.0f} held per layer")
        if self.error:
            mean = sum(self.error.values()) / len(self.error)
            lines.append(f"  attention output differs by {mean:.1%} on average from that over the full cache")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


class Ledger:
    """Counts what happens; holds numbers only, except for the full copies that shadow mode compares with."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.forwards = self.caches = self.seen = self.peak = self.held = self.full = 0
        self.slots: dict[int, int] = {}
        self.lost: dict[int, dict[int, tuple[int, int, int]]] = {}
        self.seconds = Seconds()
        self.images: dict[int, tuple[float, int]] = {}
        self.errors: dict[int, tuple[float, int]] = {}
        self.notes: list[str] = []
        self._known: set[int] = set()
        self._last: int | None = None

    def high(self, book: Book) -> None:
        """Note the most that was held; called when a layer has just grown."""
        self.peak = max(self.peak, book.nbytes)

    def take(self, book: Book, newest: bool = False) -> None:
        """Write down the state of a cache; the numbers of one are those of the last that was written."""
        stores = book.stores
        first = next(iter(stores.values()))
        if not first.seen:
            return
        key = book.number
        self._known.add(key)
        self.caches = len(self._known)
        held = book.nbytes
        self.peak = max(self.peak, held)
        self.lost[key] = {i: (s.evicted, s.demoted, s.merged) for i, s in stores.items()}
        if not newest and key != self._last:
            return
        self._last = key
        self.seen, self.held = first.seen, held
        self.slots = {i: s.n for i, s in stores.items()}
        k, v = first.dense["k"], first.dense["v"]
        self.full = sum(
            len(k) * k.shape[1] * s.seen * (k.shape[3] * k.element_size() + v.shape[3] * v.element_size())
            for s in stores.values()
        )

    def look(self, book: Book) -> None:
        """Count the image tokens that a cache still holds; takes device time, so it is asked for rarely."""
        if book.images is None:
            return
        total = int(book.images.sum())
        for index, store in book.stores.items():
            held, valid = book.image_slots(store), store.valid()
            assert held is not None
            held = held if valid is None else held & valid
            self.images[index] = (float(held.sum()) / held.shape[1], total)

    def compare(self, store: LayerStore, att: Attention, out: Tensor, rows: int) -> None:
        """Shadow mode: the first `rows` queries over every token ever seen (these copies are not in `bytes_held`)."""
        q, k, v = att.q, att.k, att.v
        if att.rotary is not None:
            q, k = att.rotate(q, k, *att.rotary)
        state = store.state
        if "shadow_k" in state:
            k, v = torch.cat([state["shadow_k"], k], 2), torch.cat([state["shadow_v"], v], 2)
        state["shadow_k"], state["shadow_v"] = k, v
        m, n = q.shape[2], k.shape[2]
        mask = torch.ones(m, n, dtype=torch.bool, device=k.device).tril(n - m)[None, None]
        if "pads" in state:
            mask = mask & (torch.arange(n, device=k.device) >= state["pads"])[:, None]
        true = att.run(q, k, v, mask)[0][:, :rows]
        error = float((out[:, :rows] - true).norm() / true.norm().clamp(min=1e-12))
        total, count = self.errors.get(store.layer, (0.0, 0))
        self.errors[store.layer] = (total + error, count + 1)

    def report(self, methods: list[str], target: str) -> KVReport:
        """The numbers so far."""
        lost = [
            {i: sum(book.get(i, (0, 0, 0))[which] for book in self.lost.values()) for i in self.layers}
            for which in range(3)
        ]
        return KVReport(
            methods=methods,
            target=target,
            bytes_held=self.held,
            bytes_peak=self.peak,
            seconds=Seconds(self.seconds.deciding, 0.0, max(self.seconds.computing - self.seconds.deciding, 0.0)),
            notes=list(self.notes),
            forwards=self.forwards,
            caches=self.caches,
            tokens_seen=self.seen,
            slots=dict(self.slots),
            evicted=lost[0],
            demoted=lost[1],
            merged=lost[2],
            images=dict(self.images),
            bytes_full=self.full,
            error={i: total / count for i, (total, count) in self.errors.items()},
        )

    def idle(self, method: KVMethod) -> str:
        """Why nothing was left out, or nothing if something was."""
        if any(sum(counts) for book in self.lost.values() for counts in book.values()):
            return ""
        if not self.forwards:
            return "no forward of the model wrote a cache (was it called, and with use_cache?)"
        budget: Any = getattr(method, "budget", None)
        most = max(self.slots.values(), default=0)
        limit = "" if budget is None else f", and its budget is {budget!r}"
        return f"the longest of {self.caches} cache(s) reached {most} tokens{limit}"
