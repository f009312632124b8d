PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast test-lowest test-newest test-gpu lint docs site bench clean

demo: .venv/ready  ## install, fetch the default model, tell a story
	$(BIN)/llmcli generate "Once upon a time"

test: .venv/ready  ## run the whole suite, with the real model
	$(BIN)/pytest

test-fast: .venv/ready  ## run the tests that need no network and start no processes
	$(BIN)/pytest -m "not real and not slow"

test-lowest: .venv-lowest/ready  ## run test-fast on the lowest version of each dependency
	.venv-lowest/bin/python -m pip list
	.venv-lowest/bin/python -m pytest -m "not real and not slow"

test-newest:  ## build a wheel, install it with the newest dependencies, and run test-fast
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip wheel --quiet --no-deps --wheel-dir .venv-newest .
	.venv-newest/bin/python -m pip install --quiet "$$(ls .venv-newest/llmcli-*.whl)[dev]"
	.venv-newest/bin/python -m pip list
	.venv-newest/bin/python -m pytest -m "not real and not slow"

test-gpu: .venv/ready  ## run the tests that need a CUDA GPU, and are skipped without one
	$(BIN)/pytest -n 0 -m cuda

lint: .venv/ready  ## check style, types and wording
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n 0 tests/test_style.py

docs: .venv/ready  ## regenerate the command reference and the outputs in the pages
	$(BIN)/python tests/reference.py
	$(BIN)/python tests/pages.py $(wildcard *.md docs/*.md)

site: .venv/docs  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/ready  ## measure ratios against peers
	$(BIN)/python benchmarks/run.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.venv-lowest/ready: pyproject.toml tests/lowest.py
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python tests/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/constraints.txt -e ".[dev]"
	touch $@

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest site dist .pytest_cache .mypy_cache .ruff_cache
