"""What the README promises of the quick grid and of real data; minutes of compute."""

from __future__ import annotations

import pytest

from bench.experiment.experiment import load_experiment
from bench.reporting.trials import of_trials
from bench.run import main


def figures(arguments: list[str]):
    assert main(arguments) == 0
    experiment = load_experiment(arguments)
    table = of_trials(experiment.trials, experiment.store)
    return table.groupby(["attack", "defense"])[["clean_accuracy", "asr"]].mean()


@pytest.mark.slow
def test_on_digits_the_attacks_implant_and_aft_removes_badnets(tmp_path, cache):
    mean = figures(
        [
            "grid=quick",
            "grid.defenses=[no_defense,aft]",
            "tracking.enabled=false",
            f"results={tmp_path}",
            f"dataset.cache={cache}",
        ]
    )
    clean = mean.loc[("none", "no_defense")].clean_accuracy
    for attack in ("badnets", "blended"):
        infected = mean.loc[(attack, "no_defense")]
        assert infected.asr >= 0.95
        assert infected.clean_accuracy >= clean - 0.02
    assert mean.loc[("badnets", "aft")].asr < 0.20
    assert mean.loc[("none", "aft")].clean_accuracy >= clean - 0.03  # and does little harm where nothing is to remove


@pytest.mark.realdata
def test_on_real_cifar10_badnets_implants_in_two_epochs(tmp_path, real_data):
    mean = figures(
        [
            "grid=cifar10_attacks",
            "grid.attacks=[badnets]",
            "grid.seeds=1",
            "train.epochs=2",
            "tracking.enabled=false",
            f"results={tmp_path}",
            f"dataset.root={real_data}",
            f"dataset.cache={tmp_path / 'cache'}",
        ]
    )
    assert mean.loc[("badnets", "no_defense")].clean_accuracy > 0.45
    assert mean.loc[("badnets", "no_defense")].asr > 0.7
