"""Layer-shared selection: what Elastic Cache is compared with, one set of tokens for all layers.

The baselines "H2O" and "Local" in the code of "Efficient Inference of Vision Instruction-Following Models with Elastic
Cache", https://arxiv.org/abs/2407.18121. They share its budget: forget = int(S - S (1 - ratio)) after a prompt, and one
token whenever the cache holds a whole token more than the share 1 - ratio of all tokens seen.

`kind="local"`: the first `start_size` and the newest tokens stay. `kind="h2o"`: one score per token, the attention that
it received so far averaged over all heads and layers; forget + 1 tokens leave after the prompt, and the lowest of all
but the first `start_size` and the newest at a step. (For H2O itself see `h2o`: sets per layer and head.)

`mode="released"` (default, since published figures are of it): the prompt's selection tests the sorting permutation
instead of ranks and protects no head, and scores stay where they were when the prompt is cut, so that those of decoding
are added to the wrong tokens. `mode="paper"` uses ranks, protects the head and moves scores along; those of tokens
that `crop` takes back go with them. A cache that was filled elsewhere is not cut before its next prompt, which is the
first to say how much there is to hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from elision.kv.actions import Evict
from elision.kv.fixed import FixedSlot, Fraction, by_row, held, overdue, share_of
from elision.kv.method import EvictingMethod, KVHost
from elision.kv.parts import Call, Keep, Rule, prompt_end, steps
from elision.kv.scorers import reduce_group
from elision.kv.store import LayerStore
from elision.method import Paper, option, register


@register
@dataclass(frozen=True)
class LayerShared(EvictingMethod):
    """Keep the same tokens in every layer: heavy hitters, or the newest."""

    name: ClassVar[str] = "layer_shared"
    description: ClassVar[str] = (
        "one set of heavy hitters, or of newest tokens, for all layers (Elastic Cache's baselines)"
    )
    paper: ClassVar[Paper] = Paper(
        "Efficient Inference of Vision Instruction-Following Models with Elastic Cache",
        "ECCV 2024",
        "https://arxiv.org/abs/2407.18121",
    )
    control: ClassVar[bool] = True
    wants_lse: ClassVar[bool] = True

    budget: int | float | str = option(
        0.8, "what every layer holds: a share of all tokens seen, tokens, or bytes of the whole cache per row ('64MiB')"
    )
    ratio: float | None = option(None, "share of the tokens to drop, instead of the budget", ge=0, le=1)
    start_size: int = option(1, "tokens at the head of the prompt that stay", ge=0)
    kind: str = option("h2o", "accumulated attention, or nearness", choices=("h2o", "local"))
    mode: str = option("released", "the released code with its defects, or without them", choices=("released", "paper"))

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """Local: layer by layer. H2O: all layers at once, when the last one is through."""
        if self.kind == "local":
            evict, place = Evict(order="time"), FixedSlot()
            return [Rule(prompt_end, place, _Local(self), evict), Rule(steps, place, Fraction(), Evict())]

        def through(call: Call) -> bool:
            return call.layer == max(call.book.stores) and call.phase != "prompt_chunk"

        return [Rule(through, _Verdict(), _Shared(self), Evict())]

    def forget(self, n: int, seen: int, share: float, room: int) -> tuple[int, float]:
        """After a prompt: how many of n held tokens are too many, and the share that grows from then on."""
        return max(int(n - seen * share), 0), 0.0 if room else share

    def start(self, call: Call) -> Keep:
        """Note what every layer holds from this prompt on; how many tokens are too many."""
        share, room = (1 - self.ratio, 0) if self.ratio is not None else share_of(self.budget, call)
        forget, share = by_row(self.forget, call, held(call.store), call.lengths, share, room)
        for store in call.book.stores.values():
            store.state["share"], store.state["room"] = share, room
        found: Keep = forget
        return found


@dataclass(frozen=True)
class _Local:
    """Everything between the head and the newest tokens goes."""

    method: LayerShared

    def allot(self, call: Call) -> Mapping[int, Keep]:
        """This layer."""
        state, n = call.store.state, held(call.store)
        forget, first = self.method.start(call), self.method.start_size
        spare = (n - first).clamp(min=0) if isinstance(n, Tensor) else max(n - first, 0)
        if isinstance(forget, Tensor) or isinstance(spare, Tensor):
            forget = torch.minimum(torch.as_tensor(forget), torch.as_tensor(spare))  # one per row
        else:
            forget = min(forget, spare)
        state["point"] = first
        if not bool((forget > 0).any() if isinstance(forget, Tensor) else forget):
            return {}
        state["due"] = forget
        return {call.layer: n - forget}


@dataclass(frozen=True)
class _Verdict:
    """Attention that slots received in this prompt or step, head mean; what goes is found in the book."""

    def observe(self, call: Call) -> None:
        """Add the parts of a prompt; a step stands alone."""
        state = call.store.state
        sums = reduce_group(call.grouped(call.column_sums()), "all")  # [B, 1, n]
        before = None if call.starts or call.phase == "step" else state.get("sums")
        state["sums"] = (
            sums if before is None else sums + functional.pad(before, (0, sums.shape[-1] - before.shape[-1]))
        )

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """1 for what stays, 0 for what goes, [B, 1, n]; the same in all layers."""
        del store
        verdict: Tensor = call.book.state["verdict"]
        return verdict


@dataclass(frozen=True)
class _Shared:
    """One score for all layers, in the order of time, real tokens first: `book.state["scores"]` [B, W]."""

    method: LayerShared

    def allot(self, call: Call) -> Mapping[int, Keep]:
        """Every layer, if anything has to go."""
        stores, state, n = call.book.stores, call.book.state, held(call.store)
        b = len(call.store.dense["k"])
        places, valid = call.store.positions()[:, 0].expand(b, -1), call.store.valid()
        last = torch.iinfo(places.dtype).max
        order = (places if valid is None else places.masked_fill(~valid[:, 0], last)).argsort(-1)  # [B, slots]
        fresh = torch.stack([s.state.pop("sums")[:, 0] for s in stores.values()]).mean(0).gather(1, order)
        if prompt_end(call):
            scores, stay = fresh, self._prompt(fresh, n, self.method.start(call))
        else:
            scores = self._before(call, state.get("scores", fresh[:, :0]), n)
            wide = max(scores.shape[1], fresh.shape[1])
            scores = functional.pad(scores, (0, wide - scores.shape[1]))
            scores = scores + functional.pad(fresh, (0, wide - fresh.shape[1]))
            stay = self._step(scores, n, overdue(call))[:, : fresh.shape[1]]
        if not (prompt_end(call) and self.method.mode == "released"):
            scores = _without(scores, ~functional.pad(stay, (0, scores.shape[1] - stay.shape[1]), value=True))
        state["scores"] = scores
        count = stay.sum(-1) - (
            order.shape[1] - torch.as_tensor(n, device=stay.device)
        )  # [B]; slots without a token stay
        if bool((count == n).all()):
            return {}
        state["verdict"] = torch.ones_like(fresh).scatter(1, order, stay.to(fresh.dtype))[:, None]
        keep: Keep = count if isinstance(n, Tensor) or bool((count != count[0]).any()) else int(count[0])
        return dict.fromkeys(stores, keep)

    def _before(self, call: Call, scores: Tensor, n: Keep) -> Tensor:
        """Scores [B, W] of what was held before a step; the release lets new tokens have those that lie further on."""
        if self.method.mode == "released":
            return scores
        new = call.m if call.valid is None else call.valid.sum(1)
        known = torch.as_tensor(n - new, device=scores.device).expand(len(scores))[:, None]
        return scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= known, 0.0)

    def _prompt(self, scores: Tensor, n: Keep, forget: Keep) -> Tensor:
        """What stays after a prompt, [B, slots]; slots beyond a row's tokens count as staying."""
        stay = torch.ones_like(scores, dtype=torch.bool)
        released = self.method.mode == "released"
        first = 0 if released else self.method.start_size
        for row in range(len(scores)):
            gone = int(forget[row] if isinstance(forget, Tensor) else forget)
            end = int(n[row] if isinstance(n, Tensor) else n) - 1
            if gone and end > first:
                rank = scores[row, first:end].argsort(stable=True)
                stay[row, first:end] = (rank if released else rank.argsort()) > gone
        return stay

    def _step(self, scores: Tensor, n: Keep, gone: Keep) -> Tensor:
        """What stays after a step, [B, W]: the lowest between the head and the newest token go."""
        place = torch.arange(scores.shape[1], device=scores.device)
        last = torch.as_tensor(n, device=scores.device).expand(len(scores))[:, None] - 1
        may = (place >= self.method.start_size) & (place < last)
        rank = scores.masked_fill(~may, torch.inf).argsort(stable=True).argsort(-1)
        due = torch.as_tensor(gone, device=scores.device).expand(len(scores))[:, None]
        return (rank >= due) | ~may


def _without(scores: Tensor, gone: Tensor) -> Tensor:
    """Scores [B, W] closed up where `gone` [B, W], zero at the end."""
    order = gone.int().argsort(stable=True)
    return scores.masked_fill(gone, 0.0).gather(1, order)
