# make leaderboard   set everything up and run the quick grid to a leaderboard
# make test          set everything up and pass the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: leaderboard test test-slow test-slurm test-realdata test-gpu test-browser check lock setup clean

leaderboard: setup
	$(BIN)/python -m bench.run grid=quick

test: setup
	$(BIN)/python -m pytest

# Kills, resumed sweeps, the quick grid's promises: some minutes.
test-slow: setup
	$(BIN)/python -m pytest -m slow

# A real Slurm on this machine, as root on Debian (slurm/testbed/testbed.sh install fetches the packages): some minutes.
test-slurm: setup
	$(BIN)/python -m pytest -m slurm -rs

# Needs the real data sets under $$BENCH_DATA.
test-realdata: setup
	$(BIN)/python -m pytest -m realdata

# Needs Debian's chromium; what drives it is installed here.
test-browser: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python 'playwright>=1.49' 'axe-playwright-python>=0.1.4' 'scikit-posthocs>=0.11'
	$(BIN)/python -m pytest -m browser

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-header --no-annotate \
		--upgrade --quiet --output-file requirements.lock

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
