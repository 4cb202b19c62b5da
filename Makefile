# Every door of the project. `make help` lists them; each sets up .venv by itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
WORKERS ?= 2

# Spinning OpenMP threads make everything 5-20 x slower on shared cores.
export OMP_WAIT_POLICY ?= passive
export OMP_NUM_THREADS ?= 2
export HF_HUB_DISABLE_TELEMETRY = 1
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check format lint types imports bench lock clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## Create .venv from the lock (only wheels: no compiler needed)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("autocompress needs Python >= 3.11, but $(PYTHON) is " + sys.version.split()[0] + ". Next step: make $(MAKECMDGOALS) PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

demo: $(READY)  ## Search a real model (MiniLM) on 2 Ray workers, export a member, reload and verify it
	$(BIN)/python benchmarks/demo.py

# One thread per pytest worker: BLAS threads of two workers would fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: $(READY)  ## The default suite (a few minutes on 2 cores, no network)
	$(PYTEST)

test-all: $(READY)  ## The default suite and the slow end-to-end tests
	$(PYTEST) -m "slow or not slow"

check: format lint types imports test  ## All that CI runs

format: $(READY)  ## Formatting is as ruff would have it
	$(BIN)/ruff format --check .

lint: $(READY)  ## Lint
	$(BIN)/ruff check .

types: $(READY)  ## Strict types
	$(BIN)/mypy

imports: $(READY)  ## Imports go one way
	$(BIN)/lint-imports

BENCHES := driver_overhead driver_efficiency ray_tune_overhead sampler_overhead solver_speed bank \
	prefix_sharing methods_speed kernels deployed_memory replay_samplers scale_simulation budget_on_paper

bench: $(READY)  ## Run the short benchmarks (benchmarks/README.md); each writes its JSON to results/
	for name in $(BENCHES); do $(BIN)/python benchmarks/$$name.py || exit 1; done

lock: $(READY)  ## Write requirements.lock from what is installed in .venv
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^gemma3-270m' | sed -E 's/\+cpu$$//' > requirements.lock

clean:  ## Remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
