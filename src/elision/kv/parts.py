"""The parts of a method: one managed attention call, and rules of trigger, scorer, budget and action upon it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from elision.kv.book import Book
    from elision.kv.store import LayerStore, MapBatch

Phase = Literal["prompt_chunk", "prompt_end", "step"]
Keep = int | Tensor  # slots to hold: one number, or one per row of the batch [B]
BLOCK = 128  # query rows per block: no score matrix is ever larger than heads x BLOCK x keys


@dataclass(slots=True)
class Call:
    """One attention call of one layer, after the new tokens were stored and the output was computed.

    Attributes:
        store: the layer's tokens; the newest m slots are the tokens of `q` (and `extra` pseudo tokens after them).
        book: the cache that the layer belongs to.
        q: queries [B, Hq, m, D] as they entered the dot product.
        keys: keys as they entered it, [B, G, n, D], in the order of the store's slots; None: read them again.
        first: sequence index of the first new token.
        phase: part of a prompt, its last part, or a decoding step.
        starts: whether this is the first part of a prompt.
        scale, softcap: of the logits.
        valid: which of the new tokens are real, [B, m]; None if all are.
        lengths: real tokens seen by each row including these, [B], or one number where no row is padded.
        lse: log-sum-exp of the logits of every query, [B, Hq, m], where the attention kernel gave it.
        extra: how many of the m rows are pseudo tokens at the end, which leave the store after scoring.
        drafts: how many tokens follow the prompt (guesses of assisted decoding); pseudo rows do not see them.
    """

    store: LayerStore
    book: Book
    q: Tensor
    keys: Tensor | None
    first: int
    phase: Phase
    starts: bool
    scale: float
    softcap: float | None
    valid: Tensor | None
    lengths: Keep
    lse: Tensor | None = None
    extra: int = 0
    drafts: int = 0

    @property
    def m(self) -> int:
        """New tokens of this call, pseudo tokens included."""
        return self.q.shape[2]

    @property
    def layer(self) -> int:
        """Index of the layer in the cache."""
        return self.store.layer

    def head(self, count: int) -> Call:
        """The same call as if only its first `count` tokens had been passed; the rest has left the store by now."""
        gone = self.m - count
        keys = None if self.keys is None or self.store.tiers else self.keys[:, :, : self.keys.shape[2] - gone]
        return dataclasses.replace(
            self,
            q=self.q[:, :, :count],
            keys=keys,
            valid=None if self.valid is None else self.valid[:, :count],
            lse=None if self.lse is None else self.lse[:, :, :count],
            lengths=self.lengths - gone,
        )

    def map_batch(self, f: MapBatch) -> Call:
        """The same call with the rows of its batch reordered."""
        return dataclasses.replace(
            self,
            q=f(self.q),
            keys=None if self.keys is None or self.store.tiers else f(self.keys),
            valid=None if self.valid is None else f(self.valid),
            lse=None if self.lse is None else f(self.lse),
            lengths=f(self.lengths) if isinstance(self.lengths, Tensor) else self.lengths,
        )

    def read(self) -> Tensor:
        """The keys of every slot, [B, G, n, D]."""
        if self.keys is None:
            self.keys = self.store.read(self.book.scratch)[0]
        return self.keys

    def images(self) -> Tensor | None:
        """Which slots stand for a part of an image, [B, G or 1, n]; None where the model has no images."""
        return self.book.image_slots(self.store)

    def probs(self, rows: int, q: Tensor | None = None, q_valid: Tensor | None = None) -> Tensor:
        """Softmax weights of the newest `rows` tokens over every slot: [B, G, g, rows, n], float32.

        The rows' own slots are the newest ones, seen causally. Rows that are padding are all zero. `q` [B, Hq, rows, D]
        and `q_valid` [B, rows] are for rows that were kept from earlier parts of the prompt.
        """
        q = self.q[:, :, self.m - rows :] if q is None else q
        if q_valid is None and self.valid is not None:
            q_valid = self.valid[:, self.m - rows :]
        logits = self._logits(q, self.read())
        n = logits.shape[-1]
        self._hide_future(logits, n - rows)
        if self.extra and self.drafts:
            end = n - self.extra
            logits[..., max(rows - self.extra, 0) :, end - self.drafts : end] = -torch.inf
        weights = logits.softmax(-1)
        return weights if q_valid is None else weights * q_valid[:, None, None, :, None]

    def column_sums(self) -> Tensor:
        """Attention that every slot received from all rows of this call, summed over the rows: [B, Hq, n], float32.

        Computed in blocks of rows, from the kernel's log-sum-exp where there is one.
        """
        keys = self.read()
        b, hq, m, _ = self.q.shape
        n = keys.shape[2]
        sums = torch.zeros(b, hq, n, device=keys.device)
        for start in range(0, m, BLOCK):
            stop = min(start + BLOCK, m)
            seen = n - m + stop  # nothing after the block's last row is visible to it
            logits = self._logits(self.q[:, :, start:stop], keys[:, :, :seen])  # [B, G, g, r, seen]
            self._hide_future(logits, seen - (stop - start))
            if self.lse is None:
                weights = logits.softmax(-1)
            else:
                lse = self.lse[:, :, start:stop].reshape(*logits.shape[:4], 1)
                weights = logits.sub_(lse).exp_()
            if self.valid is not None:
                weights = weights * self.valid[:, None, None, start:stop, None]
            sums[:, :, :seen] += weights.sum(3).reshape(b, hq, seen)
        return sums

    def sums_at(self, q: Tensor, at: Tensor, ok: Tensor | None) -> Tensor:
        """Attention that every slot received from single rows, summed over the rows: [B, Hq, n], float32.

        Args:
            q: [B, Hq, P, D], queries that were kept as they entered the dot product.
            at: [B, P], their sequence indices: each sees the slots up to its own.
            ok: [B, P], which of them count; None if all do.
        """
        keys, columns = self.read(), self.store.positions()
        sums = torch.zeros(*q.shape[:2], keys.shape[2], device=keys.device)
        for start in range(0, q.shape[2], BLOCK):
            block = slice(start, start + BLOCK)
            logits = self._logits(q[:, :, block], keys)  # [B, G, g, r, n]
            ahead = columns[:, :, None] > at[:, None, block, None]  # [B, G or 1, r, n]
            weights = logits.masked_fill_(ahead[:, :, None], -torch.inf).softmax(-1)
            if ok is not None:
                weights = weights * ok[:, None, None, block, None]
            sums += weights.sum(3).view_as(sums)
        return sums

    def grouped(self, per_query_head: Tensor) -> Tensor:
        """[B, Hq, ...] as [B, G, g, ...]: the query heads of every KV head."""
        b, hq = per_query_head.shape[:2]
        g = hq // self.store.dense["k"].shape[1]
        return per_query_head.reshape(b, hq // g, g, *per_query_head.shape[2:])

    def _logits(self, q: Tensor, keys: Tensor) -> Tensor:
        b, g = keys.shape[:2]
        q = q.reshape(b, g, -1, q.shape[-1]) * self.scale  # [B, G, g * rows, D]
        logits = (q @ keys.transpose(-1, -2)).float()
        logits = logits.view(b, g, self.q.shape[1] // g, -1, keys.shape[2])
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        valid = self.store.valid()
        if valid is not None:
            logits.masked_fill_(~valid[:, :, None, None, : keys.shape[2]], torch.finfo(logits.dtype).min)
        return logits

    def _hide_future(self, logits: Tensor, first: int) -> None:
        """Row i sees slots up to `first + i`; the last rows of `logits` are these slots' own queries."""
        rows = logits.shape[-2]
        if rows > 1:
            ahead = torch.ones(rows, rows, dtype=torch.bool, device=logits.device).triu(1)
            logits[..., first:].masked_fill_(ahead, -torch.inf)


class Trigger(Protocol):
    """When a rule acts."""

    def __call__(self, call: Call) -> bool:
        """Whether it is due after this call."""


class Scorer(Protocol):
    """How much every dense slot matters."""

    def observe(self, call: Call) -> None:
        """Told of every call, in order, before any rule acts."""

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """Importance of the dense slots of `store`, [B, G or 1, n]; ties and padding are the action's business."""


class Budget(Protocol):
    """How many slots layers may hold."""

    def allot(self, call: Call) -> Mapping[int, Keep]:
        """Dense slots to hold by layer; layers done earlier in this forward may be cut again."""


class Action(Protocol):
    """What becomes of the rest."""

    def __call__(self, store: LayerStore, score: Tensor, keep: Keep) -> None:
        """Bring the dense slots of `store` down to `keep`."""


@dataclass(frozen=True)
class Rule:
    """Trigger, scorer, budget and action; `None` as trigger never acts and only observes."""

    trigger: Trigger | None
    scorer: Scorer
    budget: Budget
    action: Action

    def act(self, call: Call) -> None:
        """Act if due."""
        if self.trigger is None or not self.trigger(call):
            return
        for layer, keep in self.budget.allot(call).items():
            store = call.book.stores[layer]
            self.action(store, self.scorer.score(call, store), keep)


def prompt_end(call: Call) -> bool:
    """After the last part of a prompt."""
    return call.phase == "prompt_end"


def every_call(call: Call) -> bool:
    """After every forward."""
    del call
    return True


def steps(call: Call) -> bool:
    """After every decoding step."""
    return call.phase == "step"


class Pseudo(Protocol):
    """Rows that are put behind a prompt to observe it, and leave before anything is decoded."""

    @property
    def offset(self) -> int:
        """Positions between the end of the prompt and the first row."""

    def wanted(self, lengths: Keep) -> bool:
        """Whether a prompt of this many real tokens (one number, or [B]) is to be observed at all."""

    def rows(self, prompt: Tensor, valid: Tensor | None, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """The rows [B, count, d].

        Args:
            prompt: the prompt's embeddings [B, S, d].
            valid: which of its tokens are real [B, S]; None if all are.
            embed: the model's embeddings of token ids.
        """
