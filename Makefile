# Every target sets up what it needs. Everything runs in the virtual environment $(VENV).

PYTHON ?= python3
VENV   ?= .venv
RECIPE ?= engines/tiny.toml
# The recipe of `make bench`. Its bundle is exported if it is missing, then timed.
BENCH_RECIPE ?= engines/mid.toml
PIP_FLAGS ?=
# Options for pytest, for example -k generate.
TEST_FLAGS ?=
# Number of parallel test processes, each with one thread.
TEST_WORKERS ?= 2
# Inputs for each test of `make fuzz`.
FUZZ_INPUTS ?= 2000
# The environments of `make test-lowest`, `make test-lowest-export` and `make test-newest`, and the Python of the last one.
LOWEST ?= .venv-lowest
LOWEST_EXPORT ?= .venv-lowest-export
NEWEST ?= .venv-newest
NEWEST_PYTHON ?= $(PYTHON)
# The ComfyUI of `make test-comfyui`, and its Python, which needs onnx, onnxruntime, pytest, psutil and hypothesis too.
# The stand-in's tests export the bundles for the real one.
COMFYUI ?=
COMFYUI_PYTHON ?= $(COMFYUI)/venv/bin/python
COMFYUI_TESTS = SANA_EXPORT_TEST_BUNDLES=$(abspath $(VENV))/comfyui-bundles OMP_NUM_THREADS=1
GPU_REPORT ?= benchmarks/out/gpu-check.json
# Options for gpu-check, for example --resume, or --only 'parity/*'.
GPU_FLAGS ?=
# A folder of wheels, for gpu-check on a machine without network access.
WHEELS ?=

# gpu-check makes an environment of its own, which sees all packages of $(VENV), or else of PYTHON: its PyTorch belongs to the machine.
# VENV=DIR on the command line names an environment to use as it is.
GPU_VENV ?= $(if $(filter-out file,$(origin VENV)),$(VENV),.venv-gpu)
GPU_PYTHON ?= $(firstword $(wildcard $(VENV)/bin/python) $(PYTHON))

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# With what tests and linters need.
DEV   := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help setup engines bench test test-slow test-browser test-comfyui test-lowest test-lowest-export test-newest fuzz bindings lint gpu-check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo
	@echo "variables: PYTHON, VENV, RECIPE, BENCH_RECIPE, PIP_FLAGS, TEST_FLAGS, FUZZ_INPUTS, COMFYUI, GPU_REPORT, GPU_FLAGS, WHEELS"

setup: $(DEV) ## create the virtual environment with the tested versions

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[cpu,export,hub,optimum,tensorrt-rtx,bench]"
	@touch $@

$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[serve,demo,ray,dev]"
	@touch $@

engines: $(STAMP) ## run a recipe: export, build, verify, sample, bench (RECIPE=engines/tiny.toml)
	$(BIN)/sana-export engines $(RECIPE)

bench: $(STAMP) ## latency against eager diffusers, on a checkpoint with 100 million parameters
	$(BIN)/sana-export engines $(BENCH_RECIPE)

test: $(DEV) ## run every test that needs no GPU and is not slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(TEST_FLAGS)

test-slow: $(DEV) ## run the slowest tests (5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(TEST_FLAGS)

test-browser: $(DEV) ## draw with examples/javascript in headless Chromium (needs npm and a browser)
	cd examples/javascript && npm install --no-package-lock --no-audit --no-fund
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS) tests/test_example_javascript.py

fuzz: $(DEV) ## run the property-based tests with many new inputs (FUZZ_INPUTS=2000 for each test)
	SANA_EXPORT_FUZZ=$(FUZZ_INPUTS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) $(TEST_FLAGS) tests/fuzz tests/serve/test_openapi.py

test-lowest: $(LOWEST)/.installed ## run the tests of sampling and of engine builds with the lowest versions that are allowed
	$(call runtime-tests,$(LOWEST))

test-lowest-export: $(LOWEST_EXPORT)/.installed ## run the tests of exports with the lowest versions (several GB with CUDA's PyTorch)
	OMP_NUM_THREADS=1 $(LOWEST_EXPORT)/bin/python -m pytest -m "not gpu" $(TEST_FLAGS) \
		tests/checkpoint tests/export tests/graphs tests/synth tests/verify

test-newest: $(NEWEST)/.installed ## the same as test-lowest with the newest versions (NEWEST_PYTHON=python3.13)
	$(call runtime-tests,$(NEWEST))

# The tests that need no PyTorch, in the environment $(1). The bundles are exported outside.
define runtime-tests
rm -rf $(1)/bundles
OMP_NUM_THREADS=1 $(BIN)/python -m tools.lowest bundles $(1)/bundles
SANA_EXPORT_TEST_BUNDLES=$(abspath $(1)/bundles) OMP_NUM_THREADS=1 $(1)/bin/python -m pytest \
	-p tests.support.runtime_only -m "not gpu" $(TEST_FLAGS) tests/formats tests/fuzz tests/runtime tests/trt
endef

$(LOWEST)/.installed: pyproject.toml tools/lowest.py | $(DEV)
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(BIN)/python -m tools.lowest runtime > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet $(PIP_FLAGS) -r $(LOWEST)/requirements.txt
	@touch $@

$(LOWEST_EXPORT)/.installed: pyproject.toml tools/lowest.py | $(DEV)
	test -x $(LOWEST_EXPORT)/bin/python || $(PYTHON) -m venv $(LOWEST_EXPORT)
	$(BIN)/python -m tools.lowest export > $(LOWEST_EXPORT)/requirements.txt
	$(LOWEST_EXPORT)/bin/python -m pip install --quiet $(PIP_FLAGS) -r $(LOWEST_EXPORT)/requirements.txt
	@touch $@

$(NEWEST)/.installed: pyproject.toml | $(DEV)
	test -x $(NEWEST)/bin/python || $(NEWEST_PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet $(PIP_FLAGS) ".[cpu,tensorrt-rtx]" onnx pytest psutil hypothesis
	$(NEWEST)/bin/python -m pip uninstall --quiet --yes sana-export
	@touch $@

test-comfyui: $(DEV) ## run the tests of the nodes on a real ComfyUI (COMFYUI=DIR, COMFYUI_PYTHON=DIR/venv/bin/python)
	mkdir -p $(VENV)/comfyui-bundles
	$(COMFYUI_TESTS) $(BIN)/python -m pytest $(TEST_FLAGS) tests/integrations/test_comfyui.py
	SANA_EXPORT_COMFYUI=$(COMFYUI) $(COMFYUI_TESTS) $(COMFYUI_PYTHON) -m pytest $(TEST_FLAGS) tests/integrations/test_comfyui.py

bindings: $(DEV) ## record the interfaces of TensorRT's versions, which tests compare with what the code uses
	$(BIN)/python -m tools.bindings

lint: $(DEV) ## check style, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu-check: ## run every check and timing that needs a GPU, in at most 30 minutes (WHEELS=DIR: install only from DIR)
	$(GPU_PYTHON) -m tools.gpu_check --venv $(GPU_VENV) $(if $(WHEELS),--wheels $(WHEELS)) --report $(GPU_REPORT) $(GPU_FLAGS)

clean: ## remove everything that was built, except the virtual environment
	rm -rf engines/out benchmarks/out build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
