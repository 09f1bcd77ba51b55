# kvtier: `make demo` and `make test` need Python 3.11 or newer and this file, nothing else; the rest goes into .venv.

PYTHON ?= python3
FAMILY ?= llama
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# Without an NVIDIA driver the CPU build of torch will do; where its host cannot be reached, the usual index decides.
CPU_WHEELS := https://download.pytorch.org/whl/cpu
TORCH_INDEX = $(shell test -e /proc/driver/nvidia/version || { \
    $(PYTHON) -c 'import urllib.request as r; r.urlopen("$(CPU_WHEELS)/torch/", timeout=5)' 2>/dev/null && \
    echo --extra-index-url $(CPU_WHEELS); })

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-triton stress lint bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

venv: $(STAMP) ## make .venv with every pinned dependency

demo: $(STAMP) ## a conversation with and without kvtier, then again in a second process; FAMILY=deepseek_v4
	$(BIN)/python -m kvtier demo --family $(FAMILY)

test: $(STAMP) ## the tests that need neither a GPU nor the network
	$(BIN)/python -m pytest -q -m "not gpu and not stress" --numprocesses auto --maxprocesses 4

test-triton: $(STAMP) ## the kernels for a GPU, by triton's interpreter; installs triton, about 1 GB
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable ".[gpu]"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "not gpu and not stress" --numprocesses auto --maxprocesses 4 \
	    -k "device_pages or DeviceTensors or OnDevice" tests/kernels tests/pages tests/cache/test_device_tier.py

stress: $(STAMP) ## the long tests
	$(BIN)/python -m pytest -q -m "stress and not gpu" --timeout 7200

lint: $(STAMP) ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy kvtier benchmarks
	$(BIN)/lint-imports

bench: $(STAMP) ## every benchmark that runs on this machine
	$(BIN)/python -m benchmarks all

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "kvtier needs Python 3.11 or newer; set PYTHON=, for example: make test PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt pip setuptools
	$(PIP) install --quiet --constraint constraints.txt $(TORCH_INDEX) torch
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable ".[fast,hf,dev]"
	@touch $@
