# `make demo` and `make test` set up .venv on their own. PYTHON names the interpreter (3.11 or newer) that creates it.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.set-up
STAGES := startup metrics generation extraction training grid

.PHONY: setup demo test test-slow lint bench families docs clean

setup: $(SETUP)

# All processors compile what was installed, where pip would use one. Tests of packages are never imported.
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "cora needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q -j 0 -x '/tests?/|torch/testing/_internal' .venv/lib
	touch $@

demo: $(SETUP)
	$(BIN)/cora demo

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports --no-cache

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

# What `make test` leaves out to stay quick: every model family, wide terminals, real races and more kinds of damage.
test-slow: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal -m slow

# Takes 45 minutes on an otherwise idle machine. Each script has --help.
bench: $(SETUP)
	for stage in $(STAGES); do $(BIN)/python benchmarks/$$stage.py || exit 1; done

# The table of docs/families.md; takes a few minutes.
families: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.training.families families.md
	$(BIN)/python scripts/update_readme.py

# A site of the pages in docs/, in site/; fails on a dead link.
docs: $(SETUP)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
