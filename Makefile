PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := mpsearch tests studies benchmarks examples docs
BENCHMARKS := frontier curvature solving solvers solver_fronts search joint_menu formats tournament streaming \
  architectures

# Each takes from minutes to an hour; benchmarks.team needs a server and is run by hand.
NIGHTLY := storage_load storage_million files_killed fuzz http_load chaos determinism overhead

.PHONY: demo docs test lint bench nightly browser server verify-exports clean

demo: $(STAMP) ## search, measure and export the bundled model
	$(BIN)/mpsearch demo

test: browser server lint ## everything that a change must pass
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

browser: ## the report is tested in a real browser
	@command -v chromium >/dev/null || { \
	  as_root=$$([ "$$(id -u)" -eq 0 ] || echo sudo); \
	  $$as_root apt-get update -qq && \
	  $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; }

server: ## the results database is tested on a real PostgreSQL
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || { \
	  as_root=$$([ "$$(id -u)" -eq 0 ] || echo sudo); \
	  $$as_root apt-get update -qq && \
	  $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql; }

docs: $(STAMP) ## build the documents as a site: build/site/index.html
	$(BIN)/mkdocs build --quiet

lint: $(STAMP) ## style, types and the direction of imports
	$(BIN)/ruff check $(wildcard $(CODE))
	$(BIN)/ruff format --check $(wildcard $(CODE))
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## run every benchmark in turn
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

nightly: $(STAMP) ## run every long harness in turn: load, kills, faults, bad input
	@set -e; for name in $(NIGHTLY); do echo "== $$name"; OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name; done
	MPSEARCH_WHOLE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $$(grep -l 'import.* many' tests/test_*.py)

verify-exports: $(STAMP) ## have every target's own library read an export back; takes an hour the first time
	$(BIN)/python -m benchmarks.verify_exports

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) dist build

# torch goes first: what is installed after it must fit the build that is there.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@
