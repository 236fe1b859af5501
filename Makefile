# `make demo` and `make test` need Python >= 3.11, a C++ compiler with OpenMP, make and, once, a network connection;
# they install everything else into .venv. PYTHON=... selects the interpreter of a new .venv.

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

# A process for each core. Each starts with a contiguous share of the tests, which reuse what it has compiled, and then
# steals from the others. Idle OpenMP threads sleep: spinning, they would take the other processes' time.
PARALLEL := --numprocesses=auto --dist=worksteal
PYTEST ?= $(PARALLEL)
RUN_TESTS := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

test: $(VENV)/.dev ## Run the tests (some six minutes on two cores); PYTEST="-k golden" passes options
	$(RUN_TESTS) $(PYTEST)

# Separate from `test`, because tracing adds a third to its time, and XLA's optimization half.
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

format: $(VENV)/.dev ## Format the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean: ## Remove the environment and all generated files
	rm -rf $(VENV) build dist batchnorm-report* bench-report .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than Python 3.11; choose another with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The build requirements of pyproject.toml. The second step adds CMake and Ninja if the system lacks them.
REQUIREMENTS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])
ALL_REQUIREMENTS := $(REQUIREMENTS); import scikit_build_core.build as build; print(*build.get_requires_for_build_editable())

# Without isolation: pip isolates each build in a new temporary folder, and scikit-build-core, which sees that it has
# moved, would delete the compiled files. Dependencies are installed after the extension: without isolation pip could not
# build one that has no wheel. Stamps are newer than pyproject.toml, so that a second run starts at once.
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
