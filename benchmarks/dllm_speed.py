"""Speed of caches for masked-diffusion language models at length 512, paired in one process.

    python benchmarks/dllm_speed.py --rounds 3 --out results/dllm_speed.jsonl
    python benchmarks/dllm_speed.py --length 64 --rounds 1 --models random     # a quick look

Two models: the zoo's, on written-out sums, and a random one of 12 layers in LLaDA's layout, whose time is mostly that
of its matrices. Every round runs every row once, in rotating order, on a question of its own, one sample at a time and
in a batch. Figures are geometric means over rounds of the ratio to the uncached run of the same round, with 95 %
confidence intervals. Two things are asked: every method is faster than no cache, and Elastic-Cache at least three times
as fast at an exact match within one point. A random model never reaches a threshold, so there every row decides one
token per call.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import elision
from elision import dllm
from elision.bench import stats
from elision.bench.dllm.measure import Arm
from elision.bench.dllm.subject import DllmSubject, Question, load_dllm
from elision.bench.environment import processor
from elision.dllm.checkpoints import from_llada

CONFIG = {
    "model_type": "llada",
    "d_model": 256,
    "n_layers": 12,
    "n_heads": 4,
    "n_kv_heads": 4,
    "mlp_hidden_size": 688,
    "vocab_size": 1024,
    "embedding_size": 1024,
    "mask_token_id": 1023,
    "max_sequence_length": 1024,
    "rope_theta": 500000.0,
    "weight_tying": False,
}
BASE = Arm.of("no_cache")
ROWS = (
    BASE,
    Arm.of("dkv_cache"),
    Arm.of("dkv_cache:variant=prefill"),
    Arm.of("dkv_cache:variant=pd"),
    Arm.of("dkv_cache:variant=greedy,interval=2"),
    Arm.of("elastic_cache_dllm"),
    Arm.of("elastic_cache_dllm:eps=2"),
    Arm.of("fast_dllm"),
    Arm.of("fast_dllm:cache=prefix"),
    Arm.of("fixed_interval:interval=8"),
    Arm.of("fewer_steps:factor=2"),
    Arm.of("no_cache", window=16, threshold=0.9),
)
TOGETHER = Arm.of("elastic_cache_dllm:batch=together")
ELASTIC = ("elastic_cache_dllm", "elastic_cache_dllm:batch=together")


def random_llada() -> DllmSubject:
    """A random model with LLaDA's names and layers, and prompts of half the length."""
    generator = torch.Generator().manual_seed(0)
    width, inner, vocab = CONFIG["d_model"], CONFIG["mlp_hidden_size"], CONFIG["vocab_size"]
    assert isinstance(width, int)
    assert isinstance(inner, int)
    assert isinstance(vocab, int)
    shapes = {f"{part}_proj": (width, width) for part in "qkv"} | {
        "attn_out": (width, width),
        "ff_proj": (inner, width),
        "up_proj": (inner, width),
        "ff_out": (width, inner),
    }
    weights = {"model.transformer.wte.weight": torch.randn(vocab, width, generator=generator)}
    for layer in range(int(str(CONFIG["n_layers"]))):
        for name, shape in shapes.items():
            made = torch.randn(*shape, generator=generator) / shape[1] ** 0.5
            weights[f"model.transformer.blocks.{layer}.{name}.weight"] = made
        for name in ("attn_norm", "ff_norm"):
            weights[f"model.transformer.blocks.{layer}.{name}.weight"] = torch.ones(width)
    weights["model.transformer.ln_f.weight"] = torch.ones(width)
    weights["model.transformer.ff_out.weight"] = torch.randn(vocab, width, generator=generator) / width**0.5
    lm = dllm.masked_lm(from_llada(CONFIG, weights))

    def ask(task: str, length: int, seed: int) -> Question:
        block = min(32, length // 2)
        drawn = torch.randint(vocab - 1, (1, length // 2), generator=torch.Generator().manual_seed(seed))
        return Question(task, length, seed, drawn, length // 2 // block * block, block)

    return DllmSubject("random LLaDA, 12 layers", lm, ask, lambda ids: "", ("random",))


@dataclass
class Line:
    """What one row did in every round."""

    seconds: list[float] = field(default_factory=list)
    token_layers: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    bytes_peak: int = 0


def once(subject: DllmSubject, arm: Arm, questions: Sequence[Question], gen_length: int | None = None) -> Any:
    """One generation of a batch of questions of equal length."""
    first = questions[0]
    asked = arm.settings(first, subject) | ({} if gen_length is None else {"gen_length": gen_length})
    ids: Tensor = torch.cat([q.ids for q in questions])
    return dllm.measure(subject.lm, arm.method, ids, **asked)


def race(subject: DllmSubject, arms: Sequence[Arm], length: int, batch: int, rounds: int) -> dict[Arm, Line]:
    """Every arm once a round, in rotating order."""
    task = "random" if subject.tasks == ("random",) else "chain"
    found = {arm: Line() for arm in arms}
    for turn in range(rounds):
        questions = [subject.question(task, length, turn * batch + i) for i in range(batch)]
        for arm in [*arms[turn % len(arms) :], *arms[: turn % len(arms)]]:
            print(f"  {subject.name}, batch {batch}, round {turn + 1}: {arm.label}", file=sys.stderr, flush=True)
            gc.collect()
            if turn == 0:  # a short run warms up
                once(subject, arm, questions, questions[0].block)
            made, line = once(subject, arm, questions), found[arm]
            line.seconds.append(made.run.seconds)
            line.token_layers.append(made.run.token_layers)
            line.calls.append(made.run.calls)
            line.bytes_peak = max(line.bytes_peak, made.bytes_peak)
            line.exact += [
                float(subject.text(q, row[None]) == q.answer)
                for q, row in zip(questions, made.tokens, strict=True)
                if q.answer is not None
            ]
    return found


def figures(arm: Arm, line: Line, base: Line, tokens: int) -> dict[str, Any]:
    """One row of the table, with the criteria that apply to it."""
    ratio = stats.ratio(base.seconds, line.seconds)
    found: dict[str, Any] = {
        "row": arm.label,
        "seconds": statistics.median(line.seconds),
        "tokens_per_second": tokens / statistics.median(line.seconds),
        "speedup": [ratio.mean, ratio.low, ratio.high],
        "calls": statistics.fmean(line.calls),
        "token_layers": statistics.fmean(line.token_layers),
        "token_layers_fewer": sum(base.token_layers) / sum(line.token_layers),
        "bytes_peak": line.bytes_peak,
    }
    if line.exact:
        found["exact_match"] = statistics.fmean(line.exact)
    if arm != BASE and not arm.method.control:
        found["faster_than_no_cache"] = ratio.mean > 1.0
    if arm.label in ELASTIC:
        lost = statistics.fmean(base.exact) - found["exact_match"] if line.exact else 0.0
        found["at_least_three_times_within_one_point"] = ratio.mean >= 3.0 and lost <= 0.01
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
    parser.add_argument("--models", default="digits-mdlm,random", help="zoo names or paths, and `random`, with commas")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose text contains this (and the uncached one)")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    for name in given.models.split(","):
        subject = random_llada() if name == "random" else load_dllm(name)
        for batch in map(int, given.batches.split(",")):
            arms = [
                arm for arm in (*ROWS, *([TOGETHER] if batch > 1 else [])) if given.only in arm.label or arm == BASE
            ]
            lines = race(subject, arms, given.length, batch, given.rounds)
            tokens = subject.question("random" if name == "random" else "chain", given.length, 0).gen_length * batch
            table = [figures(arm, line, lines[BASE], tokens) for arm, line in lines.items()]
            for row in table:
                print(json.dumps(row))
            setting = {"length": given.length, "rounds": given.rounds, "batch": batch, "tokens": tokens}
            about = {"benchmark": "dllm_speed", "model": subject.name, **setting, **environment()}
            if given.out:
                given.out.parent.mkdir(parents=True, exist_ok=True)
                with given.out.open("a") as file:
                    file.write(json.dumps({"environment": about, "table": table}) + "\n")


if __name__ == "__main__":
    main()
