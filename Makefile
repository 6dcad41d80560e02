# A thin front of the `dlcm` command: every target makes the environment first, once.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/run/quickstart.yaml
RUNS ?= runs
ARGS ?=

# make takes `name=x` on its command line for a variable of its own, and would ignore it.
KNOWN := PYTHON VENV CONFIG RUNS ARGS MAKEFLAGS SHELL
GIVEN := $(foreach _one,$(.VARIABLES),$(if $(filter command line,$(origin $(_one))),$(_one)))
ifneq ($(filter-out $(KNOWN),$(GIVEN)),)
$(error $(foreach _one,$(filter-out $(KNOWN),$(GIVEN)),$(_one)=$($(_one)): make has no such variable. \
    A field of the run is written ARGS="$(_one)=$($(_one))";) the variables are PYTHON, VENV, CONFIG, RUNS, ARGS)
endif

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup pretrain test test-distributed test-slurm gpu check tensorboard clean

help:
	@echo 'make setup        make the environment in $(VENV) (every other target does it when needed)'
	@echo 'make pretrain     train $(CONFIG); called again, continue it'
	@echo '                  another run:   make pretrain CONFIG=configs/run/smoke.yaml'
	@echo '                  other values:  make pretrain ARGS="seed=1 optim.total_tokens=1000000"'
	@echo 'make tensorboard  show the curves of all runs in $(RUNS)/'
	@echo 'make test         run the test suite      (part of it: make test ARGS="tests/test_compose.py")'
	@echo 'make test-distributed  gradients, resuming, other ranks and strategies in full (several processes, a quarter of an hour)'
	@echo 'make test-slurm   jobs on a real SLURM of this machine: preempted, out of time, cancelled, hung (needs root, minutes)'
	@echo 'make gpu          everything that only a GPU can say: tests, engines, speed, in at most 20 minutes'
	@echo 'make check        lint and check the types'
	@echo 'make clean        remove caches and build files; the environment, data and runs stay'

setup: $(STAMP)
	@echo 'The environment in $(VENV) is ready'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "PYTHON = $(PYTHON): this needs Python 3.11 or newer; try make PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo 'Making the environment in $(VENV)'; \
	    $(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; }
	@echo 'Installing dlcm_lightning and what it needs into $(VENV) (minutes the first time)'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Inside an allocation of SLURM, but not inside one of its steps, it starts a process per GPU on every node. The shell of
# salloc is a step of its own on some sites, which has this number.
INTERACTIVE_STEP := 4294967290
pretrain: $(STAMP)
	@if [ -n "$$SLURM_JOB_ID" ] && [ "$${SLURM_STEP_ID:-$(INTERACTIVE_STEP)}" = $(INTERACTIVE_STEP) ]; then \
	    DLCM_PYTHON="$(abspath $(BIN)/python)" CONFIG=$(CONFIG) exec bash slurm/job.sh $(CONFIG) $(ARGS); \
	else exec $(BIN)/dlcm pretrain $(CONFIG) $(ARGS); fi

test: $(STAMP)
	@$(BIN)/python -m pytest -q -n logical --maxprocesses=8 --dist loadfile --no-loadscope-reorder $(ARGS)

test-distributed: $(STAMP)
	@$(BIN)/python -m pytest -q -m '' tests/distributed $(ARGS)

test-slurm: $(STAMP)
	@$(BIN)/python -m pytest -q -m '' tests/slurm $(ARGS)

gpu: $(STAMP)
	@exec $(BIN)/python -m benchmarks.gpu $(ARGS)

check: $(STAMP)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy

tensorboard: $(STAMP)
	@exec $(BIN)/tensorboard --logdir $(RUNS)

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
