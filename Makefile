# Every target sets up what it needs in .venv; PYTHON=python3.12 chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The tiles as a GPU runs them, on a machine without one.
TILE_TESTS := ptx backend affinity_field affinity_propagation affinity_regression dilated_affinity compile

.PHONY: demo test test-ptx test-nightly bench lint format wheel clean

demo: $(VENV)/examples.stamp
	$(BIN)/python examples/train_segmentation.py $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(ARGS)

test-ptx: $(VENV)/test.stamp
	$(BIN)/python -m pytest --ptx -k "ptx or triton or tiles" $(TILE_TESTS:%=tests/test_%.py) $(ARGS)

test-nightly: $(VENV)/test.stamp
	$(BIN)/python -m pytest tests/nightly $(ARGS)

bench: $(VENV)/test.stamp
	$(BIN)/python -m tritonaff.bench run $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/dev.stamp
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
