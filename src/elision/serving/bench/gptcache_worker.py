"""Runs GPTCache 0.1.44 on vectors made beforehand; started by `compare` under an interpreter that has it.

Reads {"texts", "vectors", "asks", "thresholds"} as JSON from standard input, writes one line of JSON: by threshold,
what each ask found (or null) and how many seconds each lookup took. Imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run(job: dict[str, Any], threshold: float, folder: Path) -> dict[str, list[Any]]:
    """Plays all asks; a miss is answered truly and stored, as an application would."""
    import numpy as np
    from gptcache import Cache, Config
    from gptcache.adapter.api import get, put
    from gptcache.manager import CacheBase, VectorBase, get_data_manager
    from gptcache.processor.pre import get_prompt
    from gptcache.similarity_evaluation.distance import SearchDistanceEvaluation

    array = np.load(job["file"]) if "file" in job else np.asarray(job["vectors"], np.float32)  # [n, dim]
    vectors = dict(zip(job["texts"], array, strict=True))
    cache = Cache()
    manager = get_data_manager(
        CacheBase("sqlite", sql_url=f"sqlite:///{folder / 'g.db'}"),
        VectorBase("faiss", dimension=array.shape[1], index_path=str(folder / "g.index")),
        max_size=200_000,
    )
    cache.init(
        pre_embedding_func=get_prompt,
        embedding_func=lambda text, **_: vectors[text],
        data_manager=manager,
        similarity_evaluation=SearchDistanceEvaluation(),
        config=Config(similarity_threshold=threshold),
    )
    if job.get("preload"):
        cache.import_data([text for text, _ in job["preload"]], [answer for _, answer in job["preload"]])
    found, seconds = [], []
    for text, answer in job["asks"]:
        start = time.perf_counter()
        got = get(text, cache_obj=cache)
        seconds.append(time.perf_counter() - start)
        found.append(got)
        if got is None and not job.get("frozen"):
            put(text, answer, cache_obj=cache)
    return {"found": found, "seconds": seconds}


def main() -> None:
    """Reads the job and writes the result; GPTCache's own output goes to standard error."""
    out, sys.stdout = sys.stdout, sys.stderr
    job = json.load(sys.stdin)
    results = {}
    for threshold in job["thresholds"]:
        with tempfile.TemporaryDirectory() as folder:
            results[str(threshold)] = run(job, threshold, Path(folder))
    out.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
