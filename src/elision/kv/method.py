"""What a KV method is: options, the rules they make, and how keys are kept."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from elision.errors import Conflict, OptionError
from elision.method import Method, option

if TYPE_CHECKING:
    from elision.kv.parts import Call, Keep, Pseudo, Rule
    from elision.kv.store import LayerStore
    from elision.session import Applied

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class KVHost:
    """What rules may know of the model when they are made.

    Attributes:
        layers: indices of the managed layers.
        heads, groups: query heads, and KV heads.
        profile: what `fit` learned, for methods that need it.
        config: the decoder's configuration.
    """

    layers: tuple[int, ...]
    heads: int
    groups: int
    profile: Any = None
    config: Any = None


@dataclass(frozen=True)
class KVMethod(Method):
    """Base of the family. `rules` is asked once per session and returns parts without state of their own."""

    family: ClassVar[str] = "kv"
    raw_keys: ClassVar[bool] = False  # methods that may keep unrotated keys override `raw`
    wants_lse: ClassVar[bool] = False  # whether rules sum columns over long prompts

    @abstractmethod
    def rules(self, host: KVHost) -> Sequence[Rule]:
        """The rules, in the order in which they act."""

    def raw(self) -> bool:
        """Whether keys are kept unrotated and turned to the index of their slot at every step (position rolling)."""
        return False

    def stored(self) -> bool:
        """Whether new tokens are placed behind what the first layer holds, instead of at their true position."""
        return False

    def before(self, store: LayerStore, m: int) -> None:
        """Called before the m tokens of a new prompt enter a layer that holds some already."""

    def pseudo(self) -> Pseudo | None:
        """Rows to put behind every prompt while it is observed."""
        return None

    @classmethod
    def attach(cls, target: Any, methods: Sequence[Method], **settings: Any) -> Applied:
        """Install one method on a transformers model."""
        from elision.kv.engine import KVApplied  # the engine imports transformers

        if len(methods) > 1:
            names = ", ".join(m.name for m in methods)
            raise Conflict(f"{names}: one cache has one method; apply a single one of them")
        given = [k for k in ("steps", "cond", "branches") if settings.pop(k, None)]
        if given:
            raise OptionError(f"{', '.join(given)} belong to diffusion models; {methods[0].name} has no use for them")
        return KVApplied(target, methods[0], **settings)  # type: ignore[arg-type]

    @classmethod
    def targets(cls) -> tuple[str, ...]:
        """Where it works."""
        return ("transformers decoders", "their vision-language models")


@dataclass(frozen=True)
class EvictingMethod(KVMethod):
    """Base of the methods that drop tokens: they share the option `budget`."""

    budget: int | float | str = option(
        1024,
        "what every layer may hold on average: tokens (a whole number), a share of the prompt (above 0, up to 1.0), or "
        "bytes of the whole cache per row ('64MiB')",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.name, "budget", self.budget)

    def tokens(self, call: Call, budget: int | float | str | None = None) -> Keep:
        """Tokens per layer that `budget` (by default the option) stands for at this call."""
        return tokens_of(self.budget if budget is None else budget, call)


def check_budget(method: str, name: str, budget: Any) -> None:
    """Raise unless `budget` is a count of tokens, a share, or a number of bytes as text."""
    if isinstance(budget, str):
        parse_bytes(method, name, budget)
        return
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise OptionError(f"{method}: {name}={budget!r} is no budget: give tokens (512), a share (0.25) or '64MiB'")
    if isinstance(budget, int) and budget < 1:
        raise OptionError(f"{method}: {name}={budget} tokens is out of range; it must be at least 1")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise OptionError(f"{method}: {name}={budget} as a share is out of range; it must be above 0 and at most 1.0")


def parse_bytes(method: str, name: str, text: str) -> int:
    """'64MiB' as a number of bytes."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?i?B)\s*", text)
    if found is None or found[2] not in UNITS:
        raise OptionError(f"{method}: {name}={text!r} is no number of bytes: write for instance '64MiB' or '500KB'")
    return int(float(found[1]) * UNITS[found[2]])


def tokens_of(budget: int | float | str, call: Call) -> Keep:
    """Tokens per layer for each row; shares are of the real tokens seen by now, bytes are of all managed layers."""
    if isinstance(budget, str):
        k, v = call.store.dense["k"], call.store.dense["v"]
        slot = k.shape[1] * (k.shape[3] * k.element_size() + v.shape[3] * v.element_size())
        return max(parse_bytes("budget", "budget", budget) // (slot * len(call.book.stores)), 1)
    if isinstance(budget, int):
        return budget
    if isinstance(call.lengths, Tensor):
        return (call.lengths * budget + 1e-9).to(torch.int64).clamp(min=1)
    return max(int(call.lengths * budget + 1e-9), 1)
