"""`elision compare serving`: category-aware caching against single thresholds, exact matching, GPTCache, no cache.

All systems see the same requests with the same embeddings. Per-category thresholds are fitted on another seed than
the one
they are judged on. A hit is *false* if the stored answer is of another intent, *stale* if it is of the right intent
but no longer true.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from elision.errors import OptionError, UnknownName
from elision.serving.bench.workload import KINDS, VECTOR_KINDS, Ask, Kind, text_workload, texts_of, vector_workload
from elision.serving.semantic.cache import SemanticCache
from elision.serving.semantic.classify import PrototypeClassifier
from elision.serving.semantic.embed import Embedder, SentenceEncoder
from elision.serving.semantic.index import Vector
from elision.serving.semantic.keys import Partition, Query
from elision.serving.semantic.policies import Policies
from elision.serving.semantic.store import Answer
from elision.serving.semantic.verify import LexicalVerifier

GLOBAL_THRESHOLDS = (0.60, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.98)
GRID = tuple(round(0.60 + 0.02 * i, 2) for i in range(20))
MOST_FALSE = 0.03
"""Share of false hits among hits that the fitted thresholds may reach: the paper's 3 % at a threshold of 0.90."""
WHO = Partition("bench", "model")


@dataclass(frozen=True)
class Row:
    """One system on one workload; rates are shares of all requests unless named otherwise.

    Attributes:
        system: what was run.
        workload: on what.
        hit_rate: hits.
        right: hits whose answer is true now.
        false: hits with another intent's answer.
        stale: hits with an outdated answer.
        false_of_hits: false hits as a share of hits.
        lookup_ms_p50: median milliseconds of a lookup, embedding not counted.
        lookup_ms_p99: 99th percentile of the same.
        saved_s: model seconds saved by right hits.
        note: anything the reader must know.
    """

    system: str
    workload: str
    hit_rate: float
    right: float
    false: float
    stale: float
    false_of_hits: float
    lookup_ms_p50: float
    lookup_ms_p99: float
    saved_s: float
    note: str = ""


class TableEmbedder:
    """Vectors made beforehand, so that all systems see the same ones and none is charged for them."""

    def __init__(self, table: dict[str, Vector], name: str) -> None:
        self._table = table
        self.dim = len(next(iter(table.values())))
        self.name = f"{name}/{self.dim}"

    def __call__(self, texts: Sequence[str]) -> Vector:
        """See `Embedder`."""
        return np.stack([self._table[text] for text in texts])

    def covers(self, text: str) -> bool:
        """See `Embedder`."""
        return True


@dataclass(frozen=True)
class Stream:
    """A workload with its embeddings; `calibration` is another seed's."""

    name: str
    asks: list[Ask]
    calibration: list[Ask]
    kinds: dict[str, Kind]
    embedder: Embedder


def text_stream(count: int, seed: int) -> tuple[Stream, float]:
    """The English workload with MiniLM's vectors, and the milliseconds that one embedding took."""
    asks, calibration = text_workload(count, seed=seed), text_workload(count, seed=seed + 1000)
    texts = texts_of(asks + calibration)
    encoder = SentenceEncoder()
    encoder(texts[:8])
    start = time.perf_counter()
    for text in texts[:50]:
        encoder([text])
    single = (time.perf_counter() - start) / 50
    table = dict(zip(texts, encoder(texts), strict=True))
    return Stream("text", asks, calibration, KINDS, TableEmbedder(table, encoder.name)), 1e3 * single


def vector_stream(count: int, seed: int) -> Stream:
    """The workload of controlled density."""
    asks, table = vector_workload(count, seed=seed)
    calibration, more = vector_workload(count, seed=seed + 1000)
    renamed = {f"cal {text}": vector for text, vector in more.items()}
    moved = [Ask(a.at, a.category, a.intent, f"cal {a.text}", a.version) for a in calibration]
    return Stream("vectors", asks, moved, VECTOR_KINDS, TableEmbedder({**table, **renamed}, "synthetic"))


def play(
    name: str, stream: Stream, asks: list[Ask], make: Callable[[Callable[[], float]], SemanticCache], *, category: bool
) -> Row:
    """Plays requests through a cache with a clock that follows them; a miss is answered truly and stored."""
    now = [0.0]
    cache = make(lambda: now[0])
    found: list[str | None] = []
    seconds: list[float] = []
    for ask in asks:
        now[0] = ask.at
        query = Query(ask.text, WHO, ask.category if category else None)
        start = time.perf_counter()
        lookup = cache.lookup(query)
        seconds.append(time.perf_counter() - start)
        found.append(None if lookup.answer is None else lookup.answer.text)
        if lookup.answer is None:
            cache.insert(lookup, Answer(ask.answer), cost=stream.kinds[ask.category].model_seconds)
    return judge(name, stream, asks, found, seconds)


def judge(
    name: str, stream: Stream, asks: list[Ask], found: Sequence[str | None], seconds: Sequence[float], note: str = ""
) -> Row:
    """Counts right, false and stale hits against the truth."""
    n, right, false, stale, saved = len(asks), 0, 0, 0, 0.0
    for ask, answer in zip(asks, found, strict=True):
        if answer is None:
            continue
        if answer == ask.answer:
            right += 1
            saved += stream.kinds[ask.category].model_seconds
        elif answer.rsplit("|", 1)[0] == ask.intent:
            stale += 1
        else:
            false += 1
    hits = right + false + stale
    p50, p99 = (1e3 * float(np.percentile(seconds, q)) for q in (50, 99)) if len(seconds) else (0.0, 0.0)
    return Row(
        system=name,
        workload=stream.name,
        hit_rate=round(hits / n, 4),
        right=round(right / n, 4),
        false=round(false / n, 4),
        stale=round(stale / n, 4),
        false_of_hits=round(false / hits, 4) if hits else 0.0,
        lookup_ms_p50=round(p50, 4),
        lookup_ms_p99=round(p99, 4),
        saved_s=round(saved, 1),
        note=note,
    )


def fit_thresholds(stream: Stream, *, verifier: LexicalVerifier | None) -> dict[str, float]:
    """For each category the lowest threshold of `GRID` that keeps to `MOST_FALSE` on the other seed."""
    fitted = {}
    for category, kind in stream.kinds.items():
        asks = [ask for ask in stream.calibration if ask.category == category]
        for tau in GRID:
            policies = Policies.parse({"default": {"threshold": tau, "ttl": _ttl(kind)}})
            row = play(category, stream, asks, _maker(stream, policies, verifier), category=False)
            fitted[category] = tau
            if row.false_of_hits <= MOST_FALSE:
                break
    return fitted


def _ttl(kind: Kind) -> float:
    """A quarter of the period: an answer is then outdated for at most a quarter of the time it is served."""
    return min(30 * 86_400.0, kind.period / 4)


def _maker(
    stream: Stream, policies: Policies, verifier: LexicalVerifier | None, classifier: PrototypeClassifier | None = None
) -> Callable[[Callable[[], float]], SemanticCache]:
    def make(clock: Callable[[], float]) -> SemanticCache:
        return SemanticCache(stream.embedder, policies=policies, verifier=verifier, classifier=classifier, clock=clock)

    return make


def _category_policies(stream: Stream, thresholds: dict[str, float]) -> Policies:
    rows = {name: {"threshold": tau, "ttl": _ttl(stream.kinds[name])} for name, tau in thresholds.items()}
    return Policies.parse({"default": {"threshold": max(thresholds.values()), "ttl": 3600}, "categories": rows})


def _classifier(stream: Stream) -> PrototypeClassifier:
    """Prototypes out of the first 20 different questions of each category on the calibration seed."""
    examples = {
        name: texts_of([ask for ask in stream.calibration if ask.category == name])[:20] for name in stream.kinds
    }
    return PrototypeClassifier(stream.embedder, examples)


def rows_of(stream: Stream, *, gptcache_python: Path | None = None) -> list[Row]:
    """All systems on one workload."""
    asks, rows = stream.asks, []
    rows.append(judge("no cache", stream, asks, [None] * len(asks), []))
    exact = Policies.parse({"default": {"threshold": 1.0, "ttl": 3600}})
    rows.append(play("exact only", stream, asks, _maker(stream, exact, None), category=False))
    for tau in GLOBAL_THRESHOLDS:
        policies = Policies.parse({"default": {"threshold": tau, "ttl": 3600}})
        rows.append(play(f"one threshold {tau:.2f}", stream, asks, _maker(stream, policies, None), category=False))
    for verifier in (None, LexicalVerifier()) if stream.name == "text" else (None,):
        thresholds = fit_thresholds(stream, verifier=verifier)
        policies = _category_policies(stream, thresholds)
        suffix = " + verifier" if verifier else ""
        maker = _maker(stream, policies, verifier)
        note = json.dumps(thresholds)
        row = play(f"by category{suffix}", stream, asks, maker, category=True)
        rows.append(Row(**{**asdict(row), "note": note}))
        if stream.name == "text":
            sorted_out = _maker(stream, policies, verifier, _classifier(stream))
            rows.append(play(f"by category{suffix}, classifier", stream, asks, sorted_out, category=False))
    if stream.name == "text":
        for tau in (0.80, 0.90):
            policies = Policies.parse({"default": {"threshold": tau, "ttl": 3600}})
            maker = _maker(stream, policies, LexicalVerifier())
            rows.append(play(f"one threshold {tau:.2f} + verifier", stream, asks, maker, category=False))
    if gptcache_python is not None:
        rows += gptcache_rows(stream, gptcache_python)
    return rows


def gptcache_rows(stream: Stream, python: Path) -> list[Row]:
    """GPTCache 0.1.44 with the same vectors, run by an interpreter that has it.

    Raises:
        OptionError: if that interpreter cannot run it.
    """
    texts = texts_of(stream.asks)
    job = {
        "texts": texts,
        "vectors": stream.embedder(texts).tolist(),
        "asks": [[ask.text, ask.answer] for ask in stream.asks],
        # GPTCache's scale: its threshold t asks for a squared distance <= 4 (1 - t), so a cosine >= 2 t - 1.
        "thresholds": [0.8, 0.95],
    }
    worker = Path(__file__).parent / "gptcache_worker.py"
    done = subprocess.run(
        [str(python), str(worker)], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OptionError(f"gptcache did not run under {python.name}: {done.stderr.strip().splitlines()[-1:]}")
    rows = []
    for threshold, result in json.loads(done.stdout.splitlines()[-1]).items():
        note = f"its threshold {threshold} is a cosine of {2 * float(threshold) - 1:.2f}; it has no TTL"
        name = f"GPTCache 0.1.44 at {threshold}"
        rows.append(judge(name, stream, stream.asks, result["found"], result["seconds"], note))
    return rows


def environment() -> dict[str, Any]:
    """What a result was measured with; no names of machines or paths."""
    import os

    packages = ("usearch", "numpy", "torch", "sentence-transformers", "starlette", "uvicorn", "httpx", "redis")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "packages": {name: version(name) for name in packages},
    }


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints one table per workload."""
    for workload in dict.fromkeys(row.workload for row in rows):
        table = Table(title=f"workload: {workload}")
        table.add_column("system")
        for heading in ("hits", "right", "false", "stale", "false / hits", "p50 ms", "p99 ms", "model s saved"):
            table.add_column(heading, justify="right")
        for row in rows:
            if row.workload == workload:
                rates = [f"{100 * x:.1f} %" for x in (row.hit_rate, row.right, row.false, row.stale, row.false_of_hits)]
                table.add_row(
                    row.system, *rates, f"{row.lookup_ms_p50:.2f}", f"{row.lookup_ms_p99:.2f}", f"{row.saved_s:.0f}"
                )
        console.print(table)


def write(rows: Sequence[Row], path: Path, **settings: object) -> None:
    """Writes rows as JSON lines; the first line is the environment."""
    lines = [{"kind": "environment", **environment(), **settings}, *({"kind": "row", **asdict(row)} for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def compare(
    workloads: Sequence[str] = ("text", "vectors"),
    *,
    count: int = 5000,
    seed: int = 0,
    gptcache_python: Path | None = None,
    out: Path | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Runs, prints and writes the comparison.

    Args:
        workloads: out of "text" and "vectors".
        count: requests per workload.
        seed: of the workloads; thresholds are fitted on `seed + 1000`.
        gptcache_python: an interpreter with gptcache==0.1.44; `None` leaves GPTCache out.
        out: a JSONL file to write.
        as_json: print JSON lines instead of tables.
        console: where to print.
    """
    console = console or Console()
    for name in workloads:
        if name not in ("text", "vectors"):
            raise UnknownName.of("workload", name, ("text", "vectors"))
    rows: list[Row] = []
    settings: dict[str, object] = {"count": count, "seed": seed}
    for name in workloads:
        with console.status(f"workload {name}"):
            if name == "text":
                stream, settings["embed_ms"] = text_stream(count, seed)
            else:
                stream = vector_stream(count, seed)
            rows += rows_of(stream, gptcache_python=gptcache_python)
    if as_json:
        for row in rows:
            console.print_json(json.dumps(asdict(row)))
    else:
        show(rows, console)
    if out is not None:
        write(rows, out, **settings)
    return rows
