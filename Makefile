# Every target makes its own environment in .venv first. Needed beforehand: make, and Python 3.10 to 3.13 with venv
# (Debian: apt-get install make python3 python3-venv). Another interpreter, for which .venv is made anew:
# make test PYTHON=python3.12; beside the first: make test PYTHON=python3.12 VENV=.venv-3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
BED := $(VENV)/.testbed
LIMIT ?= 900
PYTHONS ?= 3.10 3.11 3.12 3.13
PYTEST := $(BIN)/pytest --numprocesses auto --dist loadgroup
# Of every Python: what it compiles, loads, prints and forks differently. The kernels' arithmetic is LLVM's.
SHORT := tests/test_engine.py tests/test_batch.py tests/test_awaiting.py tests/test_notifications.py tests/test_operands.py \
  tests/cli/test_main.py tests/cli/test_serve.py tests/discovery tests/providers tests/kernels/test_jit.py \
  tests/sim/test_config.py tests/wires/test_transfers.py

# Which interpreter the environment was made by, told apart by its version and place.
IDENTITY := import sys; print(*sys.version_info[:3], sys.base_prefix, sep=".")
ifneq ($(filter command environment,$(firstword $(origin PYTHON))),)
  ifneq ($(shell $(PYTHON) -c '$(IDENTITY)' 2> /dev/null),$(shell cat $(STAMP) 2> /dev/null))
    ANOTHER := another-interpreter
  endif
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fence test-short test-pythons test-surroundings test-rdma test-rdma-two-hosts check bench fuzz notebooks clean another-interpreter

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 28

setup: $(STAMP)  ## make the environment: Mooncache in editable form, its extras, its development tools

demo: setup  ## reproduce the incident and compare where deletion happens
	$(BIN)/mooncache demo

test: setup  ## run all tests, on all cores (ARGS="-k name")
	$(PYTEST) $(ARGS)

test-fence: setup  ## run the tests of kernels with guard pages around all that they index
	FENCE=low $(PYTEST) -p tests.fence tests/kernels
	FENCE=high $(PYTEST) -p tests.fence tests/kernels

test-short: setup  ## run the tests of what differs between Pythons
	$(PYTEST) $(SHORT) $(ARGS)

test-pythons:  ## run these under every Python found of PYTHONS="3.10 3.11 3.12 3.13", each in its own .venv-VERSION
	@for version in $(PYTHONS); do \
	  found=; for python in python$$version ~/.pyenv/versions/$$version.*/bin/python; do \
	    if $$python -c 'import ensurepip, venv' 2> /dev/null; then found=$$python; break; fi; done; \
	  if [ -z "$$found" ]; then echo "== Python $$version: not here"; continue; fi; \
	  echo "== Python $$version: $$found"; \
	  $(MAKE) --no-print-directory test-short PYTHON=$$found VENV=.venv-$$version || exit 1; \
	done

test-surroundings: setup  ## run tests without home, terminal, root, signals and the like, see tests/surroundings.py
	$(BIN)/python -m tests.surroundings --numprocesses auto --dist loadgroup $(ARGS)

test-rdma: $(BED)  ## run the RDMA tests in a virtual machine with an RDMA device (ARGS="-k name", LIMIT=seconds)
	$(BIN)/python -m tests.testbed --limit $(LIMIT) test $(ARGS)

test-rdma-two-hosts: $(BED)  ## run the RDMA tests between two virtual machines (ARGS, LIMIT as above)
	$(BIN)/python -m tests.testbed --limit $(LIMIT) two-hosts $(ARGS)

check: setup  ## lint, format, types, and who may import whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## measure this machine, into results/
	mkdir -p results
	$(BIN)/mooncache bench lifecycle --json > results/bench_lifecycle.json
	$(BIN)/mooncache bench gil --json > results/bench_gil.json
	$(BIN)/mooncache bench soak --json > results/bench_soak.json
	$(BIN)/mooncache bench placement --json > results/bench_placement.json
	$(BIN)/mooncache bench transfer --json > results/bench_transfer.json
	$(BIN)/mooncache bench latency --json > results/bench_latency.json
	$(BIN)/mooncache bench post --json > results/bench_post.json
	$(BIN)/mooncache bench copy --json > results/bench_copy.json
	@if [ -n "$$(ls /sys/class/infiniband 2> /dev/null)" ]; then $(BIN)/mooncache bench rdma --json > results/bench_rdma.json; fi
	@echo "Written: results/bench_lifecycle.json, _gil, _soak, _placement, _transfer, _latency and _post"

fuzz: setup  ## run the seeded random tests with many more examples
	HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest tests -m fuzz

notebooks: setup  ## make .ipynb files beside notebooks/*.py, to open in Jupyter
	$(BIN)/jupytext --quiet --to ipynb notebooks/*.py

clean:  ## remove the environment, caches and build products; results/ stays
	rm -rf .venv .venv-* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml $(ANOTHER)
	@command -v $(PYTHON) > /dev/null || { \
	  echo "$(PYTHON) not found: install Python 3.10 to 3.13 (Debian: apt-get install python3 python3-venv), or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || { \
	  echo "Mooncache needs Python 3.10 to 3.13, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "$(PYTHON) has no venv or no pip to put into one: install them (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "Making $(VENV) with Mooncache, all its extras but rdma, and development tools: some minutes, 1 GB"
	$(PYTHON) -m venv $(if $(ANOTHER),--clear) $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@$(PYTHON) -c '$(IDENTITY)' > $@

$(BED): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[testbed]'
	@touch $@
