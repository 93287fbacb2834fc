"""What is compared on: a causal language model with its tokenizer, and how it is talked to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elision.errors import MissingDependency, OptionError, UnknownName, UnsupportedTarget

_MARK = "\u2063"  # stands for the user's words while the chat template is taken apart


@dataclass
class LanguageSubject:
    """A causal language model.

    Attributes:
        name: how results call it.
        model: of transformers.
        tokenizer: its tokenizer; without a chat template prompts are plain text.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = self.model.device
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens of the tokenizer's own."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens included."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def frame(self, first: bool = True) -> tuple[str, str]:
        """What stands before and after the user's words in a conversation: in its first turn, or in a later one.

        The second part of a first turn ends where the assistant begins to speak.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            return ("", "\n") if first else ("\n", "\n")
        talk = [{"role": "user", "content": _MARK}]
        if not first:
            talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK * 2}, *talk]
        text: str = self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        if not first:
            text = text.partition(_MARK * 2)[2]
        before, mark, after = text.partition(_MARK)
        if not mark:
            raise UnsupportedTarget(f"{self.name}: its chat template does not repeat what the user says")
        return before, after

    def tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of equal length as ids [B, S] on the model's device."""
        return torch.tensor([list(row) for row in rows], device=self.device)


def load_language(model: Any) -> LanguageSubject:
    """A subject from a zoo name, a hub id, a local path, a pair (model, tokenizer), or a `LanguageSubject`."""
    if isinstance(model, LanguageSubject):
        return model
    if isinstance(model, tuple):
        return LanguageSubject(type(model[0]).__name__, *model)
    if not isinstance(model, str):
        raise OptionError(f"{type(model).__name__} comes without a tokenizer: give the pair (model, tokenizer)")
    if not Path(model).exists() and "/" not in model:
        return _from_zoo(model)
    # only the last part of a path: results must not tell where files lie
    name = Path(model).resolve().name if Path(model).exists() else model
    return _from_pretrained(name, model)


def _from_zoo(name: str) -> LanguageSubject:
    import importlib

    lm = importlib.import_module("elision.zoo").load(name)
    if not isinstance(lm, tuple):
        raise UnsupportedTarget(f"{name} is no language model: compare kv on 'smollm2', a hub id or a local path")
    return LanguageSubject(name, *lm)


def _from_pretrained(name: str, where: str) -> LanguageSubject:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingDependency("transformers is not installed: pip install 'elision[transformers]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype="auto").eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnknownName(f"{where!r} is neither a zoo model nor a model that can be loaded: {reason}") from error
    return LanguageSubject(name, model.to("cuda") if torch.cuda.is_available() else model, tokenizer)
