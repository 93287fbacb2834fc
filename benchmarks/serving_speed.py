"""How fast the cache and the proxy are, as JSON lines.

python benchmarks/serving_speed.py --entries 100000 --gptcache-python PATH --out results/serving_speed.jsonl

Parts: lookups among many entries without embedding; memory per entry; restart; break-even hit rates with local search
and with a simulated remote search of 30 ms; GPTCache's lookup rate on the same vectors; exact hits per second through
HTTP; what the proxy adds to a miss; 1,000 concurrent streams. Everything runs on one machine's loopback; client, proxy
and upstream share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from elision.serving.bench.compare import TableEmbedder, environment
from elision.serving.semantic import (
    Answer,
    CacheOptions,
    Partition,
    Policies,
    Query,
    Question,
    SemanticCache,
    SentenceEncoder,
    SQLiteStore,
    break_even,
    unit,
)
from elision.serving.semantic.store import Record, new_id

DIM = 384
WHO = Partition("bench", "m")


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    return {f"p{q}_ms": round(1e3 * float(np.percentile(seconds, q)), 3) for q in (50, 90, 99)}


def resident() -> int:
    """Bytes of this process's resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def vectors(n: int, seed: int) -> np.ndarray:
    """Unit vectors [n, 384] around 1,000 centres: neighbours at cosine 0.5 to 0.7."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((1000, DIM)).astype(np.float32)
    return unit(centres[rng.integers(1000, size=n)] + 0.8 * rng.standard_normal((n, DIM)).astype(np.float32))


def fill(store: SQLiteStore, stored: np.ndarray, embedder: TableEmbedder) -> None:
    """Puts entries into the store alone, as an earlier run would have left them."""
    template = SemanticCache(embedder)
    now = time.time()

    def items() -> Iterator[tuple[Record, Answer]]:
        for i, vector in enumerate(stored):
            query = Query(f"stored question number {i}", WHO, "default")
            question = template.begin(query)
            assert isinstance(question, Question)
            fingerprint = question.fingerprint
            yield (
                Record(
                    new_id(),
                    fingerprint,
                    WHO,
                    "default",
                    query.text,
                    now,
                    None,
                    "caller",
                    embedder.name,
                    "",
                    1.0,
                    vector,
                ),
                Answer(
                    "an answer of about a hundred characters, which is not much for a language model, but enough here"
                ),
            )

    batch = []
    for item in items():
        batch.append(item)
        if len(batch) == 5000:
            store.put_many(batch)
            batch = []
    store.put_many(batch)


def library(entries: int, lookups: int, folder: Path) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """Lookups among `entries` of one partition and category: the largest cell there can be."""
    stored = vectors(entries, 0)
    rng = np.random.default_rng(1)
    near = stored[rng.integers(entries, size=lookups)] + 0.02 * rng.standard_normal((lookups, DIM)).astype(np.float32)
    half = lookups // 2
    asked = np.concatenate([unit(near)[:half], vectors(lookups - half, 2)])
    table = {f"asked {i}": v for i, v in enumerate(asked)}
    embedder = TableEmbedder(table, "bench")
    store = SQLiteStore(folder / "speed.db")
    fill(store, stored, embedder)
    rows: list[dict[str, Any]] = []
    cache, row, before = restarted(embedder, store, entries, {"asked 0": asked[0]})
    rows.append(row)
    rows.append(
        {
            "part": "memory",
            "entries": entries,
            "resident_bytes_per_entry": round((resident() - before) / entries),
            "index_bytes_per_entry": round(cache.nbytes() / entries),
            "disk_bytes_per_entry": round((folder / "speed.db").stat().st_size / entries),
        }
    )
    seconds: dict[str, list[float]] = {"hit": [], "miss": []}
    near_hits = 0
    for i in rng.permutation(lookups):
        query = Query(f"asked {i}", WHO, "default")
        start = time.perf_counter()
        question = cache.begin(query)
        found = cache.finish(question, table[query.text])
        seconds[found.status].append(time.perf_counter() - start)
        if i < half:
            near_hits += found.status == "hit"
    both = seconds["hit"] + seconds["miss"]
    rows.append({"part": "lookup", "what": "all, embedding not counted", "n": len(both), **percentiles(both)})
    rows.append(
        {
            "part": "recall",
            "what": "near neighbours found",
            "share": near_hits / half,
        }
    )
    rows += [{"part": "lookup", "what": kind, "n": len(s), **percentiles(s)} for kind, s in seconds.items() if s]
    rows.append(
        {"part": "lookup rate", "system": "elision", "entries": entries, "per_second": round(len(both) / sum(both), 1)}
    )
    exact = []
    for i in rng.integers(entries, size=2000):
        query = Query(f"stored question number {i}", WHO, "default")
        start = time.perf_counter()
        found = cache.lookup(query)
        exact.append(time.perf_counter() - start)
        assert found.reason == "exact"
    rows.append({"part": "lookup", "what": "exact", "n": len(exact), **percentiles(exact)})
    rows.append(inserting(cache, table))
    rows += economics(cache, percentiles(both)["p50_ms"] / 1e3, percentiles(exact)["p50_ms"] / 1e3)
    return rows, stored, asked


def restarted(
    embedder: TableEmbedder, store: SQLiteStore, entries: int, probe: dict[str, np.ndarray]
) -> tuple[SemanticCache, dict[str, Any], int]:
    """A cache on a filled store, how long it took to answer and to have its graph, and the resident bytes before."""
    before, start = resident(), time.perf_counter()
    policies = Policies.parse({"default": {"threshold": 0.85, "ttl": "30d"}})
    options = CacheOptions(capacity=2 * entries)
    cache = SemanticCache(embedder, policies=policies, store=store, options=options, load_now=False)
    cache.load()
    ready = time.perf_counter() - start
    scans = []
    for text, vector in list(probe.items()) * 20:
        begin = time.perf_counter()
        question = cache.begin(Query(text, WHO, "default"))
        assert isinstance(question, Question)
        cache.finish(question, vector)
        scans.append(time.perf_counter() - begin)
    start = time.perf_counter()
    while not cache.build():
        continue
    row = {
        "part": "restart",
        "entries": len(cache),
        "seconds_to_first_answer": round(ready, 1),
        "lookup_ms_until_graph": percentiles(scans)["p50_ms"],
        "seconds_to_graph": round(time.perf_counter() - start, 1),
    }
    return cache, row, before


def inserting(cache: SemanticCache, table: dict[str, np.ndarray]) -> dict[str, Any]:
    """Storing answers, embedding not counted."""
    seconds = []
    for i, v in enumerate(vectors(300, 5)):
        table[f"new {i}"] = v
        start = time.perf_counter()
        assert cache.insert(Query(f"new {i}", WHO, "default"), Answer("x")).stored
        seconds.append(time.perf_counter() - start)
    return {"part": "insert", "n": len(seconds), **percentiles(seconds)}


def economics(cache: SemanticCache, search: float, fetch: float) -> list[dict[str, Any]]:
    """Break-even hit rates with measured costs, beside the paper's."""
    encoder = SentenceEncoder()
    texts = [f"What is the capital of country number {i}?" for i in range(60)]
    taken = []
    for text in texts:
        start = time.perf_counter()
        encoder([text])
        taken.append(time.perf_counter() - start)
    embed = float(np.median(taken[10:]))
    rows = [{"part": "embedding", "encoder": encoder.name, "n": 50, **percentiles(taken[10:])}]
    paper = {
        ("local", 0.15): "3-5 %",
        ("local", 0.2): "3-5 %",
        ("remote 30 ms", 0.15): "15-20 %",
        ("remote 30 ms", 0.2): "15-20 %",
    }
    for where, cost in (("local", search), ("remote 30 ms", search + 0.030)):
        for model in (0.15, 0.2, 1.0, 4.0):
            rows.append(  # noqa: PERF401  (two nested loops read better than one comprehension)
                {
                    "part": "break-even",
                    "search": where,
                    "model_s": model,
                    "search_s": round(cost, 5),
                    "embed_s": round(embed, 5),
                    "without_embedding": round(break_even(cost, fetch, model), 4),
                    "with_embedding": round(break_even(cost, fetch, model, embed), 4),
                    "paper": paper.get((where, model), "-"),
                }
            )
    return rows


def gptcache(python: Path, stored: np.ndarray, asked: np.ndarray, lookups: int, folder: Path) -> dict[str, Any]:
    """GPTCache's lookups on the same stored vectors, nothing being added."""
    pick = np.random.default_rng(3).permutation(len(asked))[:lookups]
    np.save(folder / "vectors.npy", np.concatenate([stored, asked[pick]]))
    job = {
        "texts": [f"stored {i}" for i in range(len(stored))] + [f"asked {i}" for i in pick],
        "file": str(folder / "vectors.npy"),
        "preload": [[f"stored {i}", "an answer"] for i in range(len(stored))],
        "asks": [[f"asked {i}", ""] for i in pick],
        "thresholds": [0.925],  # a cosine of 0.85
        "frozen": True,
    }
    worker = Path(sys.modules[TableEmbedder.__module__].__file__ or "").parent / "gptcache_worker.py"
    done = subprocess.run(
        [str(python), str(worker)], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"part": "lookup rate", "system": "gptcache 0.1.44", "failed": done.stderr.strip().splitlines()[-1]}
    (result,) = json.loads(done.stdout.splitlines()[-1]).values()
    seconds = result["seconds"]
    return {
        "part": "lookup rate",
        "system": "gptcache 0.1.44 (sqlite, faiss)",
        "entries": len(stored),
        "per_second": round(len(seconds) / sum(seconds), 1),
        **percentiles(seconds),
    }


SERVER = """
import sys
from elision.serving.bench.upstream import ScriptedUpstream
from elision.serving.semantic.config import ServeConfig
from elision.serving.semantic.policies import checked
from elision.serving.semantic.proxy.app import Proxy
from elision.serving.semantic.proxy.server import listen, own_process, server
kind, upstream = sys.argv[1], sys.argv[2]
if kind == "upstream":
    app = ScriptedUpstream(delay=0.02, pause=0.01).app
else:
    rules = {"default": {"threshold": 0.95}, "encoder": {"kind": kind}, "store": {"url": sys.argv[3]}}
    app = Proxy(upstream, checked(ServeConfig, rules, "bench")).app
own_process()
sock = listen("127.0.0.1", 0)
print(sock.getsockname()[1], flush=True)
server(app).run(sockets=[sock])
"""


@contextlib.contextmanager
def process(kind: str, upstream: str, store: str = ":memory:") -> Iterator[str]:
    """A server in a process of its own; ended by its id."""
    command = [sys.executable, "-c", SERVER, kind, upstream, store]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        base = f"http://127.0.0.1:{int(server.stdout.readline())}"
        for _ in range(1200):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{base}/health").status_code in (200, 404):
                    break
            time.sleep(0.05)
        time.sleep(1.0)
        yield base
    finally:
        server.terminate()
        server.wait(timeout=20)


def body(text: str, stream: bool = False) -> dict[str, Any]:
    """A chat request."""
    return {"model": "m", "stream": stream, "messages": [{"role": "user", "content": text}]}


async def hits_per_second(base: str, n: int, connections: int) -> dict[str, Any]:
    """Exact hits over raw keep-alive connections, so that the client costs as little as possible."""
    payload = json.dumps(body("the question that everybody asks")).encode()
    host, port = base.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(payload)}\r\n\r\n"
    message, taken, hits = head.encode() + payload, [], 0

    async def one(count: int) -> None:
        nonlocal hits
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in range(count):
            start = time.perf_counter()
            writer.write(message)
            reply = await reader.readuntil(b"\r\n\r\n")
            length = int(reply.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            taken.append(time.perf_counter() - start)
            hits += b"x-elision-cache: hit" in reply
        writer.close()

    await one(3)
    hits, taken = 0, []
    start = time.perf_counter()
    await asyncio.gather(*(one(n // connections) for _ in range(connections)))
    seconds = time.perf_counter() - start
    return {
        "part": "http exact hits",
        "connections": connections,
        "n": len(taken),
        "hits": hits,
        "per_second": round(len(taken) / seconds),
        **percentiles(taken),
    }


def added_to_a_miss(upstream: str, proxy: str, what: str, n: int = 150) -> dict[str, Any]:
    """Misses through the proxy and the same requests straight to the upstream, alternately."""
    direct, through = [], []
    with httpx.Client() as client:
        for i in range(n + 10):
            for base, taken in ((upstream, direct), (proxy, through)):
                text = f"{os.urandom(4).hex()} never asked before {i}"
                start = time.perf_counter()
                reply = client.post(f"{base}/v1/chat/completions", json=body(text))
                taken.append(time.perf_counter() - start)
                assert reply.status_code == 200
                assert reply.headers.get("x-elision-cache", "miss") == "miss"
    a, b = percentiles(direct[10:]), percentiles(through[10:])
    added = {name.replace("_ms", "_added_ms"): round(b[name] - a[name], 3) for name in a}
    return {"part": "added to a miss", "what": what, "n": n, **added, "direct_p50_ms": a["p50_ms"]}


async def streams(base: str, n: int) -> dict[str, Any]:
    """n streams at once, all of different questions."""
    done, errors, taken = 0, [], []
    limits = httpx.Limits(max_connections=n, max_keepalive_connections=n)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:

        async def one(i: int) -> None:
            nonlocal done
            start = time.perf_counter()
            try:
                async with client.stream(
                    "POST", f"{base}/v1/chat/completions", json=body(f"stream {i}", True)
                ) as reply:
                    got = b"".join([chunk async for chunk in reply.aiter_raw()])
                done += reply.status_code == 200 and got.endswith(b"data: [DONE]\n\n")
                taken.append(time.perf_counter() - start)
            except httpx.HTTPError as error:
                errors.append(type(error).__name__)

        start = time.perf_counter()
        await asyncio.gather(*(one(i) for i in range(n)))
        seconds = time.perf_counter() - start
    return {
        "part": "streams",
        "at_once": n,
        "whole": done,
        "errors": len(errors),
        "seconds": round(seconds, 2),
        **percentiles(taken),
    }


def over_http(folder: Path) -> list[dict[str, Any]]:
    """Everything through sockets."""
    rows = []
    with process("upstream", "-") as upstream:
        with process("hash", upstream, f"sqlite:{folder / 'h.db'}") as proxy:
            for connections in (1, 16):
                rows.append(asyncio.run(hits_per_second(proxy, 4000, connections)))  # noqa: PERF401
            rows.append(added_to_a_miss(upstream, proxy, "hash encoder: all but the embedding"))
            rows.append(asyncio.run(streams(proxy, 1000)))
        with process("minilm", upstream, f"sqlite:{folder / 'm.db'}") as proxy:
            rows.append(added_to_a_miss(upstream, proxy, "MiniLM encoder on the CPU"))
    return rows


def main() -> None:
    """Reads the options, runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--lookups", type=int, default=3000)
    parser.add_argument("--gptcache-python", type=Path)
    parser.add_argument("--gptcache-lookups", type=int, default=100)
    parser.add_argument("--skip-library", action="store_true")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    rows: list[dict[str, Any]] = [{"kind": "environment", **environment(), "load_before": round(os.getloadavg()[0], 2)}]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: list[dict[str, Any]] = []
        if not a.skip_library:
            parts, stored, asked = library(a.entries, a.lookups, folder)
            if a.gptcache_python is not None:
                parts.append(gptcache(a.gptcache_python, stored, asked, a.gptcache_lookups, folder))
        for row in over_http(folder):
            parts.append(row)
    rows += [{"kind": "row", **row} for row in parts]
    rows[0]["load_after"] = round(os.getloadavg()[0], 2)
    for row in rows:
        print(json.dumps(row))
    if a.out is not None:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
