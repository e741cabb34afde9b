# Every target makes .venv if it is missing or does not run here, reuses it otherwise, and installs only what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

# A virtual environment that was copied or moved, or whose Python is gone, is made anew.
HERE := $(CURDIR)/$(VENV)
VENV_STATE := $(shell test -e $(VENV) || { echo absent; exit; }; \
	test "$$(cat $(VENV)/.where 2>/dev/null || echo '$(HERE)')" = '$(HERE)' && \
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo ready || echo broken)

unexport PYTHONDONTWRITEBYTECODE  # packages are compiled when they are first imported (--no-compile), once

.PHONY: help demo test test-exhaustive lint bench docs results clean FORCE
.NOTPARALLEL:

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/'

demo: $(VENV)/.installed-data-report  ## train a small network on digits, follow its local elasticity, write a page
	$(BIN)/local-elasticity track --data digits --classes 0 1 8 --network mlp --optimizer adam --lr 1e-3 --epochs 3 \
	  --probes-per-class 20 --every 9 --update adam:1e-4 --definition kl --definition kl_published --seed 0 \
	  --out runs/digits

TESTED := $(VENV)/.installed-data-report-regression-dask-ray-test
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test: $(TESTED)  ## the tests, and the README's code
	$(PYTEST) -m "not exhaustive"

test-exhaustive: $(TESTED)  ## the tests that take long: clusters, browsers, kills, tiny studies, every route
	$(PYTEST) -m exhaustive $$(grep -rl 'mark\.exhaustive' tests --include='*.py')

lint: $(VENV)/.installed-data-report-lint  ## style, formatting and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.installed-data-report  ## time a snapshot beside the plain loop and the bare passes
	$(BIN)/local-elasticity bench snapshot

results: $(VENV)/.installed-data-report-regression-cluster  ## run every study at small scale, keep tables and figures in docs/results
	$(BIN)/local-elasticity reproduce all --scale small --jobs 2 --results docs/results || test $$? -eq 1
	cp docs/results/timings.json src/local_elasticity/studies/engine/timings.json

docs: $(VENV)/.installed-data-report-test  ## run the Python code in README.md and docs/ (builds no site)
	$(BIN)/python -m pytest -q README.md docs

clean:  ## remove .venv and the caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

# The stamp's name spells the extras: .installed-data-report-test is ".[data,report,test]".
comma := ,
empty :=
space := $(empty) $(empty)

$(VENV)/.installed-%: pyproject.toml constraints.txt $(if $(filter ready,$(VENV_STATE)),,FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, got: $$($(PYTHON) --version 2>&1); use make PYTHON=/path/to/python3.11"; exit 1; }
	test "$(VENV_STATE)" = ready || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(PIP) install --no-compile -c constraints.txt -e ".[$(subst $(space),$(comma),$(subst -,$(space),$*))]"
	@echo '$(HERE)' > $(VENV)/.where
	@touch $@

FORCE:
