# liger_fx. `make` lists what there is; every target installs what it needs into .venv first.

NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
WORKERS ?= $(shell nproc 2>/dev/null || echo auto)
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint types check bench clean

help: ## list these targets
	@echo "usage: make TARGET"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## ?/  \1\t/' | expand -t 12

demo: $(VENV)/.installed ## optimise a Llama on the CPU: tree before and after, report, verification
	@echo "==> examples/llama.py"
	@$(BIN)/python examples/llama.py

test: $(VENV)/.installed-dev ## run the tests but the slow ones, WORKERS at a time (ARGS="-k rope" is handed to pytest)
	@echo "==> pytest, $(WORKERS) workers"
	@$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

test-all: $(VENV)/.installed-dev ## run the slow tests, too
	@echo "==> pytest, $(WORKERS) workers, slow tests too"
	@$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev ## ruff: faults and formatting (ruff format . puts that right)
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .

# By package, never by folder: kernels/ and passes/ are reached through the links in liger_fx/, and
# `mypy .` would find each of their files twice under two names.
types: $(VENV)/.installed-dev ## mypy: the package, its tests and its tools
	@echo "==> mypy"
	@$(BIN)/mypy -p liger_fx -p tests -p tools

check: test lint types ## test, lint and types

bench: $(VENV)/.installed-dev ## tracing time beside DynamoExporter's, on this CPU
	@$(BIN)/python tools/bench/trace_time.py

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "==> installing liger_fx into $(VENV) (PyTorch is large: this can take minutes)"
	@$(BIN)/pip install -c constraints.txt -e . || $(install_failed)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "==> installing liger_fx and what its tests need into $(VENV) (this can take minutes)"
	@$(BIN)/pip install -c constraints.txt -e '.[dev]' || $(install_failed)
	@touch $@ $(VENV)/.installed

$(VENV)/bin/pip:
	@test -n "$(PYTHON)" && $(PYTHON) $(NEW_ENOUGH) || { \
	  echo "Python 3.11 or newer is needed, and $(or $(PYTHON),python3) is none: install it," \
	  "or say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "==> making the environment $(VENV) with `$(PYTHON) -V`"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python's venv module is missing or" \
	  "incomplete: on Debian or Ubuntu, apt-get install python3-venv" >&2; exit 1; }

install_failed = { echo "The installation failed: what pip says above is the reason. It needs" \
  "PyPI (or a mirror set in pip's configuration) and about 3 GB of disk." >&2; exit 1; }
