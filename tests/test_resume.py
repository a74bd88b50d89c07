"""Stop it anywhere and run it again: the same figures, and no stage is computed twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench.experiment.experiment import load_experiment
from bench.run import main

ONE = ["grid.attacks=[badnets]", "grid.defenses=[fine_tuning]", "train.epochs=4", "dispatch.checkpoint_s=0"]

# A few seconds a stage, so that a kill hits something.
SHORT = [
    "grid=quick",
    "grid.exceptions=[]",
    "train.epochs=6",
    "defense.fine_tuning.epochs=20",
    "defense.fine_pruning.epochs=20",
    "defense.aft.updates=40",
    "defense.aft.adversarial_updates=10",
    "measure.pgd_steps=5",
    "tracking.enabled=false",
    "dispatch.workers=2",
    "dispatch.device=cpu",
    "dispatch.checkpoint_s=0",
]
FIGURES = ["attack", "defense", "seed", "status", "clean_accuracy", "asr", "recovery_accuracy", "robust_accuracy"]


def weights_of(arguments: list[str], stage: str) -> dict[str, torch.Tensor]:
    experiment = load_experiment(arguments)
    key = dict(zip(("implant", "defend", "evaluate"), experiment.trials[0].keys, strict=True))[stage]
    return experiment.store.tensors(stage, key, "model")


# In the first epoch, in the third, in the defense.
@pytest.mark.parametrize(
    "steps", [pytest.param(5, marks=pytest.mark.slow), pytest.param(47, marks=pytest.mark.slow), 70]
)
def test_an_interrupted_training_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch, steps):
    straight = [*tiny, *ONE, f"results={tmp_path / 'straight'}"]
    broken = [*tiny, *ONE, f"results={tmp_path / 'broken'}"]
    defense = ["defense.fine_tuning.epochs=30"]
    assert main([*straight, *defense]) == 0
    done, step = 0, torch.optim.SGD.step

    def stops(self, closure=None):
        nonlocal done
        done += 1
        if done == steps:
            raise KeyboardInterrupt
        return step(self, closure)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            main([*broken, *defense])
    begun = list((tmp_path / "broken" / "checkpoints").rglob("*.safetensors"))
    assert bool(begun) == (steps > 22)  # a checkpoint stands behind the first epoch (1366 images, 64 a batch)
    assert main([*broken, *defense]) == 0
    for stage in ("implant", "defend"):
        one, two = weights_of([*straight, *defense], stage), weights_of([*broken, *defense], stage)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list((tmp_path / "broken" / "checkpoints").rglob("*.safetensors"))


@pytest.mark.slow
def test_two_drivers_share_one_grid_without_doing_a_stage_twice(tiny, tmp_path):
    arguments = [*tiny, "grid.attacks=[none,badnets]", "train.epochs=3", "dispatch.workers=1"]
    drivers = [
        subprocess.Popen([sys.executable, "-m", "bench.run", *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [driver.wait(240) for driver in drivers] == [0, 0]
    lines = _history(tmp_path / "results")
    assert len(lines) == len(set(lines)) == 2 + 2 + 8 + 8


def _history(results: Path) -> list[str]:
    return [" ".join(line.split()[1:3]) for line in (results / "store" / "history.log").read_text().splitlines()]


@pytest.mark.slow
def test_ten_kills_at_random_moments_end_in_the_same_leaderboard(tmp_path, cache):
    common = [sys.executable, "-m", "bench.run", *SHORT, f"dataset.cache={cache}"]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*common, f"results={tmp_path / 'straight'}"], check=True, **quiet)
    killed = [*common, f"results={tmp_path / 'killed'}"]
    moments = random.Random(7)
    for kill in range(10):
        driver = subprocess.Popen(killed, start_new_session=True, **quiet)
        time.sleep(moments.uniform(4, 14))
        # Every other time the workers outlive their driver, and the next driver meets them.
        if kill % 2:
            os.kill(driver.pid, signal.SIGKILL)
        else:
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    subprocess.run(killed, check=True, **quiet)
    tables = [pd.read_csv(tmp_path / name / "quick" / "trials.csv")[FIGURES] for name in ("straight", "killed")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    lines = _history(tmp_path / "killed")
    assert len(lines) == len(set(lines)) == 9 + 9 + 36 + 36


def test_a_stage_that_cannot_be_locked_says_why(run_grid, tiny):
    settings = ["grid.attacks=[badnets]", "grid.defenses=[no_defense]"]
    (trial,) = load_experiment([*tiny, *settings]).trials
    store = load_experiment([*tiny, *settings]).store
    (store.root / "locks").mkdir(parents=True)
    (store.root / "locks" / f"implant-{trial.keys.implant}").write_text("no folder, as a lock is one")
    code, trials = run_grid(*settings)
    assert code == 1
    assert "FileExistsError" in trials.reason.item()


def test_two_processes_with_one_process_id_write_no_common_file(tmp_path, monkeypatch):
    """Two containers may share an id; each writes a checkpoint under a name of its own before it renames it."""
    from bench.engine import training

    monkeypatch.setattr(os, "getpid", lambda: 7)
    written = []
    monkeypatch.setattr(training, "save_tensors", lambda tensors, path, notes: (written.append(path), path.touch()))
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        training._save(tmp_path / "part.safetensors", model, optimizer, training.Hooks(), training.TrainingLog(), 1)
    assert len(set(written)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["part.safetensors"]
