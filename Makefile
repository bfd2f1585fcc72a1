# Every target makes its own .venv first. PYTHON=python3.12 make install chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/.installed
EXTRAS := dev,quickstart,tensorboard,metrics,demo,serve
CODE := vlmtune tests tools configs setup.py $(wildcard benchmarks quickstart)
TESTS := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 -rsfE --tb=short

.PHONY: install format checks test test-slow test-browser chaos quickstart bench models clean

install: $(INSTALLED)

# torch comes first, alone: deepspeed is built from source and looks at the torch that is there. Nothing is built in
# isolation, so that every package sees the same versions.
$(INSTALLED): setup.py requirements.txt constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt setuptools wheel torch
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

format: install
	$(BIN)/ruff check --fix --select I -q $(CODE)
	$(BIN)/ruff format $(CODE)

checks: install
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

test: install
	$(TESTS) -m 'not slow and not chaos and not browser and not gpu'

# The tests of `vlmtune convert quantize` need one extra more. A file stays on one worker: what its tests share is dear.
test-slow: install
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[quantize]'
	$(TESTS) --dist loadfile -m 'slow and not browser and not gpu'

# Needs Chromium (Debian: apt-get install chromium).
test-browser: install
	$(TESTS) -n 0 -m browser

# Hundreds of killed runs; it prints how many were killed where.
chaos: install
	$(TESTS) -n 0 -m chaos tests/chaos

quickstart: install
	$(BIN)/python quickstart/run.py

# Half an hour to an hour on a quiet machine. A result replaces the older one only when its script has ended well.
BENCHMARKS := $(filter-out machine,$(basename $(notdir $(wildcard benchmarks/*.py))))
bench: install
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[bench]'
	set -e; for name in $(BENCHMARKS); do \
	  $(BIN)/python benchmarks/$$name.py > benchmarks/results/$$name.new; \
	  sed '/get_accelerator/d' benchmarks/results/$$name.new > benchmarks/results/$$name.md; \
	  rm benchmarks/results/$$name.new; \
	done  # deepspeed greets on standard output

# The tables of docs/models.md, from the families, the recipes and the tests.
models: install
	$(BIN)/python tools/models_table.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
