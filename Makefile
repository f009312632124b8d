PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast lint docs bench clean

demo: .venv/ready  ## fetch the default model and tell a story
	$(BIN)/llmcli generate "Once upon a time"

test: .venv/ready  ## the whole suite, real model included
	$(BIN)/pytest

test-fast: .venv/ready  ## the inner loop: no network, no whole processes
	$(BIN)/pytest -m "not real and not slow"

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/ready  ## the command reference, and what the pages' commands print
	$(BIN)/python tests/reference.py
	$(BIN)/python tests/pages.py $(wildcard *.md docs/*.md)

bench: .venv/ready  ## ratios against peers, measured in one run
	$(BIN)/python benchmarks/run.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache
