# Every target sets up what it needs: a machine with python3 (>= 3.10) and make is enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# the oldest Triton that is supported, which GPU images ship: kernels are compiled with both
OLDEST := $(VENV)/triton-3.6.0
PYTEST := $(BIN)/python -m pytest -q --durations=5
# Material's notice that MkDocs has a successor is not about a build
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup train bench bench-verbs report docs docs-serve \
        test test-spec test-interp test-compile test-optim test-docs test-gpu gpu-evidence check format clean

help:            ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "python3 >= 3.10 is needed, found $$($(PYTHON) --version)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3 cannot make virtual environments here; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cli,dev,docs]'
	@touch $@

$(OLDEST): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0
	@touch $@

setup: $(READY) ## create .venv with pinned dependencies

train: $(READY)  ## train a small language model and compare optimizers (ARGS="--help" lists the options)
	$(BIN)/lowmem train $(ARGS)

bench: $(READY)  ## time optimizer steps against others', table and plot under runs/bench (ARGS="--help" lists the options)
	$(BIN)/lowmem bench --out runs/bench --plot runs/bench/bench.png $(ARGS)

bench-verbs: $(READY) ## time single verbs with pytest-benchmark (ARGS="-k adamw" chooses)
	$(BIN)/python -m pytest -q bench/verbs $(ARGS)

report: $(READY) ## what can be known of the kernels without a GPU, into bench/static_report (budget: 6 minutes)
	$(BIN)/python bench/static_report.py

docs: $(READY)   ## the documentation as a site, in site/; a broken link is an error (budget: 20 seconds)
	$(MKDOCS) build --strict

docs-serve: $(READY) ## the same on http://127.0.0.1:8000, built again whenever a page or docstring changes
	$(MKDOCS) serve

test: test-spec test-interp test-compile test-optim test-docs ## every tier that needs no GPU

test-spec: $(READY) ## references against float64 oracles (budget: 2 minutes)
	$(PYTEST) tests/spec -n 2

test-interp: $(READY) ## kernels in Triton's interpreter (budget: 4 minutes)
	TRITON_INTERPRET=1 $(PYTEST) tests/interp -n 2

test-compile: $(READY) $(OLDEST) ## kernels compiled for sm_80, sm_90, sm_100 and gfx942 (budget: 4 minutes)
	$(PYTEST) tests/compile -n 2 --dist loadgroup
	PYTHONPATH=$(OLDEST) $(PYTEST) $(addprefix tests/compile/test_,elementwise.py custom_verb.py factored.py multinorm.py projection.py lowrank.py tickets.py) -n 2 --dist loadgroup

test-optim: $(READY) ## optimizers, checkpoints, command line (budget: 5.5 minutes)
	$(PYTEST) tests/optim -n 2

test-docs: $(READY) ## code blocks of the pages, and links and pictures of the site (budget: 1 minute)
	$(PYTEST) tests/docs -n 2 --dist loadfile

test-gpu: $(READY) ## kernels and optimizers on this machine's GPU
	$(PYTEST) tests/gpu

gpu-evidence: $(READY) ## all that is to be known on this machine's GPU, in one folder, in nine minutes (docs/gpu-evidence.md)
	$(BIN)/python bench/gpu_evidence.py $(ARGS)

check: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## rewrite files as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:           ## remove the environment, runs and caches
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache
