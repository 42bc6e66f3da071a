# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each makes its own virtual environment (.venv) and installs what it needs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
SEEDS  ?= 1
OUT    ?= out
BIN     = $(VENV)/bin
PY      = $(BIN)/python

# One thread for the numeric libraries under test: two cores must not fight over pools.
ONE_THREAD = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1

.PHONY: help demo real test test-slow test-real test-gpu test-peers typecheck-tensorrt lint format protos clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

$(VENV)/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "no python3 on PATH: install Python 3.11 or newer, or call make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: install Python 3.11 or newer, or call make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

$(VENV)/.installed-all: pyproject.toml | $(VENV)/pyvenv.cfg
	$(BIN)/pip install -q -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/pyvenv.cfg
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@ $(VENV)/.installed-all

demo: $(VENV)/.installed-all  ## the main job on rendered streets: SEEDS=1, report in out/demo/report.html
	$(PY) -m bench.demo --seeds $(SEEDS) --out $(OUT)/demo

real: $(VENV)/.installed-all  ## the main job on real frames (ROADWORTHY_DATA), SEEDS=3: docs/results/real-domain-shift.md
	$(PY) -m bench.real --seeds $(if $(filter file,$(origin SEEDS)),3,$(SEEDS)) --out $(OUT)/real

test: $(VENV)/.installed-dev  ## the test suite, under 10 minutes on two cores
	$(ONE_THREAD) $(PY) -m pytest tests

test-slow: $(VENV)/.installed-dev  ## the long tests
	$(ONE_THREAD) $(PY) -m pytest tests -m "slow and not real and not gpu and not peers"

test-real: $(VENV)/.installed-dev  ## tests on the real driving frames; skipped with a reason where they are absent
	$(ONE_THREAD) $(PY) -m pytest tests -m "real and not gpu and not peers"

test-gpu: $(VENV)/.installed-dev  ## tests that need a CUDA device
	$(PY) -m pytest tests -m gpu

test-peers: $(VENV)/.installed-dev  ## tests against other servers and NVIDIA's wheels
	$(ONE_THREAD) $(PY) -m pytest tests -m peers

lint: $(VENV)/.installed-dev  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

typecheck-tensorrt: $(VENV)/.installed-dev  ## our TensorRT code against NVIDIA's real bindings, 10 and 11 (no GPU)
	$(PY) -m tools.trt_stubs
	$(ONE_THREAD) $(PY) -m pytest tests/tensorrt/test_stubs.py -m peers

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.installed-dev  ## regenerate the gRPC stubs
	$(PY) -m protos.generate

clean:  ## remove what the commands above made, the virtual environment included
	rm -rf $(OUT) $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
