"""PrefixKV: every layer keeps the same share of importance, so layers keep different numbers of tokens.

"PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation", NeurIPS
2025, https://arxiv.org/abs/2412.03409. "Prefix" is the top of a layer's ranking, not the head of the sequence.

Reproduced: a layer scores the S tokens of a prompt by the attention that they received from all rows, averaged over the
heads. `search` looks for the one threshold p at which the layers together drop the share `ratio`, when each keeps its
best tokens up to a cumulative importance of p; counts are then rescaled to meet the share exactly, and forget / S is
the drop ratio of a layer. `elision.fit` averages these ratios over prompts (the aggregation is inferred: the released
files have one list per model and share, the code makes one list per prompt). After a prompt, round(ratio S) tokens of
each layer go, halves to even; the first `start_size` and the last always stay. While decoding, a layer that holds a
whole token more than its share of all tokens seen deletes the entry at its compressed length + `distance` (the middle
of what it held if that is below 1). As in the release, that place may lie among the first `start_size` tokens where
these are several and little else stayed: they are protected when the prompt is cut, not while decoding.

Ratios come from `ratios` (one per managed layer), from the `profile` that `fit` made, or, without either, from this
prompt itself: then layers are cut when the last one is through, and until then all are held in full. A profile has the
budgets 0.1 to 0.9 and the one that `fit` was called with; between two of them ratios are interpolated, which keeps
their mean (inferred). The published ratio files belong to LLaVA-1.5 and are not included.

What differs from the release: the search ends after 50 halvings with the best threshold found, where the released
loop may run forever; counts above what a layer can drop are cut and spread over the others (inferred; the release lets
such a layer keep its protected tokens only); deletion points are set also where nothing was dropped; each row of a
batch has its own length and, without a profile, its own ratios. Inferred, too: a budget in tokens or bytes is kept to
while decoding instead of a share; a prompt too short for its budget gives every layer the same ratio; a later turn
scores by its own rows and counts what is held against all tokens seen.

`position="compressed"` places new tokens at the length of the first layer's cache, as the release does on the library
version that it is pinned to; the default keeps true positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elision.errors import OptionError, ProfileError
from elision.kv.actions import Evict
from elision.kv.fit import made_for, record
from elision.kv.fixed import FixedSlot, Fraction, PromptSums, by_row, held, share_of
from elision.kv.method import EvictingMethod, KVHost
from elision.kv.parts import Call, Keep, Rule, prompt_end, steps
from elision.kv.threshold import search
from elision.method import Paper, option, register
from elision.profile import Profile

DROPS = tuple(i / 10 for i in range(1, 10))


@register
@dataclass(frozen=True)
class PrefixKV(EvictingMethod):
    """Drop from every layer what lies below one common threshold of cumulative importance."""

    name: ClassVar[str] = "prefixkv"
    description: ClassVar[str] = (
        "one threshold of cumulative importance decides how much of the prompt each layer keeps"
    )
    paper: ClassVar[Paper] = Paper(
        "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation",
        "NeurIPS 2025",
        "https://arxiv.org/abs/2412.03409",
    )
    wants_lse: ClassVar[bool] = True

    budget: int | float | str = option(
        0.2,
        "layers hold on average: a share of all tokens seen, tokens, or bytes of the whole cache per row ('64MiB')",
    )
    ratio: float | None = option(
        None, "share of the tokens to drop, instead of the budget (the paper's name)", ge=0, le=1
    )
    ratios: tuple[float, ...] | None = option(None, "drop ratio of every managed layer, instead of a profile")
    start_size: int = option(1, "tokens at the head of the prompt that always stay", ge=0)
    distance: int = option(-25, "deletion point from the end of the compressed prompt; above 0 it is an absolute index")
    tolerance: float = option(5, "tokens in total by which the search may miss the budget", gt=0)
    position: str = option("true", "positions of new tokens", choices=("true", "compressed"))

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [r for r in self.ratios or () if not 0 <= r <= 1]
        if wrong:
            raise OptionError(f"{self.name}: ratios has {wrong[0]!r}; a drop ratio lies between 0 and 1")

    def stored(self) -> bool:
        """Compressed positions are those of the release."""
        return self.position == "compressed"

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """Cut the prompt, layer by layer or all at its end; delete at the fixed point while decoding."""
        evict = Evict(recent=1, first=self.start_size, order="time")
        table = _table(self, host)
        if table is not None:
            first = Rule(prompt_end, PromptSums(), _Known(self, table, host.layers), evict)
        else:

            def through(call: Call) -> bool:
                return prompt_end(call) and call.layer == host.layers[-1]

            first = Rule(through, PromptSums(), _Sample(self), evict)
        return [first, Rule(steps, FixedSlot(), Fraction(), Evict())]

    def drop(self, call: Call) -> tuple[float | Tensor, Keep]:
        """Share of all tokens seen that layers are to be without, on average, and the budget in tokens (0: a share).

        Each is one number, or one per row [B].
        """
        if self.ratio is not None or self.ratios is not None:
            return self.ratio or 0.0, 0
        share, room = share_of(self.budget, call)
        return 1 - share, room

    def plan(self, n: int, seen: int, ratio: float, room: int) -> tuple[int, int, float, int]:
        """After a prompt: how many of n held tokens stay, the deletion point, and what stays from then on.

        That is a share of all tokens, or a number of them.
        """
        stay = min(max(seen - round(ratio * seen), self.protect), n)
        point = self.distance if self.distance > 0 else stay + self.distance
        point = max(point if point >= 1 else stay // 2, 1)
        return (stay, point, 0.0, stay if stay < n else max(room, stay)) if room else (stay, point, 1 - ratio, 0)

    def settle(self, call: Call, layer: int, ratio: float | Tensor, room: Keep) -> Mapping[int, Keep]:
        """Write the plan of one layer down; what it is to hold, if anything has to go."""
        store = call.book.stores[layer]
        n, state = held(store), store.state
        stay, state["point"], state["share"], state["room"] = by_row(self.plan, call, n, call.lengths, ratio, room)
        if bool((n > stay).any() if isinstance(stay, Tensor) else n > stay):
            return {layer: stay}
        state.pop("sums")
        return {}

    def fit(self, target: Any, calls: Sequence[Any], **settings: Any) -> Profile:
        """Drop ratios of every layer, averaged over prompts, for drop shares of 0.1 to 0.9 and for this one.

        Args:
            target: the model.
            calls: prompts: token ids [B, S], keyword arguments of the model, or functions that take it.
            **settings: nothing.
        """
        if settings:
            raise OptionError(f"{', '.join(settings)} belong to diffusion models; {self.name} has no use for them")
        own = self.ratio if self.ratio is not None else 1 - self.budget if isinstance(self.budget, float) else 0.5
        drops = sorted({*DROPS, own} if min(abs(own - d) for d in DROPS) > 1e-6 else DROPS)
        found: list[Tensor] = []
        sums = PromptSums()

        def look(call: Call) -> None:
            sums.observe(call)
            if prompt_end(call) and call.layer == max(call.book.stores):
                for row, seen in enumerate(_lengths(call)):
                    scores = _scores(call, row)
                    found.append(torch.stack([search(scores, d, seen, self.protect, self.tolerance) for d in drops]))

        host = record(target, calls, look)
        if not found:
            raise ProfileError(
                f"{self.name}: no call ran a prompt through the model's cache, so there is nothing to fit"
            )
        ratios = torch.stack(found)  # [prompts, drops, L]
        spread = ratios.std(0, correction=0)
        tensors = {"drops": torch.tensor(drops, dtype=torch.float64), "ratios": ratios.mean(0), "spread": spread}
        return Profile(made_for(self, host), tensors, {"prompts": len(found)})

    @property
    def protect(self) -> int:
        """Tokens that always stay."""
        return self.start_size + 1


def _table(method: PrefixKV, host: KVHost) -> tuple[Tensor, Tensor] | None:
    """Drop shares [n], ascending from 0 to 1, and the ratios of all layers at each [n, L]; None: no such knowledge."""
    if method.ratios is not None:
        if len(method.ratios) != len(host.layers):
            raise OptionError(
                f"{method.name}: ratios has {len(method.ratios)} entries for {len(host.layers)} managed layers: give "
                "one for each"
            )
        same = torch.tensor([method.ratios, method.ratios], dtype=torch.float64)
        return torch.tensor([0.0, 1.0], dtype=torch.float64), same
    if host.profile is None:
        return None
    drops, ratios = (host.profile.tensors.get(name, torch.zeros(0)) for name in ("drops", "ratios"))
    if ratios.shape != (len(drops), len(host.layers)) or not bool(((ratios >= 0) & (ratios <= 1)).all()):
        raise ProfileError(
            f"{method.name}: the profile has ratios {list(ratios.shape)} for {len(drops)} drop shares and "
            f"{len(host.layers)} managed layers; it needs one between 0 and 1 for each: fit one for this model"
        )
    ends = ratios.new_zeros(1), ratios.new_ones(1)
    rows = ratios.new_zeros(1, ratios.shape[1]), ratios.new_ones(1, ratios.shape[1])
    return torch.cat([ends[0], drops, ends[1]]), torch.cat([rows[0], ratios, rows[1]])


@dataclass(frozen=True)
class _Known:
    """Ratios from a table over the drop share."""

    method: PrefixKV
    table: tuple[Tensor, Tensor]
    layers: tuple[int, ...]

    def allot(self, call: Call) -> Mapping[int, Keep]:
        """This layer."""
        share, room = self.method.drop(call)
        drop = torch.as_tensor(share, dtype=torch.float64).cpu()
        drops, ratios = self.table
        mine = ratios[:, self.layers.index(call.layer)]
        after = torch.searchsorted(drops, drop).clamp(1, len(drops) - 1)
        part = (drop - drops[after - 1]) / (drops[after] - drops[after - 1])
        ratio = torch.lerp(mine[after - 1], mine[after], part)
        return self.method.settle(call, call.layer, ratio if ratio.ndim else float(ratio), room)


@dataclass(frozen=True)
class _Sample:
    """Ratios from this prompt: all layers are decided together, each row by itself."""

    method: PrefixKV

    def allot(self, call: Call) -> Mapping[int, Keep]:
        """Every layer."""
        method, lengths = self.method, _lengths(call)
        share, room = method.drop(call)
        drops = share.tolist() if isinstance(share, Tensor) else [share] * len(lengths)
        rows = [
            search(_scores(call, row), drop, seen, method.protect, method.tolerance)
            for row, (seen, drop) in enumerate(zip(lengths, drops, strict=True))
        ]
        ratios = torch.stack(rows)  # [B, L]
        found: dict[int, Keep] = {}
        for i, layer in enumerate(call.book.stores):
            found |= method.settle(call, layer, ratios[:, i] if len(rows) > 1 else float(ratios[0, i]), room)
        return found


def _lengths(call: Call) -> list[int]:
    b = len(call.store.dense["k"])
    return call.lengths.tolist() if isinstance(call.lengths, Tensor) else [call.lengths] * b


def _scores(call: Call, row: int) -> list[Tensor]:
    """Scores of the real tokens that every layer holds, of one row of the batch."""
    scores = []
    for store in call.book.stores.values():
        mine, valid = store.state["sums"][row, 0], store.dense.get("valid")
        scores.append(mine if valid is None else mine[valid[row, 0]])
    return scores
