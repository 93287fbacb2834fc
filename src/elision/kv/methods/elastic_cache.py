"""Elastic Cache: the prompt's unimportant tokens are merged into the nearest important ones.

"Efficient Inference of Vision Instruction-Following Models with Elastic Cache", ECCV 2024,
https://arxiv.org/abs/2407.18121. (Not the diffusion-language-model paper of a similar name.)

Reproduced: after a prompt of S tokens, every layer scores its tokens by the attention that they received from all rows,
averaged over the heads; forget = int(S - S (1 - ratio)), and the forget + 1 lowest of all tokens but the first
`start_size` and the last are merged: each goes to its nearest anchor, whose key and value become the plain mean over
its bucket, itself included, of the vectors as they are cached (after the rotation). While decoding, a layer that holds
a whole token more than the share 1 - ratio of all tokens seen deletes the entry at S - forget + `distance`.

`mode="paper"` (default) is what the paper says: ranks. `mode="released"` is the released code with its defects, so that
published baselines can be repeated: it compares the sorting permutation with `forget`, reads the merged vectors
`start_size` places too early, deletes token 0 instead of merging when forget is 1 and keeps deleting the first token
while decoding after a prompt of which nothing was merged (forget at most 1), and takes deletion points below
`start_size` as they are (0 deletes the first token; -2 and less count from the end; -1 made its cache double and the
next call fail, which is an error here). The release mixes up the rows of a batch; here rows are apart in both modes. In
paper mode a deletion point below `start_size` is moved up to it. Where no anchor is left (a very high ratio), tokens
are dropped; the release fails there.

Not in the paper (inferred): a budget in tokens or bytes is kept to while decoding, too, instead of a share; a later
turn scores by its own rows, counts what is held against all tokens seen, and merges once more; nearness is measured in
true positions.

`position="compressed"` places new tokens at the length of the first layer's cache, as the release does on the library
version that it is pinned to; the default keeps true positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from elision.errors import ElisionError
from elision.kv.actions import Evict, Merge
from elision.kv.fixed import FixedSlot, Fraction, PromptSums, by_row, held, share_of
from elision.kv.method import EvictingMethod, KVHost
from elision.kv.parts import Call, Keep, Rule, prompt_end, steps
from elision.kv.store import LayerStore
from elision.method import Paper, option, register


@register
@dataclass(frozen=True)
class ElasticCache(EvictingMethod):
    """Merge what the prompt hardly attends to into its neighbours, then delete at a fixed place."""

    name: ClassVar[str] = "elastic_cache"
    description: ClassVar[str] = (
        "merges unimportant prompt tokens into the nearest important ones; fixed-point deletion"
    )
    paper: ClassVar[Paper] = Paper(
        "Efficient Inference of Vision Instruction-Following Models with Elastic Cache",
        "ECCV 2024",
        "https://arxiv.org/abs/2407.18121",
    )
    wants_lse: ClassVar[bool] = True

    budget: int | float | str = option(
        0.8,
        "what every layer holds: a share of all tokens seen, tokens, or bytes of the whole cache per row ('64MiB')",
    )
    ratio: float | None = option(
        None, "share of the tokens to drop, instead of the budget (the paper's name)", ge=0, le=1
    )
    start_size: int = option(1, "tokens at the head of the prompt that always stay", ge=0)
    distance: int = option(-25, "deletion point from the end of the compressed prompt; above 0 it is an absolute index")
    mode: str = option(
        "paper", "ranks as in the paper, or the released code with its defects", choices=("paper", "released")
    )
    merge: bool = option(True, "merge; False drops the same tokens")
    position: str = option("true", "positions of new tokens: true, or compressed", choices=("true", "compressed"))

    def stored(self) -> bool:
        """Compressed positions are those of the release."""
        return self.position == "compressed"

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """Merge once the prompt is through; delete at the fixed point while decoding."""
        released = self.mode == "released"
        return [
            Rule(prompt_end, PromptSums(), _Prompt(self), Merge(self.start_size, self.merge, released)),
            Rule(steps, _Point(), Fraction(), Evict()),
        ]

    def plan(self, n: int, seen: int, share: float, room: int) -> tuple[int, int, float]:
        """After a prompt: how many of n held tokens stay, the deletion point, and the share that grows from then on."""
        forget = max(int(n - seen * share), 0)
        point = self.distance if self.distance > 0 else n - forget + self.distance
        gone = forget + 1 if forget else 0
        if self.mode == "paper":
            point = max(point, self.start_size)
        elif forget <= 1:  # the release sets its deletion point only where it merges
            gone, point = forget, 0
        return n - min(gone, max(n - self.start_size - 1, 0)), point, 0.0 if room else share


@dataclass(frozen=True)
class _Prompt:
    """How much of the prompt stays, and where to delete later."""

    method: ElasticCache

    def allot(self, call: Call) -> Mapping[int, Keep]:
        """This layer."""
        method, store = self.method, call.store
        share, room = (1 - method.ratio, 0) if method.ratio is not None else share_of(method.budget, call)
        n, state = held(store), store.state
        state["room"] = room
        stay, state["point"], state["share"] = by_row(method.plan, call, n, call.lengths, share, room)
        if not bool((n > stay).any() if isinstance(stay, Tensor) else n > stay):
            store.state.pop("sums")
            return {}
        return {call.layer: stay}


@dataclass(frozen=True)
class _Point(FixedSlot):
    """The fixed slot; the one for which the release breaks is an error."""

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """As `FixedSlot`."""
        point = store.state["point"]
        if bool((point == -1).any() if isinstance(point, Tensor) else point == -1):
            raise ElisionError(
                "elastic_cache: the deletion point of this prompt is -1, for which the released code doubles its cache "
                "and fails: use mode='paper', another distance, or a longer prompt"
            )
        return super().score(call, store)
