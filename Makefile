# Two commands on a machine with Python 3.11, git and make: `make mini` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := PASSIVE

.PHONY: mini test docs lint check coverage audit
mini: $(VENV)/ready
	$(BIN)/advdmd mini --out runs/mini

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --maxschedchunk 8

check: lint docs test

coverage: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing:skip-covered

docs: $(VENV)/ready-dev
	$(BIN)/python -m sphinx -q -W --keep-going docs site

lint: $(VENV)/ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python runs/house_figures.py  # what CONTRIBUTING.md asks for

# Known vulnerabilities of what is pinned (asks an advisory service, or ADVISORIES=checkout of github.com/pypa/advisory-database),
# and a bill of materials of it (asks nobody).
audit: $(VENV)/ready
	$(BIN)/python -m pip install -q pip-audit cyclonedx-bom
	$(BIN)/cyclonedx-py requirements constraints.txt --of JSON --output-reproducible -o sbom.cdx.json
	$(if $(ADVISORIES),$(BIN)/python runs/advisories.py $(ADVISORIES) --audit $(BIN)/pip-audit,$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "advdmd needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that what follows finds the pinned version there and fetches no other build.
$(VENV)/ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
