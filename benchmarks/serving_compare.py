"""Category-aware caching against single thresholds, exact matching, GPTCache and no cache.

python benchmarks/serving_compare.py --count 2000 --gptcache-python PATH --out results/serving_compare.jsonl

For GPTCache: a virtual environment of its own with `gptcache==0.1.44 faiss-cpu "sqlalchemy<2.1" "numpy<2"`, and the
path of its Python.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from elision.serving.bench.compare import compare


def main() -> None:
    """Reads the options and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gptcache-python", type=Path)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    compare(count=a.count, seed=a.seed, gptcache_python=a.gptcache_python, out=a.out)


if __name__ == "__main__":
    main()
