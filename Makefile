# supersonic-moe: two commands matter, `make demo` and `make test`. `make help` lists the rest.
#
# Everything runs in .venv, which the first command creates. A machine whose own python3 already has a CUDA build of torch
# (a GPU box, often without network) is used as it is: nothing is installed there.
#
#   TORCH=torch==2.11.0   another torch          PYTHON=python3.12   another interpreter for .venv
#   ARGS="-k plan -x"     passed on to the command (pytest, demo)
#   WORKERS=8             processes of make test (2 otherwise) and make test-gpu (10 otherwise)

SHELL := bash
.SHELLFLAGS := -o pipefail -c

TORCH   ?= torch==2.13.0
ARGS    ?=
WORKERS ?= $(if $(filter test-gpu,$(MAKECMDGOALS)),10,2)
VENV  := .venv

export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# For the tests; the command line sets it itself, and says why (src/supersonic_moe/cli/__init__.py).
export OMP_WAIT_POLICY ?= PASSIVE

# --- which interpreter ------------------------------------------------------------------------------------------------
IMPORTS := torch, typer, rich, matplotlib
ifneq ($(filter test%,$(MAKECMDGOALS)),)
IMPORTS := $(IMPORTS), pytest, xdist, hypothesis
endif
ifneq ($(filter demo docs wheel test%,$(MAKECMDGOALS)),)
GPU_READY := $(shell python3 -c 'import $(IMPORTS); print(*["yes"] * torch.cuda.is_available())' 2>/dev/null)
endif

ifeq ($(GPU_READY),yes)
PY := python3
else
PY := $(VENV)/bin/python
RUN_READY  := $(VENV)/.ready-run
TEST_READY := $(VENV)/.ready-test
endif

BASE = $(shell for p in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
         "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; exit; }; done)

# --- commands ---------------------------------------------------------------------------------------------------------
.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu sass-table lint docs wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(RUN_READY) ## train a byte-level MoE language model on Python's own source: 3 minutes on 2 CPU cores
	@$(PY) -m supersonic_moe demo $(ARGS)

PYTEST = $(PY) -m pytest --numprocesses $(WORKERS) --dist loadgroup

test test-gpu: export OMP_NUM_THREADS ?= 1
test: $(TEST_READY) ## every test that needs no GPU
	@$(PYTEST) -m "not gpu and not multigpu" $(ARGS)

test-gpu: $(TEST_READY) ## every test, on this machine's GPU (those marked multigpu want two)
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch sees no CUDA GPU here")'
	@$(PYTEST) $(ARGS)

sass-table: $(TEST_READY) ## compile all CUDA kernels and accept what they are now: tests/kernels/sm90/sass_table.json
	@PYTHONPATH="$$PYTHONPATH:tests/support" $(PY) -m sass_table

lint: $(VENV)/.ready-lint ## ruff, and mypy --strict on the package
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

docs: $(RUN_READY) ## write the generated tables of README.md and docs/ from benchmarks/results and the program
	@$(PY) -m supersonic_moe.bench.readme
	@$(PY) -m supersonic_moe.cli.reference

wheel: $(TEST_READY) ## build dist/*.whl with compiled kernels: all in CUDA, and those in Triton of published models
	@$(PY) -m supersonic_moe.cli.ship
	@PYTHONPATH="$$PYTHONPATH:tests/support" $(PY) -m shipped_layers
	@$(PY) -m pip wheel . --no-deps --quiet --wheel-dir dist && ls -lh dist/*.whl

clean: ## remove .venv, caches, build and demo output
	rm -rf $(VENV) demo-out dist build src/supersonic_moe/kernels/*/cubins .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up: one stamp for each set of dependencies -------------------------------------------------------------------
# pip's log boiled down to the names of the packages: nothing is silent for long, nothing scrolls away.
TEST_EXTRAS := 'import torch; print("test" if torch.version.cuda else "test,test-cpu")'

define install
@echo "Installing $(1):"
@$(VENV)/bin/python -m pip install --progress-bar off $(2) \
  | awk '/^Collecting /{printf " %s", $$2} /^ *Downloading .* MB/{printf " %s %s", $$(NF - 1), $$NF} {fflush()} END{print ""}'
@touch $@
endef

$(VENV)/bin/python:
	@test -n "$(BASE)" || { echo "supersonic-moe needs Python 3.11 or newer: found $$(python3 -V 2>&1). Install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Creating $(VENV) with $$($(BASE) -V)"
	@$(BASE) -m venv --clear $(VENV) >/dev/null 2>&1 \
	  || { $(BASE) -m venv --clear --without-pip $(VENV) && $(BASE) -m pip --python $@ install -q pip; } \
	  || { rm -rf $(VENV); echo "$(BASE) can make no virtual environment: it lacks venv, or both ensurepip and pip. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

$(VENV)/.ready-run: pyproject.toml | $(VENV)/bin/python
	$(call install,$(TORCH) and supersonic-moe into $(VENV),"$(TORCH)" -e ".[cli]")

$(VENV)/.ready-test: $(VENV)/.ready-run
	$(call install,test dependencies,"$(TORCH)" -e ".[$$($(VENV)/bin/python -c $(TEST_EXTRAS))]")

$(VENV)/.ready-lint: $(VENV)/.ready-test
	$(call install,linters,"$(TORCH)" -e '.[lint]')
