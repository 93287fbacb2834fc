"""DapQ: throw-away tokens at the positions that follow the prompt say what decoding will look for.

"Where Matters More Than What: Decoding-aligned KV Cache Compression via Position-aware Pseudo Queries",
https://arxiv.org/abs/2603.11564.

Reproduced: N pseudo tokens run through the model behind a prompt of L tokens, at positions L to L + N - 1. They attend
to the prompt and to each other; the prompt does not see them. The score of a prompt token is the attention that it
received from all of them (Eq. 4), per layer and KV head; the best `budget` of all prompt tokens stay (Eq. 5), with no
protected window, no sink, and in the order of time. The pseudo tokens' keys and values leave right after, the next
token is predicted from the prompt's last row, decoding goes on at position L, and nothing more is dropped. A prompt
that fits the budget is not observed at all (budgets in bytes excepted: what they come to is known only afterwards).

There is no official code. Inferred: the mean over the query heads of a KV head (`reduce`), softmax over the prompt and
the pseudo tokens seen, as the model computes it (`normalise="all"`; "prompt" leaves the pseudo tokens out), no pooling
(`kernel=1`). Content: the first `head` and the last `window - head` tokens of the prompt, which may overlap in a short
one; or random tokens of it, a random span of it, or fixed token ids. Random choices depend on the seed and the row's
own length alone. `offset` moves the positions of the pseudo tokens, not what they see: also at positions inside the
prompt they attend to all of it. Where a model has a last position (learned embeddings), or turns the whole prompt
otherwise beyond one (longrope, dynamic), pseudo tokens of a prompt that ends before it do not go past it (inferred);
beyond it, dynamic rotation turns the prompt by the newest position, pseudo tokens included. Learned positions do not
turn queries, so what the paper builds on is not shown for them.

The rows are copies of embeddings, so models that need the ids of their tokens in every layer are out. Layers with a
sliding window are not managed, and pseudo rows see only their window there; models with linear-attention layers are
refused. A prompt in parts is observed in its last one. With guesses of assisted decoding behind the prompt, pseudo rows
take the same positions and do not see the guesses (in sliding layers they do).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elision.errors import OptionError
from elision.kv.actions import Evict
from elision.kv.budgets import Even, at_least
from elision.kv.method import EvictingMethod, KVHost
from elision.kv.parts import Call, Keep, Rule
from elision.kv.scorers import Reduce, pool, reduce_group
from elision.kv.store import LayerStore
from elision.method import Paper, option, register


@register
@dataclass(frozen=True)
class DapQ(EvictingMethod):
    """Keep what pseudo tokens at the first decoding positions attend to."""

    name: ClassVar[str] = "dapq"
    description: ClassVar[str] = "keeps what throw-away tokens at the first decoding positions attend to; once"
    paper: ClassVar[Paper] = Paper(
        "Where Matters More Than What: Decoding-aligned KV Cache Compression via Position-aware Pseudo Queries",
        "arXiv 2026",
        "https://arxiv.org/abs/2603.11564",
    )

    budget: int | float | str = option(
        256, "prompt tokens that every KV head of every layer keeps: tokens, a share of the prompt, or bytes ('64MiB')"
    )
    window: int = option(32, "pseudo tokens (N)", ge=1)
    content: str = option(
        "ends",
        "what they are: both ends of the prompt, random tokens or a span of it, or `ids`",
        choices=("ends", "random", "span", "fixed"),
    )
    head: int = option(4, "how many of them are the prompt's first tokens (m); the rest are its last (n)", ge=0)
    ids: tuple[int, ...] | None = option(None, "token ids of fixed content, repeated or cut to the window")
    seed: int = option(0, "of random content")
    offset: int = option(0, "positions between the end of the prompt and the first pseudo token; may be negative")
    normalise: str = option("all", "what a pseudo row's weights sum to one over", choices=("all", "prompt"))
    reduce: str = option("mean", "how the query heads of a KV head count", choices=("mean", "sum", "max"))
    kernel: int = option(1, "tokens that scores are pooled over; 1 turns pooling off", ge=1)
    pooling: str = option("avg", "kind of pooling", choices=("avg", "max"))
    recent: int = option(
        0, "newest prompt tokens that stay in any case; the budget is at least this, and the paper has none", ge=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.content == "ends" and self.head > self.window:
            raise OptionError(
                f"{self.name}: head={self.head} is more than window={self.window}, of which it is a part: lower it"
            )
        if (self.content == "fixed") != (self.ids is not None) or self.ids == ():
            raise OptionError(
                f"{self.name}: content={self.content!r} with ids={self.ids!r}: fixed content needs token ids, and only "
                "fixed content does; for instance ids=tuple(tokenizer('A sentence.').input_ids)"
            )
        if type(self.budget) is int and self.budget < self.recent:
            raise OptionError(f"{self.name}: budget={self.budget} is smaller than recent={self.recent}, which stays")

    def pseudo(self) -> PseudoTokens:
        """The pseudo tokens."""
        return PseudoTokens(self, self.offset)

    def rules(self, host: KVHost) -> Sequence[Rule]:
        """One: evict as soon as the pseudo tokens have spoken."""
        scorer = FromBehind(self.normalise, self.reduce, self.kernel, self.pooling)  # type: ignore[arg-type]
        return [Rule(_observed, scorer, Even(self._keep), _Prompt(self.recent))]

    def _keep(self, call: Call) -> Keep:
        """Of the prompt what the budget says, and all of the guesses behind it."""
        keep = at_least(self.tokens, self.recent)(dataclasses.replace(call, lengths=call.lengths - call.drafts))
        call.store.state["drafts"] = call.drafts
        return keep + call.drafts


def _observed(call: Call) -> bool:
    return "pseudo" in call.store.state


@dataclass(frozen=True)
class _Prompt:
    """Evict, with the newest tokens of the prompt and what lies behind it protected."""

    recent: int

    def __call__(self, store: LayerStore, score: Tensor, keep: Keep) -> None:
        Evict(self.recent + store.state.pop("drafts"), order="time")(store, score, keep)


@dataclass(frozen=True)
class FromBehind:
    """Weights that slots received from the pseudo rows, summed over them (Eq. 4), per KV head, optionally pooled."""

    normalise: Literal["all", "prompt"] = "all"
    reduce: Reduce = "mean"
    kernel: int = 1
    pooling: Literal["avg", "max"] = "avg"

    def observe(self, call: Call) -> None:
        """Look while the pseudo rows are there."""
        if not call.extra:
            return
        weights = call.probs(call.extra)  # [B, G, g, N, n]
        weights = weights[..., : weights.shape[-1] - call.extra - call.drafts]
        if self.normalise == "prompt":
            weights = weights / weights.sum(-1, keepdim=True)
        score = pool(reduce_group(weights.sum(3), self.reduce), self.kernel, self.pooling)
        guesses = score.new_full((*score.shape[:2], call.drafts), torch.inf)
        call.store.state["pseudo"] = torch.cat([score, guesses], -1)

    def score(self, call: Call, store: LayerStore) -> Tensor:
        """[B, G, n]."""
        del call
        score: Tensor = store.state.pop("pseudo")
        return score


@dataclass(frozen=True)
class PseudoTokens:
    """What runs behind the prompt."""

    method: DapQ
    offset: int

    def wanted(self, lengths: Keep) -> bool:
        """Unless every row fits the budget."""
        longest = int(lengths.max()) if isinstance(lengths, Tensor) else lengths
        budget = self.method.budget
        return longest > budget if isinstance(budget, int) else budget != 1.0

    def rows(self, prompt: Tensor, valid: Tensor | None, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, N, d]; content is taken from each row's real tokens."""
        method, (b, length, d) = self.method, prompt.shape
        if method.ids is not None:
            times = -(-method.window // len(method.ids))
            ids = torch.tensor((method.ids * times)[: method.window], device=prompt.device)
            known = embed.num_embeddings  # type: ignore[attr-defined]
            wrong = [i for i in method.ids if not 0 <= i < known]
            if wrong:
                raise OptionError(f"dapq: ids has {wrong[0]}, but the model knows token ids from 0 to {known - 1}")
            return embed(ids).expand(b, -1, -1)
        starts = [0] * b if valid is None else (length - valid.sum(1)).tolist()
        index = torch.stack([self._places(length - start) + start for start in starts]).to(prompt.device)  # [B, N]
        return prompt.gather(1, index[:, :, None].expand(-1, -1, d))

    def _places(self, length: int) -> Tensor:
        """Which N of `length` prompt tokens are copied."""
        method, count = self.method, self.method.window
        if method.content == "ends":
            last = count - method.head
            first = torch.arange(method.head).clamp(max=length - 1)
            return torch.cat([first, (length - last + torch.arange(last)).clamp(min=0)])
        source = torch.Generator().manual_seed(method.seed)
        if method.content == "random":
            return torch.randint(length, (count,), generator=source)
        start = int(torch.randint(max(length - count, 0) + 1, (1,), generator=source))
        return (start + torch.arange(count)).clamp(max=length - 1)
