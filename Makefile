PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
PACKAGE := $(notdir $(patsubst %/__init__.py,%,$(wildcard src/*/__init__.py)))
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# two files of tests at a time, one thread in each process: the models are tiny; many processes import the compiled files
TEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help train test test-slow lint format rename clean

help:                    ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: .venv/runtime     ## install, then train the default model: make train ARGS="model=lstm max_steps=200"
	$(BIN)/python -m leanlm.train $(ARGS)

test: .venv/dev          ## install, then run the test suite: make test ARGS="tests/data"
	$(TEST) $(ARGS)

test-slow: .venv/dev     ## the tests that take minutes
	$(BIN)/python -m pytest -m slow --timeout=1800 $(ARGS)

lint: .venv/dev          ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/dev        ## mend format and style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

rename: | .venv/bin/python ## turn this clone into a package of your own: make rename NAME=mylm
	$(BIN)/python scripts/rename.py $(NAME)
	$(PIP) uninstall --quiet --yes $(PACKAGE)
	$(MAKE) format

clean:                   ## remove .venv and what an install has made
	rm -rf .venv build src/*.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "leanlm needs Python 3.11 to 3.13, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv .venv

.venv/runtime: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

.venv/dev: .venv/runtime
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@
