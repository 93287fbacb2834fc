# Two commands matter: `make demo` and `make test`. Everything lands in .venv; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)

.PHONY: demo test lint bench docs clean

$(VENV)/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.0"
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/dev: $(VENV)/demo
	$(PIP) --editable ".[demo,transformers,serve,dev]"
	@touch $@

demo: $(VENV)/demo
	$(BIN)/elision demo

# One thread a worker: on two cores more threads only wait for each other.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev
	$(BIN)/python benchmarks/denoise_speed.py --rounds 5 --out results/denoise_speed.jsonl

docs: $(VENV)/dev
	$(BIN)/python tools/make_docs.py
	$(BIN)/python tools/make_results.py
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site reports docs/methods
