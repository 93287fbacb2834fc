"""Recorded runs of the papers' official code: `tests/data/NAME.json` says what they are, `.safetensors` holds them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """One recorded case."""

    name: str
    options: dict[str, Any]
    expected: dict[str, Any]
    tensors: dict[str, Tensor]
    tolerance: dict[str, float]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]


def cases(slug: str) -> dict[str, Case]:
    """All cases of one system by name."""
    about = json.loads((DATA / f"{slug}.json").read_text())
    tensors = load_file(DATA / f"{slug}.safetensors")
    return {
        c["name"]: Case(
            c["name"],
            c["options"],
            c.get("expected", {}),
            {
                k[len(c["name"]) + 1 :]: v
                for k, v in tensors.items()
                if k.startswith((c["name"] + "/", c["name"] + "."))
            },
            c.get("tolerance", {"rtol": 1e-5, "atol": 1e-6}),
        )
        for c in about["cases"]
    }
