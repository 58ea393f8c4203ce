# Each target does all of its own set-up, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-services soak check format bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo           see the whole chain work: gateway, AiiDA, a small study (2 minutes)"
	@echo "make test           the tests (10 minutes at most)"
	@echo "make test-services  the tests that need further installed services"
	@echo "make soak           200 calculations on a real Slurm while gateway and daemon workers are killed (6 to 10 minutes)"
	@echo "make check          format, lint, types"
	@echo "make bench          how fast it is beside curl and AiiDA's SSH transport, in docs/benchmarks.md (more than an hour)"
	@echo "make docs           the documentation, in docs/_build/html"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): run make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: install the package python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/marketplace-hpc demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not services and not alone" -n 3 --dist loadfile --durations=10
	$(BIN)/python -m pytest -m "alone and not services"

test-services: $(VENV)/.dev
	$(BIN)/python -m pytest -m "services and not alone" -n 3 --dist loadfile --durations=0
	$(BIN)/python -m pytest -m "services and alone" --durations=0

soak: $(VENV)/.dev
	$(BIN)/python -m tests.soak $(SOAK)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(BENCH)

docs: $(VENV)/.dev
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build demo-result build dist *.egg-info
