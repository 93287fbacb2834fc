"""What is compared: a masked-diffusion language model, and questions for it whose answers can be checked."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elision.dllm import MaskedLM, masked_lm
from elision.dllm import load as load_checkpoint
from elision.errors import MissingDependency, OptionError, UnknownName, UnsupportedTarget

TASKS = ("chain", "add", "recall")
_SHORT, _BLOCK, _SHORT_BLOCK = 96, 32, 16  # short questions are decoded in shorter blocks


@dataclass(frozen=True)
class Question:
    """One prompt and how to judge what is generated.

    Attributes:
        task: what it is about.
        length: the length class that was asked for; prompt and generation together are at most this long.
        seed: its number among the questions of its task.
        ids: of the prompt, [1, P].
        gen_length: tokens to generate.
        block: length of the blocks, which divides `gen_length`.
        answer: the right answer as text, None if there is none.
    """

    task: str
    length: int
    seed: int
    ids: Tensor
    gen_length: int
    block: int
    answer: str | None = None

    @property
    def total(self) -> int:
        """N, prompt and generation."""
        return self.ids.shape[1] + self.gen_length


@dataclass
class DllmSubject:
    """A model, its questions and its text.

    Attributes:
        name: what results call it.
        lm: the model.
        ask: makes a question out of a task, a length and a seed.
        decode: token ids as text.
        tasks: the tasks that it has questions of.
    """

    name: str
    lm: MaskedLM
    ask: Callable[[str, int, int], Question]
    decode: Callable[[Sequence[int]], str]
    tasks: tuple[str, ...]
    _asked: dict[tuple[str, int, int], Question] = field(default_factory=dict, repr=False)

    def question(self, task: str, length: int, seed: int) -> Question:
        """One question; the same arguments give the same one."""
        if task not in self.tasks:
            raise UnknownName.of("task", task, self.tasks)
        key = (task, length, seed)
        if key not in self._asked:
            self._asked[key] = self.ask(*key)
        return self._asked[key]

    def text(self, question: Question, tokens: Tensor) -> str:
        """What was generated, of tokens [1, N]."""
        return self.decode(tokens[0, question.ids.shape[1] :].tolist())

    @property
    def flops_per_row(self) -> int:
        """Operations of one row in one layer without its attention: two for each weight of the layer's matrices."""
        block = self.lm.blocks[0]
        matrices = [block.q, block.k, block.v, block.o, *block.mlp.modules()]
        weights = [getattr(module, "weight", None) for module in matrices]
        return 2 * sum(weight.numel() for weight in weights if isinstance(weight, Tensor))

    def flops(self, token_layers: int, head_rows: int, total: int) -> int:
        """Operations of a run: rows through layers, each attending to `total` keys, and rows through the head."""
        attention = 4 * total * self.lm.heads * self.lm.head_dim
        return token_layers * (self.flops_per_row + attention) + head_rows * 2 * self.lm.vocab * self.lm.width


def load_dllm(model: Any = "digits-mdlm", prompts: Sequence[str] | Sequence[Tensor] | None = None) -> DllmSubject:
    """A subject from a zoo name, a folder, a hub id, a model object, or a `DllmSubject`.

    Args:
        model: what to compare on.
        prompts: texts (or token ids [P], for a model object) to continue, for models other than the zoo's: those have
            no questions of their own, so methods are judged by agreement with the uncached run alone.
    """
    if isinstance(model, DllmSubject):
        return model
    if type(model).__name__ == "DigitsMdlm":
        return digits_subject("digits-mdlm", model)
    if not isinstance(model, str):
        return _given(type(getattr(model, "model", model)).__name__, masked_lm(model), prompts)
    if not Path(model).exists() and "/" not in model:
        return _from_zoo(model)
    # only the last part of a path: results must not tell where files lie
    name = Path(model).resolve().name if Path(model).exists() else model
    if _holds_digits(model):
        return digits_subject(name, importlib.import_module("elision.zoo").load("digits-mdlm", folder=model))
    return _from_pretrained(name, model, prompts)


def _from_zoo(name: str) -> DllmSubject:
    found = importlib.import_module("elision.zoo").load(name)
    if type(found).__name__ != "DigitsMdlm":
        raise UnsupportedTarget(f"{name} is no masked-diffusion language model: compare dllm on 'digits-mdlm'")
    return digits_subject(name, found)


def _holds_digits(where: str) -> bool:
    """Whether a folder holds a model as `elision zoo train digits-mdlm` writes it."""
    from elision.zoo.digits import Alphabet

    path = Path(where) / "config.json"
    if not path.is_file():
        return False
    config = json.loads(path.read_text())
    kept = (config.get("model_type"), config.get("vocab_size"), config.get("mask_token_id"))
    return kept == ("llama", len(Alphabet()), Alphabet.mask_id)


def _from_pretrained(name: str, where: str, prompts: Sequence[Any] | None) -> DllmSubject:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependency("transformers is not installed: pip install 'elision[transformers]'") from error
    try:
        lm = load_checkpoint(where)
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnknownName(f"{where!r} is neither a zoo model nor a model that can be loaded: {reason}") from error
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in prompts or ()]
    return _given(name, lm, rows, tokenizer.decode)


def _given(
    name: str,
    lm: MaskedLM,
    prompts: Sequence[Any] | None,
    decode: Callable[[Sequence[int]], str] = lambda ids: " ".join(map(str, ids)),
) -> DllmSubject:
    """A model that only continues prompts."""
    if not prompts:
        raise OptionError(f"{name} has no questions of its own: give prompts")
    rows = list(prompts)

    def ask(task: str, length: int, seed: int) -> Question:
        ids = torch.as_tensor(rows[seed % len(rows)])[None]
        block = _block(length)
        return Question(task, length, seed, ids, length // block * block, block)

    return DllmSubject(name, lm, ask, decode, ("prompt",))


def _block(length: int) -> int:
    return _SHORT_BLOCK if length <= _SHORT else _BLOCK


# -- the zoo's tasks -------------------------------------------------------------------------------------------------


def digits_subject(name: str, digits: Any) -> DllmSubject:
    """The zoo's model with its tasks: as many items as fit, generation in whole blocks up to the length."""
    from elision.zoo import digits as zoo

    known = zoo.TASKS

    def ask(task: str, length: int, seed: int) -> Question:
        if length < 2 * _SHORT_BLOCK:
            raise OptionError(f"length={length} holds no question in whole blocks: at least {2 * _SHORT_BLOCK}")
        block, numbers = _block(length), np.random.default_rng([seed, length, sorted(known).index(task)])
        for items in range(known[task].most(length), 0, -1):
            prompt, answer = known[task](items, numbers)
            room = (length - len(prompt)) // block * block
            if len(answer) <= room:
                return Question(task, length, seed, torch.tensor([digits.encode(prompt)]), room, block, answer)
        raise OptionError(f"length={length} holds no question of {task} in whole blocks of {block}")

    return DllmSubject(name, masked_lm(digits.model), ask, digits.decode, tuple(known))
