# Everything runs in .venv, which the first command makes. HEADSTART_PYTHON chooses another Python >= 3.11.
HEADSTART_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint bench docs clean

demo: $(VENV)/installed  ## the main job on real pictures: compare, choose, predict
	$(BIN)/headstart demo --out demo-out

test: $(VENV)/installed-dev lint  ## lint, types, tests, coverage
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered --cov-fail-under=90

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-bench  ## the measurements behind every claim of speed
	$(BIN)/python bench/run.py

docs: $(VENV)/installed-dev  ## the reference pages that are read from the code
	$(BIN)/python docs/build.py

$(BIN)/python:
	$(HEADSTART_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headstart needs Python 3.11 or newer; set HEADSTART_PYTHON=python3.11")'
	$(HEADSTART_PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time this fetches PyTorch and takes a minute or two."
	$(PIP) install --quiet --quiet --constraint constraints.txt --editable '.[demo]'
	@touch $@

$(VENV)/installed-dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time this fetches PyTorch and takes a minute or two."
	$(PIP) install --quiet --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-bench: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) demo-out .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache
