PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := mpsearch tests studies benchmarks
BENCHMARKS := $(sort $(wildcard benchmarks/*.py))

.PHONY: demo test lint bench clean

demo: $(STAMP) ## search, measure and export the bundled model
	$(BIN)/mpsearch demo

test: lint ## everything that a change must pass
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: $(STAMP) ## style, types and the direction of imports
	$(BIN)/ruff check $(wildcard $(CODE))
	$(BIN)/ruff format --check $(wildcard $(CODE))
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## run every benchmark in turn
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python "$$file"; done

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) dist build

# torch goes first: what is installed after it must fit the build that is there.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@
