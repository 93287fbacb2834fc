"""Prompts: exact lengths, the answer in its place, the same from the same seed."""

from __future__ import annotations

import dataclasses

import pytest

from elision.bench.kv import tasks, texts
from elision.bench.kv.subject import LanguageSubject, load_language
from elision.errors import OptionError, UnknownName, UnsupportedTarget


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_lengths_are_exact_and_seeds_decide(tiny: LanguageSubject, name: str) -> None:
    task = tasks.TASKS[name]
    for length in (400, 401):
        made = tasks.prompts(task, tiny, length, range(5))
        extra = {len(p.turns[0].ids) - length for p in made}
        assert extra <= {0, 1}  # a space that belongs to the answer's first token
        assert made == tasks.prompts(task, tiny, length, range(5))
        assert len({p.turns[0].ids for p in made}) == 5


@pytest.mark.parametrize("name", ["passkey", "needle", "lines", "variables", "turns"])
def test_the_answer_stands_where_it_is_said_to(tiny: LanguageSubject, name: str) -> None:
    for prompt in tasks.prompts(tasks.TASKS[name], tiny, 480, range(5)):
        ids, answer = prompt.turns[0].ids, tiny.decode(prompt.turns[0].answer).strip()
        assert len(answer) == 5
        assert prompt.where is not None
        assert prompt.depth in tasks.DEPTHS
        first, last = prompt.where
        assert answer in tiny.decode(ids[first:last])
        assert answer not in tiny.decode([*ids[:first], *ids[last:]])


def test_deeper_facts_stand_later(tiny: LanguageSubject) -> None:
    made = [tasks.passkey(tiny, 500, 3, depth) for depth in tasks.DEPTHS]
    starts = [p.where[0] for p in made if p.where]
    assert starts == sorted(starts)
    assert len(set(starts)) > 3


def test_copying_asks_for_a_list_that_was_given(tiny: LanguageSubject) -> None:
    prompt = tasks.copying(tiny, 480, 1, 0.5)
    text, answer = tiny.decode(prompt.turns[0].ids), tiny.decode(prompt.turns[0].answer)
    assert text.count(answer) == 1  # in the list, not as an example
    assert text.count("Copy of List 2:") == 1
    assert len(answer.split()) == 5


def test_later_turns_ask_for_other_facts_of_the_first(tiny: LanguageSubject) -> None:
    prompt = tasks.turns(tiny, 480, 1, 0.5)
    first = tiny.decode(prompt.turns[0].ids)
    assert len(prompt.turns) == 3
    for turn in prompt.turns:
        assert tiny.decode(turn.answer).strip() in first
    assert "<s>user" in tiny.decode(prompt.turns[1].ids)


def test_without_a_chat_template_prompts_are_plain(tiny: LanguageSubject) -> None:
    tokenizer = type(tiny.tokenizer)(tokenizer_object=tiny.tokenizer.backend_tokenizer, eos_token="</s>")
    plain = dataclasses.replace(tiny, tokenizer=tokenizer)
    assert plain.frame() == ("", "\n")
    assert "<s>" not in plain.decode(tasks.turns(plain, 480, 1, 0.5).turns[1].ids)


def test_bad_requests(tiny: LanguageSubject) -> None:
    with pytest.raises(UnknownName, match="did you mean 'passkey'"):
        tasks.choose("pasky")
    with pytest.raises(OptionError, match="at least 96"):
        tasks.prompts(tasks.TASKS["lines"], tiny, 20, [0])
    with pytest.raises(OptionError, match="too short"):
        tasks.needle(tiny, 60, 0, 0.5)
    with pytest.raises(OptionError, match="tokenizer"):
        load_language(tiny.model)
    with pytest.raises(UnknownName, match="zoo model"):
        load_language("smollm3")
    with pytest.raises(UnsupportedTarget, match="no language model"):
        load_language("garments-classifier")
    assert [t.name for t in tasks.choose("lines, passkey,lines")] == ["lines", "passkey"]
    assert len(tasks.choose(None)) == len(tasks.TASKS)


def test_prose_is_prose() -> None:
    assert len(texts.prose()) > 500
    assert all(s.endswith(".") for s in texts.prose())
    assert texts.passage(1) != texts.passage(2)
    assert sorted(texts.passage(1)) == sorted(texts.prose())
