"""CAKE: one budget sliced among layers by how dispersed and how restless their attention is.

"CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", ICLR 2025, https://arxiv.org/abs/2503.12491.

After the prompt, from the weights A of its last w queries (float32; columns before the window, not renormalised):
dispersion H = -sum A log A, shift V = sum of the variance of A over the rows, preference P = H^(1/tau1) V^(1/tau2). The
layers together hold T = (c - w) L tokens before the window, layer l the share P_l / sum P of them, made whole under the
cap S - w. Within a layer and KV head the tokens of the highest mean(A) + gamma var(A) stay, pooled over neighbours,
then averaged over the query heads, and the last w tokens. The cascade re-slices T after every layer among the layers
done so far and evicts from all of them again, so a prefill never holds more than T + w L tokens and one full layer.
Nothing is evicted when S <= c + w. While decoding, a layer holds its budget and the window: the token that the newest
query attends to least, pooled in the same way, leaves.

Where paper and released code differ or the code is silent, these are the defaults and the options: `repair="released"`
is the code's single redistribution, which may leave a part of T unused when preferences are far apart; "water_filling"
repeats it. `decode_order="positional"` pools over neighbours in the text while decoding; "released" pools over the
order in which top-k left the tokens, highest first, as the code does. `coupled=False` slices each row of a batch by its
own preference; True sums over the batch as the code does. A budget given as a share or in bytes that comes to fewer
tokens than the window holds the window. If V is 0 in every layer, budgets are even (inferred). Later turns, which the
code does not know, are sliced like prompts of the tokens held and the new ones; a turn shorter than the window changes
no budget and evicts as a step does (inferred). `tau1` and `tau2` are tuned per model: `preset` takes the published
values of the cache size that is nearest to the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elision.errors import OptionError
from elision.kv.actions import Evict
from elision.kv.method import EvictingMethod, KVHost
from elision.kv.ordered import PooledLastRow
from elision.kv.parts import Call, Keep, Rule
from elision.kv.scorers import Window, pool
from elision.kv.slicing import one_if_equal, per_row, real_slots, shares, single_round, slot_order, water_filling
from elision.kv.store import LayerStore
from elision.method import Paper, option, register

TAUS: Mapping[str, Mapping[int, tuple[float, float]]] = {  # published (tau1, tau2) by model and cache size
    "llama-3.1-8b": {1024: (1.6, 0.4), 128: (1.6, 0.6)},
    "llama-2-7b": {1024: (1.9, 1.8), 128: (0.9, 2.3)},
    "llama-2-13b": {1024: (0.5, 0.4), 128: (1.8, 2.0)},
    "mistral-0.3-7b": {1024: (0.8, 0.5), 128: (1.0, 0.8)},
    "qwen2.5-7b": {1024: (1.5, 0.6), 128: (0.4, 0.6)},
}


@register
@dataclass(frozen=True)
class CAKE(EvictingMethod):
    """Slice one budget among layers by their attention, and keep what the prompt's last queries attend to."""

    name: ClassVar[str] = "cake"
    description: ClassVar[str] = "slices one budget among layers by dispersion and shift of attention, in a cascade"
    paper: ClassVar[Paper] = Paper(
        "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences",
        "ICLR 2025",
        "https://arxiv.org/abs/2503.12491",
    )

    window: int = option(32, "last queries of the prompt that observe it; their tokens always stay", ge=2)
    gamma: float = option(200.0, "weight of the variance beside the mean in what a token is worth", ge=0)
    kernel: int = option(5, "tokens that scores are averaged over; 1 turns pooling off", ge=1)
    tau1: float | None = option(None, "temperature of the dispersion; 1 if neither this nor a preset is given", gt=0)
    tau2: float | None = option(None, "temperature of the shift; 1 if neither this nor a preset is given", gt=0)
    preset: str | None = option(None, "published temperatures of a model", choices=(None, *TAUS))
    schedule: str = option("cascading", "when layers are cut", choices=("cascading", "one_shot"))
    repair: str = option("released", "how shares are made whole", choices=("released", "water_filling"))
    decode_order: str = option(
        "positional", "whose neighbours are pooled while decoding", choices=("positional", "released")
    )
    coupled: bool = option(False, "one preference for all rows of a batch instead of one for each")
    cache_size: int | None = option(None, "the paper's name of `budget` in tokens", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_size is not None:
            if self.budget not in (1024, self.cache_size):
                raise OptionError(
                    f"{self.name}: budget={self.budget!r} and cache_size={self.cache_size} differ: give one"
                )
            object.__setattr__(self, "budget", self.cache_size)
        if type(self.budget) is int and self.budget < self.window:
            raise OptionError(
                f"{self.name}: budget={self.budget} tokens is smaller than window={self.window}, which always stays: "
                "raise the budget or shrink the window"
            )
        if self.preset is not None and type(self.budget) is not int:
            raise OptionError(
                f"{self.name}: preset={self.preset!r} is published by cache size: give the budget in tokens, not "
                f"{self.budget!r}, or tau1 and tau2 themselves"
            )

    def taus(self) -> tuple[float, float]:
        """The temperatures: given, of the preset at the nearest published cache size, or 1."""
        tau1 = tau2 = 1.0
        if self.preset is not None:
            size = float(self.budget)
            published = TAUS[self.preset]
            tau1, tau2 = published[min(published, key=lambda c: abs(math.log(c / size)))]
        return (self.tau1 or tau1), (self.tau2 or tau2)

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """While decoding and after short turns, hold what was sliced; at the end of a prompt, slice; then tidy up."""
        indicator, held = _Indicator(self.window, self), _Held(self)
        released = self.decode_order == "released"
        return [
            Rule(held.due, PooledLastRow(self.window, self.kernel, released, held.of), held, Evict()),
            Rule(_measured, indicator, _Slices(self), Evict(recent=self.window, order="time")),
            Rule(_complete, _Column(), _Everything(), _Settle(released)),
        ]


@dataclass(frozen=True)
class _Indicator(Window):
    """Preference of the layer, and what its tokens are worth, as a column that is gathered with them."""

    cake: CAKE

    def observe(self, call: Call) -> None:
        super().observe(call)
        if call.phase != "prompt_end":
            return
        state, w = call.store.state, self.rows
        q, valid = state["window"], state["window_valid"]
        rows = per_row(q.shape[2], q) if valid is None else valid.sum(1)
        capacity = per_row(self.cake.tokens(call), q)
        room, long = (capacity - w).clamp(min=0), per_row(call.lengths, q) > capacity + w
        state["room"], state["short"], state["measured"] = room, long & (rows < w), long & (rows == w)
        state["middle"] = torch.where(long, per_row(state.get("middle", room), q), room)
        if bool(state["measured"].any()):
            self._measure(call)
        else:
            state["middle"] = one_if_equal(state["middle"])
            state.pop("window"), state.pop("window_valid")

    def _measure(self, call: Call) -> None:
        store, state, cake = call.store, call.store.state, self.cake
        weights = self.weights(call)[..., : -self.rows]  # [B, G, g, w, n - w]
        variance, mean = torch.var_mean(weights, 3)  # over the rows, unbiased
        dispersion, shift = -(weights * (weights + 1e-10).log()).sum((1, 2, 3, 4)), variance.sum((1, 2, 3))
        if cake.coupled:
            dispersion, shift = ((x * state["measured"]).sum().expand_as(x) for x in (dispersion, shift))
        tau1, tau2 = cake.taus()
        state["preference"] = dispersion.clamp(min=0) ** (1 / tau1) * shift ** (1 / tau2)
        state["cap"] = real_slots(store) - self.rows
        worth = mean + cake.gamma * variance
        order = slot_order(store, newest=self.rows)
        if order is not None:  # neighbours in the text may lie anywhere by now
            order = order[:, :, None].expand_as(worth)
            worth = worth.gather(-1, order)
        worth = pool(worth.flatten(1, 2), cake.kernel).view_as(worth)
        if order is not None:
            worth = torch.empty_like(worth).scatter_(-1, order, worth)
        worth = worth.mean(2)
        store.dense["indicator"] = torch.cat([worth, worth.new_full((*worth.shape[:2], self.rows), torch.inf)], -1)

    def score(self, call: Call, store: LayerStore) -> Tensor:
        return store.dense["indicator"]


def _measured(call: Call) -> bool:
    return call.phase == "prompt_end" and "indicator" in call.store.dense


def _complete(call: Call) -> bool:
    return _measured(call) and call.layer == max(call.book.stores)


@dataclass(frozen=True)
class _Slices:
    """T among the layers seen so far, by preference."""

    cake: CAKE

    def allot(self, call: Call) -> Mapping[int, Keep]:
        stores = call.book.stores
        if self.cake.schedule == "one_shot" and not _complete(call):
            return {}
        seen = [store for layer, store in stores.items() if layer <= call.layer]
        total = call.store.state["room"] * len(stores)
        preference = torch.stack([store.state["preference"] for store in seen], 1)
        cap = torch.stack([store.state["cap"] for store in seen], 1)
        repair = single_round if self.cake.repair == "released" else water_filling
        budgets = repair(shares(preference, total), total, cap).minimum(cap).unbind(1)
        return {store.layer: self._hold(store, budget) for store, budget in zip(seen, budgets, strict=True)}

    def _hold(self, store: LayerStore, budget: Tensor) -> Keep:
        """Remember the budget of a layer; what it may hold, which is everything in rows that are not cut."""
        measured = store.state["measured"]
        store.state["middle"] = torch.where(measured, budget, store.state["middle"])
        return one_if_equal(torch.where(measured, budget + self.cake.window, store.dense.n))


@dataclass(frozen=True)
class _Everything:
    """All layers, whole."""

    def allot(self, call: Call) -> Mapping[int, Keep]:
        return {layer: store.dense.n for layer, store in call.book.stores.items()}


@dataclass(frozen=True)
class _Column:
    """The indicator as it lies in each layer."""

    def observe(self, call: Call) -> None:
        pass

    def score(self, call: Call, store: LayerStore) -> Tensor:
        return store.dense["indicator"]


@dataclass(frozen=True)
class _Settle:
    """Forget what only the cascade needs; for the released order, write down how top-k leaves the tokens."""

    released: bool

    def __call__(self, store: LayerStore, score: Tensor, keep: Keep) -> None:
        state, n = store.state, store.dense.n
        if self.released:
            best = torch.where(score == torch.inf, torch.inf, -score).argsort(dim=-1, stable=True)
            rank = torch.empty_like(score).scatter_(
                -1, best, torch.arange(n, device=score.device).expand_as(best).float()
            )
            before = store.dense["rank"] if "rank" in store.dense else store.positions().float()
            store.dense["rank"] = torch.where(state["measured"][:, None, None], rank, before)
            store.fills["rank"] = torch.inf
        store.dense.drop("indicator")
        state["middle"] = one_if_equal(state["middle"])
        for name in ("room", "short", "measured", "preference", "cap"):
            del state[name]


@dataclass(frozen=True)
class _Held:
    """The layer's slice and its window, while decoding; at the end of a turn, in rows whose turn was short."""

    cake: CAKE

    def of(self, call: Call) -> Keep:
        state = call.store.state
        if "middle" not in state:
            room = self.cake.tokens(call) - self.cake.window
            state["middle"] = room.clamp(min=0) if isinstance(room, Tensor) else max(room, 0)
        keep: Keep = state["middle"] + self.cake.window
        return keep if call.phase == "step" else torch.where(state["short"], keep, call.store.dense.n)

    def due(self, call: Call) -> bool:
        if call.phase == "step":
            keep = self.of(call)
            return isinstance(keep, Tensor) or call.store.dense.n > keep
        return call.phase == "prompt_end" and bool(call.store.state["short"].any())

    def allot(self, call: Call) -> Mapping[int, Keep]:
        return {call.layer: self.of(call)}
