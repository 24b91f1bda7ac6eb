# Each target works alone on a machine with git, make, Python 3.10 or newer and pip.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs

demo: .venv/installed
	$(BIN)/bloblora demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-dev
	$(BIN)/mkdocs build --strict

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve]'
	touch $@

.venv/installed-dev: .venv/installed tests/methods/laplace-torch.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/methods/laplace-torch.txt
	touch $@
