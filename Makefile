# bfm: the two commands are `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt
QUICKSTART ?= quickstart
export PYTHONWARNINGS ?= ignore

.PHONY: quickstart test test-slow chaos soak check format benchmarks clean

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing bfm (a few minutes the first time) ..."
	$(INSTALL) -e '.[demo]'
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/demo.stamp
	@echo "installing what the tests need ..."
	$(INSTALL) -e '.[demo,dev]'
	@touch $@

quickstart: .venv/demo.stamp  ## a real log to a compute frontier
	$(BIN)/bfm data prepare complete_journey --out $(QUICKSTART)/shards --overwrite
	$(BIN)/bfm data describe $(QUICKSTART)/shards
	$(BIN)/bfm sweep search_spaces/quickstart.yaml --shards $(QUICKSTART)/shards --storage $(QUICKSTART) --name sweep
	$(BIN)/bfm report $(QUICKSTART)/sweep

test: export OMP_NUM_THREADS ?= 1
test: .venv/dev.stamp  ## the fast tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: export OMP_NUM_THREADS ?= 1
test-slow: .venv/dev.stamp  ## real Ray clusters, several workers, killed processes; ends with what took longest
	$(BIN)/python -m pytest -m slow -n 2 --dist loadgroup --durations 20

chaos: .venv/dev.stamp  ## processes, nodes and heads that are killed; prints what each cost
	$(BIN)/python -m pytest -m slow -rP tests/chaos

soak: .venv/dev.stamp  ## half an hour of random faults
	$(BIN)/python tests/chaos/soak.py --minutes 30 --every 20 --seed 0

check: .venv/dev.stamp  ## style, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
