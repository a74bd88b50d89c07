# make leaderboard   set everything up and run the quick grid to a leaderboard
# make test          set everything up and pass the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: leaderboard cpu-reference gpu-reference test test-slow test-slurm test-server test-realdata test-gpu test-browser \
	check lock setup clean

leaderboard: setup
	$(BIN)/python -m bench.run grid=quick

# The published leaderboards, from the real data under $$BENCH_DATA into results/<grid>/. Each is hours; every call goes on
# where the last one ended, for BUDGET at most: make cpu-reference BUDGET=2h MORE='grid.seeds=[0]'. What is finished by
# then is in the tables. The GPU's is what the papers tabulate, in lots that a lent machine allows.
BUDGET ?= 25m
MORE ?=
CPU_REFERENCE := cifar10_small gtsrb_small
GPU_REFERENCE := grid=paper grid.datasets=[cifar10_jpeg,gtsrb] grid.models=[resnet18] grid.seeds=[0]

cpu-reference: setup
	for grid in $(CPU_REFERENCE); do \
		timeout --signal=INT $(BUDGET) $(BIN)/python -m bench.run grid=$$grid $(MORE) || \
		$(BIN)/python -m bench.report grid=$$grid $(MORE) || exit 1; done

# `make -o setup gpu-reference BIN=/usr/bin` uses the Python that is there, and installs nothing.
gpu-reference: setup
	timeout --signal=INT $(BUDGET) $(BIN)/python -m bench.run $(GPU_REFERENCE) $(MORE) || \
	$(BIN)/python -m bench.report $(GPU_REFERENCE) $(MORE)

# A test computes on one thread, so that each core takes tests of its own.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

test: setup
	$(BIN)/python -m pytest $(PARALLEL)

# Kills, resumed sweeps, the quick grid's promises: some minutes.
test-slow: setup
	$(BIN)/python -m pytest -m slow -rs $(PARALLEL)

# A real Slurm on this machine, as root on Debian (slurm/testbed/testbed.sh install fetches the packages): some minutes.
test-slurm: setup
	$(BIN)/python -m pytest -m slurm -rs

# Needs Debian's postgresql; what talks to it is installed here.
test-server: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python 'psycopg[binary]>=3.2'
	$(BIN)/python -m pytest -m server -rs

# Needs the real data sets under $$BENCH_DATA.
test-realdata: setup
	$(BIN)/python -m pytest -m realdata

# Needs Debian's chromium; what drives it is installed here.
test-browser: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python 'playwright>=1.49' 'axe-playwright-python>=0.1.4' 'scikit-posthocs>=0.11'
	$(BIN)/python -m pytest -m browser -rs

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
