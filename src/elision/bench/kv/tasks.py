"""Tasks of known answer: a generator per task, seeded, every prompt of exactly the length that was asked for.

Equal lengths let prompts of one task run as one batch without padding. Answers are given to the model word for word;
where they are scored by exact match the model is right if it would have said the same by itself.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from elision.bench.kv import texts
from elision.bench.kv.subject import LanguageSubject
from elision.errors import OptionError, UnknownName

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Turn:
    """What enters before an answer, and the answer: token ids. No answer means what the full cache says."""

    ids: tuple[int, ...]
    answer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One prompt of a task.

    Attributes:
        task: its name.
        seed: what it was drawn by.
        turns: of the conversation, one for most tasks.
        depth: where in the text the answer stands, as a share of its length; None where there is no such place.
        where: index of the first and one behind the last token that hold the answer, if there is such a place.
    """

    task: str
    seed: int
    turns: tuple[Turn, ...]
    depth: float | None = None
    where: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """Lengths of turns and answers: prompts with the same can run as one batch."""
        return tuple((len(turn.ids), len(turn.answer)) for turn in self.turns)


@dataclass(frozen=True)
class Task:
    """A task: how its prompts are made, and what it is.

    Attributes:
        name: its name.
        about: one line.
        make: a prompt from a subject, a length in tokens, a seed and a depth.
        exact: whether there is a right answer; else the full cache's own continuation is what is scored.
        shortest: fewest tokens that a prompt can have.
    """

    name: str
    about: str
    make: Callable[[LanguageSubject, int, int, float], Prompt]
    exact: bool = True
    shortest: int = 96


@dataclass
class _Text:
    """Builds a prompt of an exact length: fixed pieces, and filler that takes up the rest."""

    subject: LanguageSubject
    head: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)

    def fill(self, length: int, filler: Iterator[str], facts: Sequence[tuple[float, str]]) -> tuple[list[int], int]:
        """Ids of head, filler with every fact at its depth, tail; and where the first fact begins.

        Facts are put between whole pieces of filler; the last piece is cut so that the length is exact.
        """
        placed = [(depth, self.subject.encode(text)) for depth, text in facts]
        room = length - len(self.head) - len(self.tail) - sum(len(ids) for _, ids in placed)
        if room < 0:
            raise OptionError(f"length={length} tokens is too short for this task; it needs {length - room}")
        pieces: list[list[int]] = []
        left = room
        while left > 0:
            piece = self.subject.encode(next(filler))[:left]
            if not piece:
                raise OptionError("the tokenizer made nothing of a piece of filler")
            pieces.append(piece)
            left -= len(piece)
        bounds = [0]
        for piece in pieces[:-1]:
            bounds.append(bounds[-1] + len(piece))
        at = [min(bounds, key=functools.partial(_distance, depth * room)) for depth, _ in placed]
        body: list[int] = []
        first, done = 0, 0
        for bound, piece in zip(bounds, pieces, strict=True):
            for fact, (_, ids) in enumerate(placed):
                if at[fact] == bound:
                    first = len(self.head) + len(body) if fact == 0 else first
                    body += ids
                    done += 1
            body += piece
        assert done == len(placed) or not pieces
        if not pieces:
            body = [token for _, ids in placed for token in ids]
            first = len(self.head)
        return [*self.head, *body, *self.tail], first


def _distance(a: float, b: float) -> float:
    return abs(a - b)


def _talk(subject: LanguageSubject, before: str, after: str, reply: str) -> _Text:
    """A first turn: the user says `before`, filler, `after`; the assistant has begun with `reply`."""
    opening, closing = subject.frame()
    return _Text(subject, subject.encode(opening + before), subject.encode(after + closing + reply))


def _answered(subject: LanguageSubject, ids: list[int], text: str) -> Turn:
    """A turn with its answer; a first token of the answer that is nothing but space belongs to what is given."""
    answer = subject.encode(text)
    space = 1 if len(answer) > 1 and not subject.decode(answer[:1]).strip() else 0
    return Turn((*ids, *answer[:space]), tuple(answer[space:]))


def _later(subject: LanguageSubject, question: str, reply: str) -> list[int]:
    opening, closing = subject.frame(first=False)
    return subject.encode(opening + question + closing + reply)


def _prose(seed: int) -> Iterator[str]:
    for sentence in texts.passage(seed):
        yield " " + sentence


def continuation(subject: LanguageSubject, length: int, seed: int, depth: float) -> Prompt:
    """Plain prose; what is scored is how the full cache goes on."""
    del depth
    ids, _ = _Text(subject).fill(length, _prose(seed), [])
    return Prompt("continuation", seed, (Turn(tuple(ids)),))


def passkey(subject: LanguageSubject, length: int, seed: int, depth: float) -> Prompt:
    """One number somewhere in prose."""
    key = texts.digits(random.Random(seed))
    fact = f" The pass key is {key}. Remember it: {key} is the pass key."
    text = _talk(
        subject,
        "There is a pass key hidden in the following text. Find it and memorize it.\n\n",
        "\n\nWhat is the pass key?",
        "The pass key is",
    )
    ids, first = text.fill(length, _prose(seed), [(depth, fact)])
    where = (first, first + len(subject.encode(fact)))
    return Prompt("passkey", seed, (_answered(subject, ids, f" {key}"),), depth, where)


def needle(subject: LanguageSubject, length: int, seed: int, depth: float) -> Prompt:
    """Four numbers of four places in prose; one is asked for."""
    rng = random.Random(seed)
    places = texts.draw(rng, texts.PLACES, 4)
    keys = [texts.digits(rng) for _ in places]
    facts = [f" The special magic number for {place} is {key}." for place, key in zip(places, keys, strict=True)]
    others = [d for d in DEPTHS if abs(d - depth) > 0.05]
    spread = [depth, *rng.sample(others, 3)]
    text = _talk(
        subject,
        "Some special magic numbers are hidden in the following text. Memorize them.\n\n",
        f"\n\nWhat is the special magic number for {places[0]}?",
        f"The special magic number for {places[0]} is",
    )
    ids, first = text.fill(length, _prose(seed), list(zip(spread, facts, strict=True)))
    where = (first, first + len(subject.encode(facts[0])))
    return Prompt("needle", seed, (_answered(subject, ids, f" {keys[0]}"),), depth, where)


def lines(subject: LanguageSubject, length: int, seed: int, depth: float) -> Prompt:
    """Line retrieval: a record of named lines with a number each; one is asked for.

    The usual wording puts the name first ("line apple: REGISTER_CONTENT is ..."). With the name beside the number a
    model of 135 M parameters answers about twice as often.
    """
    rng = random.Random(seed)
    names = texts.draw(rng, texts.WORDS, len(texts.WORDS))
    asked, key = names.pop(), texts.digits(rng)
    fact = f"REGISTER_CONTENT of line {asked} is <{key}>\n"

    def others() -> Iterator[str]:
        for turn in range(1000):
            for name in names:
                shown = name if turn == 0 else f"{name}-{turn}"
                yield f"REGISTER_CONTENT of line {shown} is <{texts.digits(rng)}>\n"

    text = _talk(
        subject,
        "Below is a record of lines that you have to remember.\n",
        f"\nTell me the REGISTER_CONTENT of line {asked}.",
        f"REGISTER_CONTENT of line {asked} is <",
    )
    ids, first = text.fill(length, others(), [(depth, fact)])
    where = (first, first + len(subject.encode(fact)))
    return Prompt("lines", seed, (_answered(subject, ids, key),), depth, where)


def variables(subject: LanguageSubject, length: int, seed: int, depth: float) -> Prompt:
    """Variable tracking: a value, and a variable that is set to the one that holds it; other chains distract."""
    rng = random.Random(seed)
    names = [f"{a}{b}" for a in "ABCDEFGHKM" for b in "PQRSTUVWXY"]
    rng.shuffle(names)
    chains = [(names.pop(), names.pop(), texts.digits(rng)) for _ in range(3)]
    facts = [(rng.choice(DEPTHS), f" VAR {a} = {key}. VAR {b} = {a}, so {b} = {key}.") for a, b, key in chains]
    facts[0] = (depth, facts[0][1])
    name, key = chains[0][1], chains[0][2]
    text = _talk(
        subject,
        "Memorize and track the variables that are set in the following text.\n\n",
        f"\n\nWhat is the value of the variable {name}?",
        f"{name} =",
    )
    ids, first = text.fill(length, _prose(seed), facts)
    where = (first, first + len(subject.encode(facts[0][1])))
    return Prompt("variables", seed, (_answered(subject, ids, f" {key}"),), depth, where)


def copying(subject: LanguageSubject, length: int, seed: int, depth: float) -> Prompt:
    """Few-shot copying: numbered lists of words, some copied as examples; another is to be copied."""
    rng = random.Random(seed)

    def words() -> str:
        return " ".join(texts.draw(rng, texts.WORDS, 6))

    shots = [(f"List {n}", words()) for n in (1, 2, 3)]
    asked, copied = shots[0][0], shots[0][1]
    facts = [(d, f"\n{name}: {text}\n") for d, (name, text) in zip((depth, 0.2, 0.8), shots, strict=True)]
    text = _Text(
        subject,
        subject.encode("Lists of words, and copies of them.\n\n"),
        subject.encode(
            f"\n\nCopy of List 2: {shots[1][1]}\nCopy of List 3: {shots[2][1]}\nCopy of {asked}: {copied.split()[0]}"
        ),
    )
    ids, first = text.fill(length, _prose(seed), facts)
    where = (first, first + len(subject.encode(facts[0][1])))
    answer = " " + " ".join(copied.split()[1:])
    return Prompt("copying", seed, (_answered(subject, ids, answer),), depth, where)


def turns(subject: LanguageSubject, length: int, seed: int, depth: float) -> Prompt:
    """Multi-turn recall: three numbers in prose, asked for one after another, so that later questions find a cache
    that was compressed before they were known."""
    rng = random.Random(seed)
    places = texts.draw(rng, texts.PLACES, 3)
    keys = [texts.digits(rng) for _ in places]
    spread = [depth, *rng.sample([d for d in DEPTHS if abs(d - depth) > 0.05], 2)]
    facts = [f" The special magic number for {place} is {key}." for place, key in zip(places, keys, strict=True)]

    def question(place: str) -> tuple[str, str]:
        return f"What is the special magic number for {place}?", f"The special magic number for {place} is"

    asked, reply = question(places[0])
    text = _talk(
        subject,
        "Some special magic numbers are hidden in the following text. Memorize them.\n\n",
        f"\n\n{asked}",
        reply,
    )
    ids, first = text.fill(length, _prose(seed), list(zip(spread, facts, strict=True)))
    talk = [_answered(subject, ids, f" {keys[0]}")]
    for place, key in zip(places[1:], keys[1:], strict=True):
        talk.append(_answered(subject, _later(subject, *question(place)), f" {key}"))
    return Prompt("turns", seed, tuple(talk), depth, (first, first + len(subject.encode(facts[0]))))


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("continuation", "perplexity of the full cache's own continuation of prose", continuation, exact=False),
        Task("passkey", "one number somewhere in prose", passkey),
        Task("needle", "four numbers of four places in prose, one asked for", needle, shortest=192),
        Task("lines", "line retrieval: a record of named lines, one asked for", lines),
        Task("variables", "variable tracking: a variable set to one that holds a number", variables, shortest=192),
        Task("copying", "few-shot copying of a list of words", copying, shortest=192),
        Task("turns", "multi-turn recall: three numbers, asked for one after another", turns, shortest=192),
    )
}


def choose(names: Sequence[str] | str | None) -> list[Task]:
    """Tasks by name; all of them if none is given."""
    if names is None:
        return list(TASKS.values())
    words = names.replace(",", " ").split() if isinstance(names, str) else [n for x in names for n in x.split(",")]
    unknown = [word for word in words if word not in TASKS]
    if unknown:
        raise UnknownName.of("task", unknown[0], TASKS)
    if not words:
        raise OptionError(f"no task given: name at least one of {', '.join(TASKS)}")
    return [TASKS[word] for word in dict.fromkeys(words)]


def prompts(task: Task, subject: LanguageSubject, length: int, seeds: Sequence[int]) -> list[Prompt]:
    """A prompt per seed; depths go round from one to the next."""
    if length < task.shortest:
        raise OptionError(f"length={length} is out of range; {task.name} needs at least {task.shortest} tokens")
    return [task.make(subject, length, seed, DEPTHS[i % len(DEPTHS)]) for i, seed in enumerate(seeds)]
