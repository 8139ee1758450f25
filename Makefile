# Every target installs its needs in .venv; PYTHON=python3.12 chooses the interpreter of .venv.
PYTHON ?= python3
VENV := .venv
TORCH :=
BIN := $(VENV)/bin

# Tests of the tiles as a GPU runs them, on a machine without a GPU.
TILE_TESTS := backend affinity_field affinity_propagation affinity_regression box_pairwise dilated_affinity instance_affinity compile

.PHONY: help demo test test-adapters test-version test-ptx test-nightly bench docs lint format package clean

help:
	@echo "make demo          trains with two losses: a table, pictures; DATA=folder"
	@echo "make test          the tests, about eight minutes on two cores"
	@echo "make test-adapters the adapters and docs, beside the libraries themselves"
	@echo "make bench         time and memory on this machine"
	@echo "make docs          the site, in build/site"
	@echo "make test-ptx      without a GPU: the tiles, compiled for one and emulated"
	@echo "make test-nightly  deliberate faults, tools, demo and study, random examples"
	@echo "make lint          style and types; make format mends style"
	@echo "make package       the package as an archive and a wheel, checked, in dist"
	@echo "make clean         removes .venv and what was built"
	@echo
	@echo "ARGS adds arguments: make test ARGS=\"-k opcheck\", make demo ARGS=--help."
	@echo "PYTHON=python3.12 chooses the interpreter of .venv."

demo: $(VENV)/examples.stamp
	$(BIN)/python examples/train.py $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# Another version of torch: all tests but the interpreted tiles, which run one case per operation.
# make test-version VENV=.venv-oldest PYTHON=python3.10 TORCH=torch==2.6.0
test-version: $(VENV)/test.stamp
	$(BIN)/python -c "import sys, torch; print('Python', sys.version.split()[0], 'torch', torch.__version__)"
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS) \
		-k "not (triton or tiles) or every_op"
	$(BIN)/python examples/train.py --no-compile --steps 20 \
		--loss ce ce+aaf ce+ar ce+dilated

# A virtual environment of its own: beside a CPU build of torch the package index's torchvision, and
# with it torchmetrics, fails to import. tests/vision.py mends the import for these tests.
test-adapters:
	$(MAKE) $(VENV)-adapters/adapters.stamp VENV=$(VENV)-adapters
	$(VENV)-adapters/bin/python -m pytest -n auto --dist worksteal $(ARGS) \
		tests/test_adapters.py tests/test_training_loops.py tests/test_docs.py

test-ptx: $(VENV)/test.stamp
	$(BIN)/python -m pytest --ptx -k "ptx or triton or tiles" tests/nightly/test_ptx.py $(TILE_TESTS:%=tests/test_%.py) $(ARGS)

# Deliberate faults, tests of tools, demo and study; then slow tests, and thousands of random
# examples per property.
test-nightly: $(VENV)/nightly.stamp
	$(BIN)/python -m pytest -n auto --dist worksteal tests/nightly $(ARGS)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n auto --dist worksteal -m "hypothesis or nightly" $(ARGS)

bench: $(VENV)/test.stamp
	$(BIN)/python -m tritonaff.bench run $(ARGS)

# A warning is an error.
docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going --builder html docs build/site $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

package: $(VENV)/dev.stamp
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]" $(TORCH)
	touch $@
