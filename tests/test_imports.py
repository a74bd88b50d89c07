"""A command that computes nothing starts without the libraries that only computing, plotting or tracking needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import bench.report
from bench.experiment.experiment import load_experiment
from tests.conftest import TINY

CHILD = """
import importlib, sys
command, *arguments = sys.argv[1:]
assert importlib.import_module(command).main(arguments) == 0
print("loaded:", *sorted(sys.modules))
"""

# torch is not among them: planning needs the settings of the methods, and their modules define networks.
ALWAYS = {"timm", "torchvision", "sympy", "triton", "torch._dynamo", "sklearn", "matplotlib", "seaborn", "mlflow"}
ALWAYS |= {"submitit", "huggingface_hub"}
TESTS = {"scipy", "scipy.stats", "scipy.linalg"}  # what compares methods
# By what is in the store: the command, more settings, and what else is not imported.
CASES = {
    "nothing is computed: dry_run": ("bench.run", ["dry_run=true"], {"pandas", *TESTS}),
    "nothing is computed: plan": ("bench.plan", [], {"pandas", *TESTS}),
    "everything is computed: status": ("bench.status", [], TESTS),
    "everything is computed: run": ("bench.run", [], TESTS),  # the report is there: nothing is compared again
    "everything is computed: report": ("bench.report", [], set()),
}


def loaded(command: str, arguments: list[str]) -> set[str]:
    """The modules that a command has imported when it ends."""
    done = subprocess.run([sys.executable, "-c", CHILD, command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The settings of a grid with an empty store, and of one with made-up figures of every stage and a report."""
    folder = tmp_path_factory.mktemp("grids")
    both = [*TINY, "grid.attacks=[badnets]", "grid.defenses=[no_defense,fine_tuning]", f"dataset.cache={folder / 'c'}"]
    empty, whole = ([*both, f"results={folder / name}"] for name in ("empty", "whole"))
    experiment = load_experiment(whole)
    origin = {"commit": "c" * 40, "clean": True, "device": "cpu", "torch": "1", "python": "3"}
    for trial in experiment.trials:
        for (stage, _), identity in zip(trial.stage_keys(), trial.identities(), strict=True):
            result = {"status": "done", "seconds": 1.0, "peak_memory_mib": 2.0, "images": 3, "provenance": origin}
            result |= {"figures": {"clean_accuracy": 0.9, "asr": 0.5}, "weights": "w"}
            experiment.store.finish(stage, identity, result)
    assert bench.report.main(whole) == 0
    return {"nothing is computed": empty, "everything is computed": whole}


@pytest.mark.parametrize("case", CASES)
def test_what_a_command_with_nothing_to_compute_does_not_import(grids: dict[str, list[str]], case: str) -> None:
    command, more, absent = CASES[case]
    found = loaded(command, [*grids[case.split(":")[0]], *more])
    assert "torch" in found  # the list is not empty for another reason
    assert not (ALWAYS | absent) & found
