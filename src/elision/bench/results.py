"""Result files: JSON lines, the environment first, one record per sample and per finding after it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from elision.bench.environment import environment
from elision.errors import ElisionError

FORMAT = "elision-results-1"


def plain(value: Any) -> Any:
    """Only what JSON can hold: dataclasses become dicts, numbers that are not finite become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write(path: str | Path, kind: str, setting: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> Path:
    """Write a result file and return its path.

    Args:
        path: the file; its folder is made.
        kind: what produced it ("compare", "reproduce").
        setting: what was asked for: model, steps, seeds, ...
        records: each with a `kind` of its own.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "kind": "head",
        "format": FORMAT,
        "what": kind,
        "environment": environment(),
        "setting": plain(setting),
    }
    lines = [json.dumps(plain(record), allow_nan=False) for record in [head, *records]]
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The head and the records of a result file."""
    path = Path(path)
    if not path.exists():
        raise ElisionError(f"no result file at {path}")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ElisionError(f"{path} is not a result file: {error}") from error
    if not lines or not isinstance(lines[0], dict) or lines[0].get("format") != FORMAT:
        raise ElisionError(f"{path} is not a result file of format {FORMAT!r}")
    return lines[0], lines[1:]
