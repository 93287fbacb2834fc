"""The same methods in elision and in kvpress, on the same prompts; see kvpress_compare.sh, which runs the three parts.

prepare   (with elision)  writes model, tokenizer and prompts, and elision's own scores
kvpress   (with kvpress)  scores the same prompts there; imports nothing of elision
join      (with elision)  puts both side by side

Both answer token by token, the answers being given; scored is the mean negative log-likelihood of the answers' tokens
but the first, whether all of them were the likeliest, and seconds of the prompt and of a token. kvpress drops a share
of the tokens of every layer after the prompt; elision's budget is the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

# elision's name and options, kvpress's class and options
SHARED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "snapkv": ("snapkv:window=32,kernel=5", "SnapKVPress", {"window_size": 32, "kernel_size": 5}),
    "knorm": ("knorm:decode=false", "KnormPress", {}),
    "streaming_llm": ("streaming_llm:rolling=false", "StreamingLLMPress", {"n_sink": 4}),
    "tova": ("tova", "TOVAPress", {}),
    "pyramidkv": ("pyramidkv:window=32,kernel=5", "PyramidKVPress", {"window_size": 32, "kernel_size": 5}),
    "random": ("random:decode=false", "RandomPress", {}),
}


def prepare(work: Path, tasks_: str, prompts: int, length: int, budget: float) -> None:
    """Model, prompts, and elision's scores."""
    from elision.bench.kv import measure, tasks
    from elision.bench.kv.lab import method
    from elision.bench.kv.subject import load_language
    from elision.bench.kv.timing import Entry, race

    subject = load_language("smollm2")
    subject.model.save_pretrained(work / "model")
    made = [p for t in tasks.choose(tasks_) for p in tasks.prompts(t, subject, length, range(prompts))]
    made = [p for p in made if len(p.turns) == 1 and p.turns[0].answer]
    texts = [{"task": p.task, "seed": p.seed, "ids": p.turns[0].ids, "answer": p.turns[0].answer} for p in made]
    (work / "prompts.json").write_text(json.dumps({"budget": budget, "prompts": texts}))
    truths = [measure.full(subject, batch) for batch in measure.batches(made, 8)]
    arms = {
        name: method(f"{text}{',' if ':' in text else ':'}budget={budget}") for name, (text, _, _) in SHARED.items()
    }
    times = race(
        subject.model,
        subject.tensor([made[0].turns[0].ids]),
        {"full": Entry(), **{name: Entry(arm) for name, arm in arms.items()}},
        steps=16,
        rounds=3,
    )
    found = []
    for name in ["full", *arms]:
        outcomes = [
            o for t in truths for o in (measure.plain(t) if name == "full" else _trial(subject, arms[name], t)).outcomes
        ]
        found.append(_row("elision", name, [o.nll for o in outcomes], [o.exact or 0.0 for o in outcomes], times[name]))
    (work / "elision.json").write_text(json.dumps(found))


def _trial(subject: Any, arm: Any, truth: Any) -> Any:
    from elision.bench.kv import measure

    return measure.trial(subject, arm, truth)


def _row(library: str, name: str, nll: list[float], exact: list[float], times: Any) -> dict[str, Any]:
    return {
        "library": library,
        "method": name,
        "nll": statistics.fmean(nll),
        "right": statistics.fmean(exact),
        "prompts": len(nll),
        "prefill_seconds": statistics.median(times.prefill),
        "decode_ms": statistics.median(times.decode) * 1000,
    }


@torch.no_grad()
def kvpress(work: Path) -> None:
    """The scores of kvpress on the same prompts."""
    import kvpress as package
    from transformers import AutoModelForCausalLM, DynamicCache

    given = json.loads((work / "prompts.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(work / "model", torch_dtype=torch.float32).eval()
    found = []
    for name in ["full", *SHARED]:
        press = None
        if name != "full":
            _, cls, options = SHARED[name]
            press = getattr(package, cls)(compression_ratio=1 - given["budget"], **options)
        nll, exact, prefill, decode = [], [], [], []
        for prompt in given["prompts"]:
            ids, cache = torch.tensor([prompt["ids"]]), DynamicCache()
            started = time.perf_counter()
            if press is None:
                logits = model(ids, past_key_values=cache).logits[0, -1]
            else:
                with press(model):
                    logits = model(ids, past_key_values=cache).logits[0, -1]
            prefill.append(time.perf_counter() - started)
            losses, right = [], True
            for place, token in enumerate(prompt["answer"]):
                row = logits.log_softmax(-1)
                losses += [-float(row[token])] if place else []
                right = right and int(row.argmax()) == token
                at = torch.tensor([[len(prompt["ids"]) + place]])
                started = time.perf_counter()
                out = model(torch.tensor([[token]]), past_key_values=cache, position_ids=at)
                decode.append(time.perf_counter() - started)
                logits = out.logits[0, -1]
            nll.append(statistics.fmean(losses or [0.0]))
            exact.append(float(right))
        times = argparse.Namespace(prefill=prefill, decode=decode)
        found.append(_row("kvpress", name, nll, exact, times))
    (work / "kvpress.json").write_text(json.dumps(found))


def join(work: Path, out: Path) -> None:
    """Append both to a result file."""
    from elision.bench.environment import environment

    rows = [row for name in ("elision", "kvpress") for row in json.loads((work / f"{name}.json").read_text())]
    for row in sorted(rows, key=lambda r: r["method"]):
        print(json.dumps(row))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps({"environment": {"benchmark": "kvpress_compare", **environment()}, "table": rows}) + "\n")


def main() -> None:
    """One of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "kvpress", "join"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/kvpress_compare.jsonl"))
    parser.add_argument("--tasks", default="passkey,needle,variables")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--budget", type=float, default=0.25)
    given = parser.parse_args()
    if given.part == "prepare":
        prepare(given.work, given.tasks, given.prompts, given.length, given.budget)
    elif given.part == "kvpress":
        kvpress(given.work)
    else:
        join(given.work, given.out)


if __name__ == "__main__":
    main()
