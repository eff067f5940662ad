# SPDX-License-Identifier: BSD-3-Clause
# Needs Python 3.10 or later with venv and headers, make and a C++ compiler. What else is needed is installed into VENV.
#   VENV     the virtual environment to make or reuse: make test VENV=$VIRTUAL_ENV
#   PYTHON   the interpreter that VENV is made with
#   TORCH    what to install where VENV has no torch
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
CPP := git ls-files '*.h' '*.cpp' '*.cu' '*.cuh'
# A wait per worker outweighs what it tests beyond eight of them.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

build: $(VENV)/.build-tools  ## compile the library in place, for an editable install
	$(BIN)/python setup.py -q build_ext --inplace

test: build $(VENV)/.with-test  ## run the fast tier of the tests
	$(PYTEST)

test-all: build $(VENV)/.with-test $(VENV)/.with-adoption $(VENV)/.with-examples  ## run the extended tier as well
	FASTRNN_EXTENDED=1 $(PYTEST)

# With all kernels; and installs no more than that takes, so that a machine without a network can have it.
test-gpu: export FASTRNN_CUDA ?= 1
test-gpu: export FASTRNN_PERSISTENT ?= 1
test-gpu: build $(VENV)/.with-test-gpu  ## run the tests that need a CUDA device; GROUPS=persistent: only those
	$(BIN)/python tests/cuda/run.py $(GROUPS)

bench: build $(VENV)/.with-bench  ## compare with torch.nn on this machine
	$(BIN)/python benchmarks/bench.py

lint: $(VENV)/.with-dev  ## check formatting, style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$($(CPP))

format: $(VENV)/.with-dev  ## format the sources
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$($(CPP))

clean:  ## remove what was built, except VENV
	rm -rf build dist fastrnn.egg-info fastrnn/*.so fastrnn/*.dylib

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("fastrnn needs Python 3.10 or later" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch, unless there is one, and what pyproject.toml's [build-system] lists; torch warns where numpy is missing
$(VENV)/.build-tools: pyproject.toml | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install -q 'setuptools>=77' pybind11 ninja numpy
	touch $@

# the package itself, editable, with one extra of pyproject.toml
$(VENV)/.with-%: pyproject.toml setup.py $(VENV)/.build-tools
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[$*]'
	touch $@

.NOTPARALLEL:
.PHONY: help build test test-all test-gpu bench lint format clean
.PRECIOUS: $(VENV)/.with-%
