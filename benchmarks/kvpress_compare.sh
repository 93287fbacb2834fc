#!/bin/sh
# Shared methods in kvpress, in an environment of its own (it wants another version of transformers):
#
#   benchmarks/kvpress_compare.sh FOLDER [arguments of kvpress_compare.py]
#
# makes FOLDER with Python's venv, writes the prompts and the expanded SmolLM2 with the interpreter that has elision
# (PYTHON, by default .venv/bin/python), and lets kvpress answer them there. Results are appended to
# results/kvpress_compare.jsonl beside those of elision on the same prompts.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
folder=${1:?give a folder for the environment of kvpress}
shift
if [ ! -x "$folder/bin/python" ]; then
  python3 -m venv "$folder"
  "$folder/bin/pip" install --quiet "torch==2.13.0" "kvpress==0.5.5"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" "$here/benchmarks/kvpress_compare.py" prepare --work "$work" "$@"
"$folder/bin/python" "$here/benchmarks/kvpress_compare.py" kvpress --work "$work"
"$python" "$here/benchmarks/kvpress_compare.py" join --work "$work" --out "$here/results/kvpress_compare.jsonl"
