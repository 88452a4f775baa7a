# Every target sets up what it needs; the environment lives in .venv/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow test-gpu bench lint
demo: $(VENV)/.demo ## compare balancing methods on real text: runs/demo/report.html
	$(BIN)/equipoise compare --config examples/demo.toml --out runs/demo

test: $(VENV)/.dev ## the README's test command
	$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "not slow and not gpu"

test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow"

test-gpu: $(VENV)/.dev
	$(BIN)/pytest -m "gpu"

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py all

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) -e ".[report]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e ".[dev]"
	touch $@
