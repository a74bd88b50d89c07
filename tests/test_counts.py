"""A share is as many images as are used: what is computed, what is printed and what is recorded are one number."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.engine import reactivation
from bench.engine.counts import images_of, least_share, reserve_of
from bench.engine.errors import UserError
from bench.experiment.counts import counts_of
from bench.experiment.experiment import load_experiment
from bench.experiment.identity import spec_of
from bench.pipeline.runner import Runner
from bench.reporting.protocol import protocol


def folder(root: Path, classes: int, train: int, test: int) -> str:
    """An image folder of so many images a class; gives the name of its data set."""
    noise = np.random.default_rng(0)
    for kind, count in (("train", train), ("test", test)):
        for label in range(classes):
            place = root / "toy" / kind / f"c{label}"
            place.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(place / f"{index}.png")
    return "folder:toy"


@pytest.mark.parametrize("total", [1, 2, 7, 57, 71, 100, 1438, 50_000])
def test_the_least_share_is_enough_and_less_is_not(total):
    least = least_share(total)
    assert images_of(least, total) >= 1
    step = Fraction(10) ** (np.floor(np.log10(least)).astype(int).item() - 1)
    assert round((Fraction(str(least)) - step) * total) == 0


def test_a_reserve_is_no_larger_than_what_was_set_aside():
    # By hand: a twentieth of 29 is 1.45, one image of each of ten classes; a twentieth of all 290 would be 14.
    assert reserve_of(0.05, 0.05, [29] * 10) == 10
    assert reserve_of(0.02, 0.05, [29] * 10) == 6
    assert reserve_of(0.001, 0.05, [29] * 10) == 0


def test_the_lines_beneath_a_table_have_the_counts_that_are_used(tmp_path):
    name = folder(tmp_path, 10, 29, 4)
    base = [f"grid.datasets=['{name}']", "grid.attacks=[none,badnets]", "grid.defenses=[no_defense,fine_tuning]"]
    base += ["grid.seeds=1", "dataset.size=16", f"dataset.root={tmp_path}", f"dataset.cache={tmp_path / 'cache'}"]
    experiment = load_experiment(
        [*base, "reserve.contamination=0.2", "attack.badnets.poison_rate=0.05", "measure.pgd_images=5000"]
    )
    lines = "\n".join(protocol(experiment))
    assert "10 of 290 training images (3.45%" in lines
    assert "2 of them poisoned (20.00%" in lines
    assert "the whole test set (40 images)" in lines
    assert "5000" not in lines.replace("measure.pgd_images=5000", "")
    bench = Runner(experiment.store, experiment.infos, experiment.device)
    for trial in experiment.trials:
        counts = counts_of(trial, experiment.infos[trial.dataset])
        train, held_out = bench._split(trial)
        assert (counts.train, sum(counts.held_out)) == (len(train) + len(held_out), len(held_out))
        if trial.attack == "badnets":
            images, roles = bench.test_set(trial.dataset), None
            assert len(images) == counts.test == counts.robust
        if counts.reserve is not None and trial.attack == "none":
            images, roles = bench._shown(trial)
            assert (len(images), int((roles == 1).sum())) == (counts.reserve, 0)
    # A twentieth of 280 images is 14, and is said only where it is another share.
    assert {counts_of(trial, experiment.infos[name]).poisoned for trial in experiment.trials} == {0, 14}
    assert "badnets: " not in lines
    odd = "\n".join(protocol(load_experiment([*base, "attack.badnets.poison_rate=0.005"])))
    assert "badnets: 1 of 280 (0.36%" in odd
    sweep = "grid.sweep=[{key: reserve.size, values: [0.035, 0.04, 0.05]}]"
    with pytest.raises(UserError, match=r"reserve\.size=0\.035.*reserve\.size=0\.04"):
        load_experiment([*base, sweep])


def test_what_was_used_is_in_the_results(run_grid):
    words = ["grid.attacks=[badnets]", "grid.defenses=[fine_tuning]"]
    _, trials = run_grid(*words, "reserve.contamination=0.1", "measure.pgd_images=5000")
    # By hand: the pool has a twentieth of each class, 71 of 1438; a tenth of that is 7.
    assert trials[["view_images", "view_poisoned", "robust_images"]].to_numpy().tolist() == [[71, 7, 359]]


def test_a_retuning_says_how_many_images_it_poisoned(tmp_path, monkeypatch):
    from types import SimpleNamespace

    import torch

    from bench.measures.context import EvaluationContext
    from bench.measures.evaluation import relearned

    name = folder(tmp_path, 2, 30, 4)
    base = [f"grid.datasets=['{name}']", "grid.attacks=[badnets]", "grid.defenses=[no_defense]", "grid.seeds=1"]
    base += ["dataset.size=16", f"dataset.root={tmp_path}", f"dataset.cache={tmp_path / 'cache'}"]
    experiment = load_experiment([*base, "dispatch.device=cpu"])
    trial, used = experiment.trials[0], []
    bench = Runner(experiment.store, experiment.infos, experiment.device)
    monkeypatch.setattr(Runner, "trigger_of", lambda *_: {})
    monkeypatch.setattr(EvaluationContext, "trigger", lambda _, images: images)
    monkeypatch.setattr(
        reactivation,
        "relearn",
        lambda model, clean, poisoned, **_: used.append(len(poisoned)) or SimpleNamespace(steps=1, course=[]),
    )
    model = bench._fresh(spec_of(experiment.infos[name], trial.implant["model"]), 0)
    case = bench.case(trial)
    with torch.no_grad():
        rows = relearned(model, case, [5, 50, 100])
    assert [row["poisoned"] for row in rows] == used
    assert used[0] == 5
    assert len(used) == 2
    assert used[1] < 30


def test_a_retuning_with_too_few_images_to_poison_is_refused(tmp_path):
    name = folder(tmp_path, 2, 5, 4)
    base = [f"grid.datasets=['{name}']", "grid.attacks=[badnets]", "grid.seeds=1", "reserve.held_out=0.3"]
    base += ["dataset.size=16", f"dataset.root={tmp_path}", f"dataset.cache={tmp_path / 'cache'}"]
    with pytest.raises(UserError, match=r"measure\.relearn"):
        load_experiment([*base, "reserve.size=0.3", "measure.relearn=true"])
