# `make run` trains the example on this machine; `make test` checks everything that takes minutes, `make test-all` the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := $(shell git ls-files launcher runtime pyproject.toml 2>/dev/null)

.PHONY: run test test-all lint install install-dev system-packages clean

run: install
	$(BIN)/dstrain run examples/gpt.yaml

install: .stamps/package
install-dev: .stamps/dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone, by its exact version: another package's range must not choose it.
.stamps/dependencies: $(BIN)/python constraints.txt pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt ClusterShell paramiko plotly pydantic pyyaml rich safetensors typer setuptools wheel
	mkdir -p .stamps && touch $@

.stamps/package: .stamps/dependencies $(SOURCES)
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	rm -rf build && touch $@

.stamps/dev: .stamps/package
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation '.[dev]'
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	rm -rf build && touch $@

system-packages:
	tests/system-packages

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install-dev system-packages lint
	$(BIN)/python -m pytest -m "not slow" -n 4 --dist worksteal

test-all: test
	$(BIN)/python -m pytest -m "slow and not alone" -n 3 --dist worksteal
	$(BIN)/python -m pytest -m "alone"

clean:
	rm -rf $(VENV) .stamps build dist *.egg-info
