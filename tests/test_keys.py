"""The keys of stored stages change only on purpose: a new key makes everybody's finished stages worthless."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench.experiment.experiment import load_experiment

GOLDEN = Path(__file__).with_name("golden_keys.json")
GRIDS = sorted(path.stem for path in Path(__file__).parents[1].glob("bench/conf/grid/*.yaml"))
# Data that every machine has, at a size that every architecture takes, and nothing that the hardware decides.
EVERYWHERE = ["grid.datasets=[digits]", "dataset.size=32", "train.precision=float32", "grid.seeds=[0]", "dry_run=true"]


def keys(grid: str) -> dict[str, list[str]]:
    """The three keys of the first, the middle and the last trial of a grid."""
    trials = load_experiment([f"grid={grid}", *EVERYWHERE]).trials
    return {trials[at].title: list(trials[at].keys) for at in (0, len(trials) // 2, len(trials) - 1)}


@pytest.mark.parametrize("grid", GRIDS)
def test_the_keys_of_a_shipped_grid_are_those_of_the_last_release(grid):
    """Where a change of figures is meant: raise the version of what changed, then `python tests/test_keys.py`."""
    assert keys(grid) == json.loads(GOLDEN.read_text())[grid]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({grid: keys(grid) for grid in GRIDS}, indent=1) + "\n")
    sys.exit(0)
