PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# two files of tests at a time, one thread in each process: the models are tiny
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: train test test-slow lint clean

train: .venv/runtime     ## install, then train the default model: make train ARGS="model=lstm max_steps=200"
	$(BIN)/python -m leanlm.train $(ARGS)

test: .venv/dev          ## install, then run the test suite: make test ARGS="tests/data"
	$(TEST) $(ARGS)

test-slow: .venv/dev     ## the tests that take minutes
	$(BIN)/python -m pytest -m slow --timeout=1800 $(ARGS)

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "leanlm needs Python 3.11 to 3.13, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv .venv

.venv/runtime: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/dev: .venv/runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build src/*.egg-info
