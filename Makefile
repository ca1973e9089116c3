# make book builds the book, make test checks everything. Both work in a fresh clone: the first run makes .venv.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/installed-requirements.txt
WORKERS ?= 2

# One thread a process: the processes share the cores, and numbers agree between machines.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1
unexport MPLBACKEND

NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg
CHAPTER_FOLDERS := $(sort $(dir $(wildcard book/*/*.ipynb)))
SPREAD := -n $(WORKERS) --dist loadscope --no-loadscope-reorder

.PHONY: help book html refresh test quick kernels lint bench clean setup

help: ## show this list
	@echo "make COMMAND, where COMMAND is"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: ## make .venv and install requirements.txt (the other commands do this first)
	@bash .ci/setup $(VENV) $(STAMP)

book: setup ## execute copies of the chapters and build the book from them: _build/html/index.html
	@$(PYTHON) -m book.support.build execute
	@$(PYTHON) -m book.support.build html

html: setup ## build the book again from the copies that `make book` executed
	@$(PYTHON) -m book.support.build html

refresh: setup ## run the chapters (CHAPTERS="a.ipynb b.ipynb", default all) and rewrite their committed outputs
	@$(PYTHON) -m book.support.build refresh $(CHAPTERS)

lint: setup ## ruff and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

test: lint ## style, types, every test, every chapter cell by cell, and the built book in a browser
	@$(PYTHON) -m pytest $(SPREAD) --durations=15 -rs $(NBVAL) tests/book $(CHAPTER_FOLDERS) tests

quick: lint ## style, types and the fast tests of the library: under a minute
	@$(PYTHON) -m pytest -q $(SPREAD) -m "not slow" tests --ignore tests/book

kernels: setup ## the stored rows and the chapters once more, on the arithmetic of an older CPU
	@$(PYTHON) tests/kernels.py $(PYTHON) -m pytest $(SPREAD) -rs $(NBVAL) tests/book/test_rows.py $(CHAPTER_FOLDERS)

bench: setup ## speed against naive versions; BENCH_SAVE=1 BENCH_DEVICE="name" stores the ratios
	@mkdir -p _build
	@$(PYTHON) -m pytest -q tests/benchmarks --benchmark-only --benchmark-json=_build/benchmarks.json
	@$(PYTHON) tests/benchmarks/ratios.py _build/benchmarks.json

clean: ## remove what was built (not .venv)
	@rm -rf _build .hypothesis .pytest_cache .mypy_cache .ruff_cache .benchmarks
	@find book mmlib tests -name __pycache__ -type d -prune -exec rm -rf {} +
