# Two commands for a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/ullage demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

check: $(STAMP)
	scripts/check

bench: $(STAMP)
	$(BIN)/python benchmarks/prediction.py
	$(BIN)/python benchmarks/promise.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
