"""Tasks with checkable answers for `digits-mdlm`: written-out sums, recall, copying, sorting, over one alphabet.

A task turns a number of items and a generator into a prompt and the only right answer to it. Items carry a letter, and
the answer names the letter again before what belongs to it, so that every written character depends on few others:

    `#a6b7c5=`       running sums modulo 10           `a6+0=06,b7+6=13,c5+3=08,`   (13: the next step adds to 3)
    `+a67b12c30=`    6 + 7 in column a, and so on     `a6+7=13,b1+2=04,c3+0=03,`   (13: digit 3, carry 1)
    `?a427b190|ba=`  values of the keys asked for     `b190,a427,`
    `@k381c902=`     the records again                `k381,c902,`
    `<k381c902=`     the records in order of letters  `c902,k381,`

Columns of an addition run from the least significant one. Letters of the two sums are consecutive from a random one
(Z is followed by a), those of the other tasks are random; none occurs twice.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elision.errors import OptionError, UnknownName

__all__ = ["LETTERS", "TASKS", "Alphabet", "Task", "expected", "sample"]

LETTERS = string.ascii_lowercase + string.ascii_uppercase


class Alphabet:
    """Characters to token numbers and back; number 0 pads the end of an answer, number 1 is the mask."""

    characters = "\0\1" + string.digits + LETTERS + "#+?@<=,|"
    pad_id, mask_id = 0, 1
    _number = {character: i for i, character in enumerate(characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """One number per character; `OptionError` names the first character that is not known."""
        strangers = [character for character in text if character not in self._number]
        if strangers:
            raise OptionError(f"character {strangers[0]!r} is not in the alphabet: {self.characters[2:]}")
        return [self._number[character] for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text up to the first pad; a mask that is left shows as `_`."""
        text = "".join("_" if i == self.mask_id else self.characters[i] for i in tokens)
        return text.split("\0", 1)[0]


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Attributes:
        name: what it is called in cards and results.
        sign: the first character of its prompts.
        draw: writes the body of a prompt with that many items.
        answer: reads the body, computes the right answer.
        most: the most items whose prompt and answer fit into so many characters.
    """

    name: str
    sign: str
    draw: Callable[[int, np.random.Generator], str]
    answer: Callable[[str], str]
    most: Callable[[int], int]

    def __call__(self, items: int, rng: np.random.Generator) -> tuple[str, str]:
        """A prompt and its answer."""
        if not 1 <= items <= len(LETTERS):
            raise OptionError(f"items={items}: a question has 1 to {len(LETTERS)} items, one per letter")
        body = self.draw(items, rng)
        return f"{self.sign}{body}=", self.answer(body)


def _consecutive(items: int, rng: np.random.Generator) -> list[str]:
    start = int(rng.integers(len(LETTERS)))
    return [LETTERS[(start + i) % len(LETTERS)] for i in range(items)]


def _scattered(items: int, rng: np.random.Generator) -> list[str]:
    return [LETTERS[i] for i in rng.permutation(len(LETTERS))[:items]]


def _numbers(items: int, rng: np.random.Generator, places: int) -> list[str]:
    return [f"{value:0{places}d}" for value in rng.integers(10**places, size=items)]


def _join(letters: Sequence[str], numbers: Sequence[str]) -> str:
    return "".join(letter + number for letter, number in zip(letters, numbers, strict=True))


def _split(body: str, places: int) -> list[tuple[str, str]]:
    width = places + 1
    return [(body[i], body[i + 1 : i + width]) for i in range(0, len(body), width)]


def _draw_pairs(items: int, rng: np.random.Generator) -> str:
    return _join(_consecutive(items, rng), _numbers(items, rng, 2))


def _draw_digits(items: int, rng: np.random.Generator) -> str:
    return _join(_consecutive(items, rng), _numbers(items, rng, 1))


def _draw_records(items: int, rng: np.random.Generator) -> str:
    return _join(_scattered(items, rng), _numbers(items, rng, 3))


def _draw_recall(items: int, rng: np.random.Generator) -> str:
    """Three keys in four are asked for."""
    letters = _scattered(items, rng)
    asked = rng.permutation(letters)[: _asked(items)]
    return _join(letters, _numbers(items, rng, 3)) + "|" + "".join(asked)


def _asked(items: int) -> int:
    return max(1, items * 3 // 4)


def _answer_chain(body: str) -> str:
    total, written = 0, []
    for letter, digit in _split(body, 1):
        step = int(digit) + total
        written.append(f"{letter}{digit}+{total}={step:02d},")
        total = step % 10
    return "".join(written)


def _answer_add(body: str) -> str:
    carry, written = 0, []
    for letter, pair in _split(body, 2):
        x, y = pair[0], pair[1]
        column = int(x) + int(y) + carry
        carry = column // 10
        written.append(f"{letter}{x}+{y}={column:02d},")
    return "".join(written)


def _answer_recall(body: str) -> str:
    records, asked = body.split("|")
    value = dict(_split(records, 3))
    return "".join(f"{letter}{value[letter]}," for letter in asked)


def _answer_copy(body: str) -> str:
    return "".join(f"{letter}{number}," for letter, number in _split(body, 3))


def _answer_sort(body: str) -> str:
    records = sorted(_split(body, 3), key=lambda record: LETTERS.index(record[0]))
    return "".join(f"{letter}{number}," for letter, number in records)


def _fits(per_item: int) -> Callable[[int], int]:
    return lambda length: min(len(LETTERS), (length - 2) // per_item)


def _recall_fits(length: int) -> int:
    return max(n for n in range(1, len(LETTERS) + 1) if n == 1 or 4 * n + 6 * _asked(n) + 3 <= length)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("chain", "#", _draw_digits, _answer_chain, _fits(10)),
        Task("add", "+", _draw_pairs, _answer_add, _fits(11)),
        Task("recall", "?", _draw_recall, _answer_recall, _recall_fits),
        Task("copy", "@", _draw_records, _answer_copy, _fits(9)),
        Task("sort", "<", _draw_records, _answer_sort, _fits(9)),
    )
}


def expected(prompt: str) -> str:
    """The right answer to a prompt of any task."""
    for task in TASKS.values():
        if prompt.startswith(task.sign) and prompt.endswith("="):
            return task.answer(prompt[1:-1])
    raise OptionError(f"prompt {prompt!r} begins with no sign of a task or does not end with '='")


def sample(task: str, length: int, rng: np.random.Generator, full: bool = True) -> tuple[str, str]:
    """A question whose prompt and answer have at most `length` characters together.

    Args:
        task: one of `TASKS`.
        length: total length, at least 16.
        rng: source of chance; the same state gives the same question.
        full: as many items as fit; otherwise between half of that and that.
    """
    if task not in TASKS:
        raise UnknownName.of("task", task, TASKS)
    if length < 16:
        raise OptionError(f"length={length} holds no question: at least 16")
    most = TASKS[task].most(length)
    items = most if full else int(rng.integers(max(1, most // 2), most + 1))
    return TASKS[task](items, rng)
