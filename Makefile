# `make demo` and `make test` need Python >= 3.11, make and a network connection once; everything else they install
# themselves into .venv. PYTHON=... chooses the interpreter of a new .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help demo test coverage bench sanitize lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.train ## Train LeNet with and without batch norm on real digits (half a minute); DEMO="--epochs 5" passes options
	$(BIN)/batchnorm train $(DEMO)

# A process for each core; by halves of the tests, which share what a process has compiled, and then whatever is left of
# another's. Idle OpenMP threads sleep: they would take the other processes' time.
PARALLEL := --numprocesses=auto --dist=worksteal
PYTEST ?= $(PARALLEL)
RUN_TESTS := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

test: $(VENV)/.dev ## Run the tests (some seven minutes on two cores); PYTEST="-k golden" passes options
	$(RUN_TESTS) $(PYTEST)

# Apart from `test`, since tracing adds a third to its time and XLA's optimization half.
coverage: export XLA_FLAGS := --xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true
coverage: $(VENV)/.dev ## Run the tests on programs as users have them, with coverage of what pyproject.toml lists
	$(RUN_TESTS) $(PARALLEL) --cov=batchnorm --cov-fail-under=95

bench: $(VENV)/.dev ## Measure the speed against memory and every peer (an hour); BENCH=--quick takes a minute
	$(BIN)/python -m benchmarks.calls
	$(BIN)/python -m benchmarks $(BENCH)

sanitize: $(VENV)/.dev ## Run the kernels, and the extension, under three sanitizers and with hostile calls (eight minutes)
	tests/kernels/sanitize.sh

CPP_FILES := $(wildcard cpp/*.[ch]pp cpp/tests/*.[ch]pp)

lint: $(VENV)/.dev ## Check style (ruff, clang-format) and types (mypy --strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(VENV)/.dev ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean: ## Remove the environment and everything made
	rm -rf $(VENV) build dist batchnorm-report* bench-report .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than Python 3.11; choose another with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The build requirements of pyproject.toml; of CMake and Ninja those that the system lacks, which the second step adds.
REQUIREMENTS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])
ALL_REQUIREMENTS := $(REQUIREMENTS); import scikit_build_core.build as build; print(*build.get_requires_for_build_editable())

# Without isolation: pip's isolated builds lie in a new temporary folder each, and scikit-build-core, seeing that it has
# moved, would delete what is compiled. The extension by itself, and its dependencies after it: without isolation pip
# could not build one that has no wheel. Stamps are newer than pyproject.toml, so that a second run starts at once.
$(VENV)/.native: pyproject.toml constraints.txt CMakeLists.txt $(wildcard cpp/*) | $(BIN)/python
	@echo "Building the extension (some minutes the first time)"
	$(INSTALL) $$($(BIN)/python -c '$(REQUIREMENTS)')
	$(INSTALL) $$($(BIN)/python -c '$(ALL_REQUIREMENTS)')
	$(INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.train: $(VENV)/.native
	@echo "Installing what the demo needs into $(VENV) (once)"
	$(INSTALL) 'batchnorm[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.native
	@echo "Installing what the tests need into $(VENV) (once)"
	$(INSTALL) 'batchnorm[dev]'
	@touch $@ $(VENV)/.train
