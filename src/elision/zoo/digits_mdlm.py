"""`digits-mdlm`: a masked-diffusion language model in transformers' own `LlamaForCausalLM`, attending both ways.

As in LLaDA, a sequence is a prompt followed by a region of fixed length whose masks are filled in any order; the answer
ends in pads up to the end of that region. The tasks are those of `elision.zoo.digits`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from elision.errors import OptionError
from elision.zoo import _training
from elision.zoo.digits import TASKS, Alphabet, expected, sample

LENGTHS = (64, 128, 256, 512)
CONFIG: dict[str, Any] = {
    "vocab_size": len(Alphabet()),
    "hidden_size": 160,
    "num_hidden_layers": 7,
    "intermediate_size": 448,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": max(LENGTHS),
    "tie_word_embeddings": True,
    "pad_token_id": Alphabet.pad_id,
    "mask_token_id": Alphabet.mask_id,
    "bos_token_id": None,
    "eos_token_id": Alphabet.pad_id,
    "is_causal": False,
}
SHARES = {"chain": 0.22, "add": 0.22, "recall": 0.25, "copy": 0.09, "sort": 0.22}
FIRST = {"chain": 0.12, "add": 0.38, "recall": 0.38, "copy": 0.02, "sort": 0.1}
CURRICULUM: tuple[tuple[float, dict[int, float], dict[str, float]], ...] = (
    # until which part of the training: shares of lengths, shares of tasks
    (0.35, {32: 0.5, 64: 0.5}, FIRST),
    (0.50, {32: 0.1, 64: 0.5, 128: 0.4}, SHARES),
    (1.00, {64: 0.3, 128: 0.3, 256: 0.25, 512: 0.15}, SHARES),
)
GAP = 48  # the answer may seem up to this far from its prompt in training
TAIL, BEYOND = 0.2, 0.1  # weight of the pads behind an answer, of masks far right of the first one


def both_ways(model: nn.Module) -> nn.Module:
    """Let every position of a Llama model attend to every other one; changes the model and returns it."""
    model.config.is_causal = False  # type: ignore[union-attr]  # no causal mask is built
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False  # type: ignore[assignment]  # the attention kernel adds none either
    return model


@dataclass
class DigitsMdlm:
    """The model with what is needed to ask it something.

    Attributes:
        model: `LlamaForCausalLM`, in eval mode; `model(ids).logits` is [B, L, vocabulary], every position sees all.
        alphabet: characters to tokens and back.
    """

    model: LlamaForCausalLM
    alphabet: Alphabet

    @property
    def mask_id(self) -> int:
        """The token that stands for "not known yet"."""
        return self.alphabet.mask_id

    @property
    def pad_id(self) -> int:
        """The token that ends an answer and fills what is left of its region."""
        return self.alphabet.pad_id

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, one per character."""
        return self.alphabet.encode(text)

    def decode(self, tokens: Sequence[int] | Tensor) -> str:
        """Text of tokens up to the first pad."""
        return self.alphabet.decode(tokens.tolist() if isinstance(tokens, Tensor) else tokens)

    def questions(self, task: str, length: int, count: int, seed: int = 0) -> tuple[Tensor, list[int], list[str]]:
        """`count` questions of one task.

        Returns:
            Token rows [count, length] with masks after the prompt, the prompts' lengths, the right answers.
        """
        rng = np.random.default_rng([seed, length, sorted(TASKS).index(task)])
        drawn = [sample(task, length, rng) for _ in range(count)]
        ids = torch.full((count, length), self.mask_id)
        for row, (prompt, _) in zip(ids, drawn, strict=True):
            row[: len(prompt)] = torch.tensor(self.encode(prompt))
        return ids, [len(prompt) for prompt, _ in drawn], [answer for _, answer in drawn]

    def right(self, ids: Tensor) -> list[bool]:
        """Which of the finished rows [B, L] hold the right answer and nothing else."""
        texts = [self.decode(row) for row in ids]
        parts = [text.partition("=") for text in texts]
        return [answer == expected(prompt + "=") for prompt, _, answer in parts]


@torch.no_grad()
def fill(
    model: Callable[..., Any],
    ids: Tensor,
    prompt: Sequence[int],
    *,
    mask_id: int = Alphabet.mask_id,
    block: int = 32,
    per_step: int = 1,
    seen: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Fill the masks of `ids` [B, L] by confidence, block after block, without any cache.

    Args:
        model: called with ids, returns an object with logits [B, L, V].
        ids: token rows; not changed.
        prompt: length of each row's prompt, where its first block begins.
        mask_id: the token to be replaced.
        block: length of the blocks of the answer that are finished one after the other.
        per_step: how many tokens of each row are decided at a time.
        seen: called before each step with the rows and the mask of positions still open.
    """
    if block < 1 or per_step < 1:
        raise OptionError(f"block={block}, per_step={per_step}: both must be at least 1")
    ids, start = ids.clone(), torch.tensor(list(prompt))[:, None]
    place = torch.arange(ids.shape[1])[None]
    while bool((open_ := ids == mask_id).any()):
        if seen is not None:
            seen(ids, open_)
        first = open_.int().argmax(1, keepdim=True)
        end = start + ((first - start) // block + 1) * block
        logits = model(ids).logits.float()
        logits[..., mask_id] = -torch.inf
        confidence, token = logits.softmax(-1).max(-1)
        confidence = confidence.masked_fill(~open_ | (place >= end), -1.0)
        best = confidence.topk(min(per_step, ids.shape[1]), dim=1)
        kept = best.values >= 0
        rows = torch.arange(len(ids))[:, None].expand_as(best.indices)[kept]
        columns = best.indices[kept]
        ids[rows, columns] = token[rows, columns]
    return ids


def batch(
    length: int, rows: int, rng: np.random.Generator, frontier: float = 0.5, tasks: Mapping[str, float] = SHARES
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training rows of one length: noisy tokens, clean tokens, weights of the loss, positions, each [rows, length].

    One part of the rows is noised as in LLaDA: each token of the answer is masked with probability t and
    weighs 1 / t (at most 4: few and heavy tokens add noise). The part `frontier` is noised as it looks when blocks are
    decoded from the left: all is known before a random place, nothing beyond the 8 to 40 characters after it, and those
    are masked with probability t. Positions jump by a random step before `|` and `=` in three rows of four, so that
    the model learns to look items up by their letter and not by their distance, which differs between lengths.
    """
    alphabet, names = Alphabet(), list(tasks)
    clean = torch.full((rows, length), alphabet.pad_id)
    masked, weight = torch.zeros(rows, length, dtype=torch.bool), torch.zeros(rows, length)
    place, position = np.arange(length), torch.arange(length).repeat(rows, 1)
    for row in range(rows):
        name = names[int(rng.choice(len(names), p=list(tasks.values())))]
        prompt, answer = sample(name, length, rng, full=bool(rng.random() < 0.5))
        text = prompt + answer
        clean[row, : len(text)] = torch.tensor(alphabet.encode(text))
        if rng.random() < 0.75:
            for sign in "|=":
                if sign in prompt:
                    position[row, prompt.index(sign) :] += int(rng.integers(min(GAP, (max(LENGTHS) - length) // 2) + 1))
        t = 0.05 + 0.95 * float(rng.random()) ** 1.7
        noise, value = rng.random(length) < t, np.full(length, min(4.0, 1 / t))
        if rng.random() < frontier:
            begin = int(rng.integers(len(prompt), len(text) + 1))
            end = begin + int(rng.integers(8, 41))
            noise = (noise & (place >= begin)) | (place >= end)
            value = np.where(place < end, value, BEYOND)
        value = np.where(place < len(text), value, value * TAIL)
        noise &= place >= len(prompt)
        masked[row] = torch.from_numpy(noise)
        weight[row] = torch.from_numpy(value * noise)
    return clean.masked_fill(masked, alphabet.mask_id), clean, weight, position


def train_model(
    steps: int = 8000,
    tokens: int = 2048,
    lr: float = 2e-3,
    muon: float = 5e-3,
    seed: int = 0,
    begin: float = 0.0,
    half: bool = True,
    config: dict[str, Any] | None = None,
    start: str | Path | None = None,
    keep: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """The recipe of `digits-mdlm`.

    Args:
        steps: optimizer steps.
        tokens: tokens per step; the rows of a step have one length.
        lr: highest learning rate of embeddings and norms.
        muon: highest learning rate of the matrices.
        seed: of weights and data.
        begin: the part of `CURRICULUM` to skip, when going on from weights.
        half: multiply matrices in bfloat16.
        config: changes to `CONFIG`.
        start: a folder of weights to go on from.
        keep: see `_training.fit`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = both_ways(LlamaForCausalLM(LlamaConfig(**{**CONFIG, **(config or {})})))
    _initialise(model)
    if start is not None:
        model = load(Path(start)).model.train()

    def loss(step: int) -> Tensor:
        progress = begin + (1 - begin) * step / steps
        _, lengths, tasks = next(phase for phase in CURRICULUM if progress < phase[0])
        length = int(rng.choice(list(lengths), p=list(lengths.values())))
        noisy, clean, weight, position = batch(length, max(1, tokens // length), rng, tasks=tasks)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(noisy, position_ids=position, use_cache=False).logits
        each = nn.functional.cross_entropy(logits.float().flatten(0, 1), clean.flatten(), reduction="none")
        return (each * weight.flatten()).sum() / weight.sum().clamp(min=1e-6)

    return _training.fit(model, loss, steps=steps, lr=lr, muon=muon, weight_decay=0.05, keep=keep)


def _initialise(model: nn.Module) -> None:
    """Wider than transformers' own: attention that starts out uniform takes long to find anything."""
    depth = 2 * int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            fan = int(weight.shape[1]) * (depth if last else 1)
            std = 0.1 if "embed" in name else math.sqrt(1 / fan)
            nn.init.normal_(weight, std=std)


def load(folder: Path) -> DigitsMdlm:
    """The trained model, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return DigitsMdlm(both_ways(model).eval(), Alphabet())


def train(folder: Path, **options: Any) -> None:
    """Train and write a transformers folder with float16 weights."""
    save(train_model(**options), folder)


def save(model: nn.Module, folder: Path) -> None:
    """Write a copy of the model with float16 weights."""
    halves = {key: value.detach().half() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=halves)  # type: ignore[operator]
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    # Where the weights were loaded from before is left out.
    entries = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
    path.write_text(json.dumps({**entries, "dtype": "float16"}, indent=2) + "\n")


def check(
    digits: DigitsMdlm,
    counts: dict[int, int] | None = None,
    tasks: Sequence[str] = tuple(TASKS),
    per_step: Sequence[int] = (1, 2),
    block: int = 32,
    seed: int = 1,
) -> dict[str, Any]:
    """Share of questions answered exactly right, uncached, by task and total length.

    Args:
        digits: what `load` returns.
        counts: how many questions of each task for each total length.
        tasks: which tasks.
        per_step: numbers of tokens decided at a time.
        block: length of the blocks that are finished one after the other.
        seed: of the questions.
    """
    counts = {64: 100, 256: 40, 512: 16} if counts is None else counts
    numbers: dict[str, Any] = {"block": block, "samples": {str(k): v for k, v in counts.items()}}
    for n in per_step:
        exact: dict[str, dict[str, float]] = {}
        seconds: dict[str, float] = {}
        for length, count in counts.items():
            begun = time.perf_counter()
            for task in tasks:
                ids, prompt, _ = digits.questions(task, length, count, seed)
                right = digits.right(fill(digits.model, ids, prompt, block=block, per_step=n))
                exact.setdefault(task, {})[str(length)] = round(sum(right) / count, 4)
            seconds[str(length)] = round(time.perf_counter() - begun, 1)
        numbers[f"exact_match_{n}_per_step"] = exact
        numbers[f"seconds_{n}_per_step"] = seconds
    numbers["parameters"] = sum(p.numel() for p in digits.model.parameters())
    return numbers
