# Every target sets up what it needs; everything runs through the virtual environment in $(VENV).

PYTHON ?= python3
VENV   ?= .venv
RECIPE ?= engines/tiny.toml
# The recipe of `make bench`: its bundle is made where it is missing, then timed.
BENCH_RECIPE ?= engines/mid.toml
PIP_FLAGS ?=
# More for pytest, for example -k generate.
TEST_FLAGS ?=
# Test processes at a time, each of one thread.
TEST_WORKERS ?= 2
GPU_REPORT ?= benchmarks/out/gpu-check.json
# More for gpu-check, for example --resume, or --only 'parity/*'.
GPU_FLAGS ?=
# A folder of wheels for gpu-check on a machine without a package index.
WHEELS ?=

# gpu-check takes an environment that is there; its own sees all that PYTHON sees, such as the machine's PyTorch.
GPU_VENV ?= $(if $(or $(wildcard $(VENV)/bin/python),$(filter-out file,$(origin VENV))),$(VENV),.venv-gpu)

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup engines bench test lint gpu-check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo
	@echo "variables: PYTHON, VENV, RECIPE, BENCH_RECIPE, PIP_FLAGS, TEST_FLAGS, GPU_REPORT, GPU_FLAGS, WHEELS"

setup: $(STAMP) ## make the virtual environment with the tested versions

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[cpu,export,tensorrt-rtx,dev]"
	@touch $@

engines: $(STAMP) ## checkpoint to bundle, engines, proof, image and latency (RECIPE=engines/tiny.toml)
	$(BIN)/sana-export engines $(RECIPE)

bench: $(STAMP) ## latency beside eager diffusers, on a bundle of 100 million parameters
	$(BIN)/sana-export engines $(BENCH_RECIPE)

test: $(STAMP) ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(TEST_WORKERS) --dist loadfile $(TEST_FLAGS)

lint: $(STAMP) ## style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu-check: ## every check and timing that needs a GPU, in 8 minutes at most (WHEELS=DIR installs from it alone)
	$(PYTHON) tools/gpu_check.py --venv $(GPU_VENV) $(if $(WHEELS),--wheels $(WHEELS)) --report $(GPU_REPORT) $(GPU_FLAGS)

clean: ## remove what was built, but not the virtual environment
	rm -rf engines/out benchmarks/out build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
