# Two commands on a fresh machine: `make demo` and `make test`. Both make their own environment in .venv.
# Needed before: Python 3.11 or newer, a C compiler, make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENV := $(VENV)/.installed
# Two processes, each test file in one of them: what a file's tests share is made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-slow test-all coverage lint format asan bench native clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(ENV): pyproject.toml setup.py constraints.txt $(wildcard runtimes/native/*.c runtimes/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "vlm-edge needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(ENV)  ## export the shipped trained model, lower it to 4-bit, describe pictures without PyTorch
	$(BIN)/python -m benchmarks.demo

test: $(ENV)  ## the fast tests (a few minutes on 2 cores)
	$(PYTEST)

test-slow: $(ENV)  ## the slow tests
	$(PYTEST) -m slow

test-all: $(ENV)  ## all tests in one run, so that exported bundles are shared
	$(PYTEST) -m 'slow or not slow'

lint: $(ENV)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(ENV)  ## let ruff put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

native: $(ENV)  ## rebuild the C extension in place
	$(BIN)/python setup.py --quiet build_ext --inplace

coverage: $(ENV)  ## verify every system and write the coverage table (families/coverage.json, README.md)
	$(BIN)/python -m pytest -n 2 -m 'slow or not slow' tests/coverage --write-coverage
	$(BIN)/python -m benchmarks.coverage_table

asan: $(ENV)  ## the native tests under AddressSanitizer and UndefinedBehaviorSanitizer, whole sessions under ThreadSanitizer
	$(BIN)/python -m benchmarks.asan

bench: $(ENV)  ## ours beside transformers, OpenVINO, llama.cpp and onnxruntime-genai, interleaved (BENCH="--tiles 17", "--help" …)
	$(BIN)/python -m benchmarks.peers $(BENCH)

clean:  ## remove what was built here
	rm -rf $(VENV) build dist .cache *.egg-info runtimes/vlm_edge_runtime/*.so
