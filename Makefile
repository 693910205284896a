# make demo: text -> trained, packed, scored GPT.   make test: everything that can be checked here.
# Each target sets up what it needs in .venv and re-uses it. PYTHON= names another interpreter, PIP_FLAGS= goes to pip,
# ARGS= goes to the command (make demo ARGS="--set max_seconds=60"), JOBS= is how many test files run at a time.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
JOBS   ?= 2
# Of machines with torch 2.11: the tests compile every kernel with it too.
OTHER_TRITON := 3.6.0
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test bench lint setup clean

demo: $(VENV)/.built
	rm -rf runs/demo
	$(BIN)/pgolf demo --run runs/demo --data data/stdlib $(ARGS)

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.tested
	$(BIN)/python -m benchmarks.bench $(ARGS)

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cuh' -o -name '*.cu' | xargs -r $(BIN)/clang-format --dry-run --Werror

setup: $(VENV)/.built

clean:
	rm -rf build $(VENV) pgolf_kernels/_*.so

# One line instead of a traceback for each thing a bare machine may lack.
$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing; install Python 3.11 or later, or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; set PYTHON= to a later one"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: Python's venv module is missing; on Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.built: $(VENV)/bin/python constraints.txt $(SOURCES)
	@command -v $${CXX:-g++} >/dev/null || { echo "make: a C++ compiler is missing; on Debian: apt install g++"; exit 1; }
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "make: Python.h is missing; on Debian: apt install python3-dev"; exit 1; }
	$(BIN)/python -m pip install --quiet --quiet $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --quiet $(PIP_FLAGS) -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --quiet $(PIP_FLAGS) --no-deps --upgrade --target $(VENV)/triton-$(OTHER_TRITON) triton==$(OTHER_TRITON)
	@touch $@ $(VENV)/.built
