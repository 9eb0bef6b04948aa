# Both targets set up their own environment in a fresh clone: `make demo`, `make test`.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Two processes that take a file at a time, in the order of tests/conftest.py: what the tests of a
# file share is made once.
TWO := -n 2 --dist loadfile --no-loadscope-reorder --durations 30 --durations-min 3

.PHONY: demo docs test test-quick test-slow test-ndif check findings clean

demo: $(VENV)/ready
	$(BIN)/persona-nns demo

# The store is kept as an archive: what it holds is not measured again.
findings: $(VENV)/ready
	test -d stores/findings.zarr || $(PYTHON) -m tarfile -e stores/findings.tar.xz stores/findings.zarr
	docs/findings/measure.sh stores/findings.zarr
	$(BIN)/python docs/findings/tables.py stores/findings.zarr docs/findings
	$(BIN)/python docs/findings/draw.py stores/findings.zarr docs/findings/figures

# Side by side: types take as long on one core as a third of the tests does on two.
test: $(VENV)/ready
	$(MAKE) --jobs 2 check test-quick

test-quick: $(VENV)/ready
	$(BIN)/python -m pytest $(TWO)

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest $(TWO) -m slow

# The site, in docs/_build/html: its pages are executed, and a warning is an error. Four processes, as
# pages are handed out in four heaps and some take longer than others.
docs: $(VENV)/ready
	$(BIN)/python -m sphinx -E -b html -W --keep-going -j 4 docs docs/_build/html

# Against the real NDIF server, in an environment of its own (1.8 GB). Where its packages
# cannot be had, the tests that need it are skipped, and say so.
test-ndif: $(VENV)/ready
	-$(MAKE) .ndif/ready
	$(BIN)/python -m pytest tests/ndif -rs --durations 10

.ndif/ready: tests/ndif/requirements.txt
	$(PYTHON) -m venv .ndif/venv
	.ndif/venv/bin/python -m pip install --quiet torch==2.13.0
	.ndif/venv/bin/python -m pip install --quiet --requirement tests/ndif/requirements.txt
	.ndif/venv/bin/python -m pip install --quiet --no-deps --ignore-requires-python ndif==0.1.2
	touch $@

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# torch first and by its exact version, so that nothing else chooses a build of it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .ndif dist build docs/_build
