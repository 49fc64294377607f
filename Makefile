# From a clone to a result, with nothing but Python 3.11 and make: `make demo`, `make test`.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check docs bench gpu clean

help:
	@echo "make demo    train a small GPT: plain, every block checkpointed, and with a plan"
	@echo "make test    the tests, but for the slow ones"
	@echo "make check   format, lint, types, tests and the snippets of the docs"
	@echo "make docs    the site, in build/site: open build/site/index.html"
	@echo "make bench   every benchmark"
	@echo "make gpu     on a GPU, in under 8 minutes: the tests that need one, and short benchmarks"
	@echo "make clean   remove $(VENV) and all caches"

# One installation until the dependencies or their pins change.
$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "The pinned versions need Python 3.11 or newer; found: '$(PYTHON)'. Try make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/ullage demo

test: $(STAMP)
	scripts/check test

check: $(STAMP)
	scripts/check

# The site needs MkDocs, which nothing else does.
$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

docs: $(VENV)/.docs
	scripts/check docs

# A file that starts with an underscore is a helper of the others.
bench: $(STAMP)
	@set -e; for script in benchmarks/[!_]*.py; do \
		test -e "$$script" || { echo "benchmarks/ is empty" >&2; exit 1; }; \
		echo "+ $$script"; $(BIN)/python "$$script"; \
	done

# Without the pins: on a machine with a GPU the torch that is there should be used. PYTHON=python3 takes its environment.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,"$(PYTHON)") benchmarks/gpu.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
