PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test lint format docs dist clean

help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(VENV)/.dev  ## create .venv with everything that the other targets need

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.demo: $(VENV)/.made setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.made setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.docs: $(VENV)/.made setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

demo: $(VENV)/.demo  ## choose what to train on, on embedded data, at three budgets (a few minutes)
	$(BIN)/python -m experiments.vision experiments/configs/demo.yaml --out runs/demo

test: $(VENV)/.dev  ## the tests, on all cores
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

lint: $(VENV)/.dev  ## ruff (lint, format), mypy, and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## rewrite the sources as ruff would have them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs  ## the pages of docs/ and the reference, in site/; a dead link or an undocumented name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/.dev  ## wheel and sdist in dist/, installed into a clean environment and tried
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist
	$(BIN)/python tests/support/clean_install.py dist

clean:  ## remove the environment, all runs, and what was built
	rm -rf $(VENV) runs site dist build
