# Everything a fresh machine needs: `make demo` shows Pomona at work, `make test` runs the whole default test set.
# Needs python3 (3.11 or newer) with venv; a C++ compiler is used if there is one.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml $(wildcard setup.py) $(wildcard src/pomona/kernels/cpu/native/*)

.PHONY: demo test check format docs bench bench-quick bench-serve bench-peers train clean help

help:  ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## Serve the bundled model, ask every adapter at once, then keep serving.
	$(BIN)/pomona demo

test: $(VENV)/.installed-dev  ## Run the default test set (lint, types and import rules included).
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev  ## Format check, lint, types, import rules.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev  ## Regenerate docs/reference.
	$(BIN)/python -m pomona.cli.reference

bench: $(VENV)/.installed-dev  ## Measure ceilings, ops, steps, jobs and server; rows and tables are written.
	$(BIN)/python -m benchmarks.ceilings
	$(BIN)/python -m benchmarks.kernels.bench_ops
	$(BIN)/python -m benchmarks.step --profile
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.server
	$(BIN)/python -m benchmarks.report

bench-quick: $(VENV)/.installed-dev  ## Every measuring command at tiny sizes, into a temporary folder: does it work?
	$(BIN)/python -m benchmarks.ceilings --quick
	$(BIN)/python -m benchmarks.kernels.bench_ops --quick
	$(BIN)/python -m benchmarks.step --quick --profile
	$(BIN)/python -m benchmarks.engine --quick
	$(BIN)/python -m benchmarks.server --quick
	$(BIN)/python -m benchmarks.peers.run --quick
	$(BIN)/python -m benchmarks.report --quick

bench-serve: $(VENV)/.installed-dev  ## Load-test the bundled model: four adapter popularities against the base alone.
	$(BIN)/pomona bench serve --spawn

bench-peers: $(VENV)/.installed-dev  ## The same work on Pomona, transformers + peft, llama.cpp and vLLM (hours).
	$(BIN)/python -m benchmarks.peers.setup
	$(BIN)/python -m benchmarks.peers.run
	$(BIN)/python -m benchmarks.report

train: $(VENV)/.installed-dev  ## Train the bundled model and its adapters again (under 30 minutes on 2 cores).
	$(BIN)/python training/train_bundled.py

clean:  ## Remove the virtual environment and build products.
	rm -rf $(VENV) build dist src/*.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --progress-bar on --editable .
	touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --progress-bar on --editable '.[dev]'
	touch $@ $(VENV)/.installed
