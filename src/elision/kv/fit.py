"""Profiles of KV methods: how they are learned and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from elision.errors import OptionError, ProfileError
from elision.kv.method import KVHost, KVMethod
from elision.kv.parts import Call, Rule
from elision.kv.store import LayerStore
from elision.profile import Profile, fingerprint

if TYPE_CHECKING:
    from elision.hooks.transformers import Host


def check_profile(method: KVMethod, profile: Any, host: Host, force: bool) -> Profile | None:
    """The profile that `method` needs, loaded and compared with the model.

    Raises:
        ProfileError: it is missing, or given to a method that has none.
        ProfileMismatch: it was made for another model.
    """
    if profile is None:
        if method.needs_profile:
            raise ProfileError(
                f"{method.name} needs a profile: make one with elision.fit(model, {method.name!r}, calls=prompts)"
            )
        return None
    if not isinstance(profile, Profile):
        profile = Profile.load(Path(profile))
    found: Profile = profile
    found.check(made_for(method, host), force)
    return found


def made_for(method: KVMethod, host: Host) -> dict[str, Any]:
    """The fingerprint of a profile of `method` on this model: its decoder, so that heads do not matter."""
    return fingerprint(method.name, host.decoder)


@dataclass(frozen=True)
class _Watcher:
    """A scorer that only looks."""

    seen: Callable[[Call], None]

    def observe(self, call: Call) -> None:
        self.seen(call)

    def score(self, call: Call, store: LayerStore) -> Tensor:
        raise AssertionError("a rule without a trigger asks for no score")


@dataclass(frozen=True)
class _Recorder(KVMethod):
    name: ClassVar[str] = "recorder"
    description: ClassVar[str] = "watches attention"
    wants_lse: ClassVar[bool] = True

    seen: Callable[[Call], None] = field(default=lambda _: None)

    def rules(self, host: KVHost) -> Sequence[Rule]:
        return [Rule(None, _Watcher(self.seen), None, None)]  # type: ignore[arg-type]


def record(model: Any, calls: Sequence[Any], seen: Callable[[Call], None]) -> Host:
    """Run `calls` on `model` with its full cache and show every attention call to `seen`.

    A call is token ids [B, S], keyword arguments of the model, or a function that takes the model.
    """
    from elision.kv.engine import KVApplied

    class Recording(KVApplied):
        """A session that is expected to leave nothing out."""

        def _warn(self) -> None:
            pass

    with torch.no_grad(), Recording(model, _Recorder(seen=seen)) as run:
        for call in calls:
            if callable(call):
                call(model)
            elif isinstance(call, dict) or hasattr(call, "keys"):
                model(**call)
            elif isinstance(call, Tensor):
                model(call)
            else:
                raise OptionError(
                    f"a call to learn from is a {type(call).__name__}: give token ids [B, S], keyword arguments of the "
                    "model (what its tokenizer or processor returns), or a function that takes the model"
                )
        host: Host = run.host
        return host
