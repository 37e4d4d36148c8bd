# Two commands: `make run` shows what fedsim does, `make test` that it works. Both set up .venv first, once.

PYTHON ?= python3
BIN := .venv/bin
COMPARE ?= none,stochastic,topk,gaussian
ARGS ?=
# One more than cores: the tests of deployments mostly wait for Flower.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')

.PHONY: help run test lint format lock clean

help:
	@echo 'make run     set up, then compare four defenses on the embedded data (ARGS="seed=1 rounds=50" overrides)'
	@echo 'make test    set up, then run all tests but the slow one'
	@echo 'make lint    check style, format and types'
	@echo 'make format  put the code into its format'
	@echo 'make lock    resolve the dependencies anew'
	@echo 'make clean   remove .venv (results in runs/ stay)'

run: .venv/installed
	$(BIN)/fedsim run -m setting=quickstart defense=$(COMPARE) $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 12

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: .venv/installed
	$(BIN)/uv pip compile -q pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-annotate --no-header -o requirements.lock

# uv installs in a quarter of pip's time, from the same index; pip brings it.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "fedsim needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep -o '^uv==[0-9.]*' requirements.lock)"
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	touch $@

clean:
	rm -rf .venv
