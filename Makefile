# Every target makes what it needs in .venv; the first one takes a few minutes for the downloads.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-integration lint families bench bench-gpu embedded-model clean

demo: .venv/installed
	$(BIN)/visgain demo

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: .venv/installed
	$(BIN)/python -m pytest -n auto -m "slow or published"

test-integration: .venv/installed
	$(BIN)/python -m pytest -m integration

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The table of model families in the docs, from the tests.
families: .venv/installed
	cd tests && ../$(BIN)/python -m zoo.table

bench: .venv/installed
	$(BIN)/python benchmarks/select_scale.py
	$(BIN)/python benchmarks/select_growth.py
	$(BIN)/python benchmarks/counterfactuals.py
	$(BIN)/python benchmarks/score.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/open_dataset.py
	$(BIN)/python benchmarks/ranks.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/export.py

# Needs a CUDA device and some 16 GB of its memory.
bench-gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py

# Rebuilds the model that ships with the package, from random weights; about two hours on two cores. The result lies in
# scratch/embedded/model; copy its files over src/visgain/world/embedded to ship it.
embedded-model: .venv/installed
	$(BIN)/python -m visgain.world.rebuild --out scratch/embedded

.venv/installed: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv visgain-demo scratch
