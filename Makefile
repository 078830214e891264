# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.

PYTHON ?= python3
WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := client common inference server simulation pneumofed tests benchmarks docs

# Modules are compiled once, not in each of the hundreds of processes that the tests start, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo docs test test-slow lint style types tests format install clean

help:
	@echo "make demo       train over virtual hospitals on phantom images and name the report"
	@echo "make test       lint, types and the tests, in WORKERS processes (3: they also wait)"
	@echo "make test-slow  the long tests"
	@echo "make docs       the documentation as a site, in build/site, its notebooks executed"
	@echo "make install    only set up $(VENV)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("pneumofed needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + "; call make PYTHON=/path/to/python3.11" if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 torchvision==0.28.0 -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/pneumofed demo --out runs/demo

docs: install
	NO_MKDOCS_2_WARNING=1 PNEUMOFED_DOCS_EXECUTE=1 $(BIN)/python -m mkdocs build --quiet
	@echo "open build/site/index.html"

lint: style types

style: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: install
	$(BIN)/mypy pneumofed tests benchmarks docs

format: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

test: style
	@$(MAKE) --no-print-directory -j 2 types tests

tests: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
