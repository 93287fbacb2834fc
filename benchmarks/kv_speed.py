"""Speed of compressed K/V caches on SmolLM2 at a long context, paired in one process.

    python benchmarks/kv_speed.py --rounds 5 --out results/kv_speed.jsonl
    python benchmarks/kv_speed.py --length 512 --rounds 1 --steps 4 --only snapkv     # a quick look

Every eviction method runs at a quarter of the prompt, the packing methods at their published setting. Every round runs
every row once, in rotating order: the whole prompt in one forward, then a number of decoded tokens. Figures are
geometric means over rounds of the ratio to transformers' `DynamicCache` in the same round, with 95 % confidence
intervals. Two things are asked of the eviction methods: a decoded token takes no longer than over the full cache, and
where a window of queries observes the prompt, the prompt takes at most 10 % longer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import elision
from elision.bench.environment import processor
from elision.bench.kv import tasks
from elision.bench.kv.subject import load_language
from elision.bench.kv.timing import Entry, Times, race
from elision.bench.spec import parse
from elision.kv.method import EvictingMethod
from elision.method import find

BUDGET = 0.25
OBSERVERS = ("snapkv", "pyramidkv", "cake", "dapq")  # they look at a window of queries once
PACKING = ("zipcache", "mikv", "uniform_rtn")
BASE = "DynamicCache"


def rows(only: str) -> dict[str, Entry]:
    """The full cache, and every method of the family."""
    found = {BASE: Entry()}
    for row in elision.methods("kv"):
        text = row.name if row.name in PACKING else f"{row.name}:budget={BUDGET}"
        if only in row.name and (row.name in PACKING or issubclass(find(row.name), EvictingMethod)):
            found[text] = Entry(parse(text).method)  # type: ignore[arg-type]
    return found


def line(name: str, times: Times, base: Times) -> dict[str, Any]:
    """One row of the table; a criterion is met if the mean ratio says so."""
    method = name.partition(":")[0]
    prefill, decode = times.prefill_ratio(base), times.decode_ratio(base)
    found: dict[str, Any] = {
        "row": name,
        "prefill_seconds": statistics.median(times.prefill),
        "decode_ms": statistics.median(times.decode) * 1000,
        "prefill_ratio": [prefill.mean, prefill.low, prefill.high],
        "decode_ratio": [decode.mean, decode.low, decode.high],
        "bytes_held": times.bytes_held,
        "bytes_peak": times.bytes_peak,
    }
    if name != BASE and method not in PACKING:
        found["decode_not_slower"] = decode.mean <= 1.0
    if method in OBSERVERS:
        found["prefill_at_most_10_percent_more"] = prefill.mean <= 1.1
    return found


def environment() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "elision": elision.__version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def main() -> None:
    """Run, print, and append to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="zoo name, hub id or local path")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded in every round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    subject = load_language(given.model)
    ids = subject.tensor([tasks.continuation(subject, given.length, 0, 0.5).turns[0].ids])
    entries = rows(given.only)
    times = race(
        subject.model,
        ids,
        entries,
        steps=given.steps,
        rounds=given.rounds,
        told=lambda name: print(f"  {name}", file=sys.stderr, flush=True),
    )
    table = [line(name, times[name], times[BASE]) for name in entries]
    for row in table:
        print(json.dumps(row))
    if given.out:
        setting = {name: getattr(given, name) for name in ("length", "steps", "rounds")}
        about = {"benchmark": "kv_speed", "model": subject.name, "budget": BUDGET, **setting, **environment()}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        with given.out.open("a") as file:
            file.write(json.dumps({"environment": about, "table": table}) + "\n")


if __name__ == "__main__":
    main()
