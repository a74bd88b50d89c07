"""Shared by all tests: one thread, one cache of digits, and a grid so small that it runs in seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench.experiment.load import load_methods

load_methods([])

TINY = [
    "grid=quick",
    "grid.seeds=1",
    "grid.exceptions=["
    "{defense:[fine_tuning,fine_pruning],set:{defense.epochs:1},why:tiny},"
    "{defense:aft,set:{defense.updates:2,defense.adversarial_updates:1},why:tiny}]",
    "model.stem=stock",
    "train.epochs=1",
    "measure.pgd_steps=1",
    "measure.pgd_images=50",
    "tracking.enabled=false",
    "report.plots=false",
    "dispatch.workers=0",
    "dispatch.device=cpu",
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(tmp_path: Path, cache: Path) -> list[str]:
    """The settings of a grid of seconds, with results of its own."""
    return [*TINY, f"results={tmp_path / 'results'}", f"dataset.cache={cache}"]


@pytest.fixture
def run_grid(tiny: list[str]) -> Callable[..., tuple[int, pd.DataFrame]]:
    """Run the tiny grid with more settings; gives the exit status and the table of trials."""

    def run(*more: str) -> tuple[int, pd.DataFrame]:
        from bench.experiment.experiment import load_experiment
        from bench.reporting.trials import of_trials
        from bench.run import main

        status = main([*tiny, *more])
        experiment = load_experiment([*tiny, *more])
        return status, of_trials(experiment.trials, experiment.store)

    return run


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; skips where there is none."""
    root = Path(os.environ.get("BENCH_DATA", "data"))
    if not any(root.glob("cifar10_jpeg*")):
        pytest.skip(f"no cifar10_jpeg under {root}; set BENCH_DATA to a folder that holds it")
    return root
