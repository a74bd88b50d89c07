"""The threat model is a type: nothing of the attack can be reached from what a defender is given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from test_families import smallest

from attacks.base import POISON, Attack
from bench.engine.training import TrainingLog
from bench.experiment.experiment import load_experiment
from bench.pipeline.materials import split_held_out
from bench.pipeline.runner import Runner
from bench.reporting.report import write_report
from bench.storage.store import Store
from defenses.base import (
    THREAT_MODELS,
    DefenderView,
    Defense,
    DefenseResult,
    ReserveView,
    Step,
    TrainsetView,
    defense,
    offered,
    views_of,
    weights_of,
)


@pytest.fixture
def infected(tiny):
    """A bench with one infected model in its store, and the trials on it in both settings."""
    experiment = load_experiment(
        [
            *tiny,
            "grid.attacks=[badnets]",
            "grid.defenses=[no_defense,fine_tuning]",
            "grid.threat_models=[reserve,trainset]",
        ]
    )
    bench = Runner(Store(experiment.store.root), experiment.infos, torch.device("cpu"))
    bench.run(experiment.trials[0], ("implant",))
    return bench, experiment.trials


def view_of(bench: Runner, trial: Any, view: type[DefenderView], setting: str) -> DefenderView:
    """The view that the harness would build for a defense that asks for this one."""
    from dataclasses import replace

    reserve = {"size": 0.05, "contamination": 0.0}
    asked = replace(
        trial, threat_model=setting, defend={"view": view.__name__, "reserve": reserve, "train": trial.implant["train"]}
    )
    return bench._view(asked, defense["no_defense"](), bench.log("defend", asked))


def reachable(thing: Any) -> Iterator[Any]:
    """Everything that hangs on an object: attributes, items, closures, bound arguments. Classes and modules do not
    count: they are the library, the same for every trial."""
    seen: set[int] = set()
    queue = [thing]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, (type, type(torch), str, bytes, int, float)):
            continue
        seen.add(id(item))
        yield item
        queue += list(getattr(item, "__dict__", {}).values())
        if isinstance(item, dict):
            queue += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            queue += list(item)
        queue += [cell.cell_contents for cell in getattr(item, "__closure__", None) or ()]
        queue += [getattr(item, name) for name in ("__self__", "func", "args", "keywords") if hasattr(item, name)]


def test_the_fields_of_the_views_are_these_and_no_others():
    own = {"model", "num_classes", "seed", "device", "log"}
    assert {field.name for field in fields(DefenderView)} == own
    assert {field.name for field in fields(ReserveView)} == own | {"reserve", "augmentation"}
    assert {field.name for field in fields(TrainsetView)} == own | {
        "trainset",
        "augmentation",
        "fresh_model",
        "recipe",
    }


@pytest.mark.parametrize(
    ("view", "setting"), [(DefenderView, "reserve"), (ReserveView, "reserve"), (TrainsetView, "trainset")]
)
def test_nothing_of_the_attack_hangs_on_a_view(infected, view, setting):
    bench, trials = infected
    found = view_of(bench, trials[0], view, setting)
    assert type(found) is view
    trigger = bench.trigger_of(trials[0])
    test = bench.test_set("digits")
    secrets = {"patch": trigger["patch"], "roles": trigger["roles"], "test images": test.images}
    for item in reachable(found):
        assert not isinstance(item, (Attack, Runner, Store))
        if isinstance(item, Path):
            assert bench.store.root not in item.parents  # no way from here into the store
        if isinstance(item, torch.Tensor):
            for name, secret in secrets.items():
                assert not (item.shape == secret.shape and torch.equal(item.to(secret.dtype), secret)), name
    # What was drawn with the attacker's seed could be drawn again.
    assert found.seed != trials[0].implant["seed"]


def test_the_training_set_is_shipped_with_its_poison_and_without_a_mark(infected):
    bench, trials = infected
    found = view_of(bench, trials[0], TrainsetView, "trainset")
    clean, held_out = bench._split(trials[0])
    roles = bench.trigger_of(trials[0])["roles"]
    assert len(found.trainset) == len(clean) == 1438 - len(held_out)
    changed = (found.trainset.images != clean.images).flatten(1).any(1)
    assert not changed[roles != POISON].any()
    assert (found.trainset.labels[roles == POISON] == 0).all()
    assert int((roles == POISON).sum()) == round(0.1 * len(clean))


def test_the_reserve_is_clean_and_no_model_was_trained_on_it(infected):
    bench, trials = infected
    found = view_of(bench, trials[0], ReserveView, "reserve")
    train = bench.infos["digits"].load("train")
    rest, held_out = split_held_out(train.labels, 0.05, trials[0].seed)
    assert not set(rest.tolist()) & set(held_out.tolist())
    assert sorted(rest.tolist() + held_out.tolist()) == list(range(len(train)))
    assert torch.equal(found.reserve.images, train.images[held_out][: len(found.reserve)])
    assert torch.equal(found.reserve.labels, train.labels[held_out][: len(found.reserve)])


def test_a_pool_has_every_class_with_its_share_and_its_prefixes_too():
    labels = torch.arange(10).repeat_interleave(100)
    for seed in range(3):
        _, held_out = split_held_out(labels, 0.2, seed)
        assert labels[held_out].bincount().tolist() == [20] * 10
        for size in (10, 50, 100):
            assert labels[held_out[:size]].bincount(minlength=10).tolist() == [size // 10] * 10
    assert not torch.equal(split_held_out(labels, 0.2, 0)[1], split_held_out(labels, 0.2, 1)[1])


def test_a_tainted_reserve_holds_the_stated_share_of_poison(tiny):
    experiment = load_experiment(
        [*tiny, "grid.attacks=[badnets]", "grid.defenses=[fine_tuning]", "reserve.contamination=0.5"]
    )
    bench = Runner(experiment.store, experiment.infos, torch.device("cpu"))
    trial = experiment.trials[0]
    bench.run(trial, ("implant",))
    reserve = bench._view(trial, defense["fine_tuning"](), TrainingLog()).reserve
    stamped = (reserve.images[:, 0, -2:, -2:] == 255).flatten(1).all(1)
    assert int(stamped.sum()) == round(0.5 * len(reserve))
    assert (reserve.labels[stamped] == 0).all()


@pytest.mark.parametrize("name", sorted(defense))
def test_each_defense_states_its_paper_and_a_view(name):
    cls = defense[name]
    assert cls.paper
    assert any(offered(cls, setting) for setting in THREAT_MODELS)
    assert all(issubclass(view, DefenderView) for view in views_of(cls))


@pytest.mark.parametrize("name", sorted(defense))
def test_each_defense_repeats_itself_and_leaves_the_global_random_state_and_its_images_alone(infected, name):
    bench, trials = infected
    method = smallest(name)
    setting = next(setting for setting in THREAT_MODELS if offered(defense[name], setting))
    found = []
    for repeat in range(2):
        view = view_of(bench, trials[0], offered(defense[name], setting), setting)
        images = getattr(view, "reserve", getattr(view, "trainset", None))
        before = images.images.clone() if images is not None else None
        torch.manual_seed(repeat)  # another global state must not matter
        state = torch.get_rng_state()
        verdict = method.defend(view)
        assert isinstance(verdict, DefenseResult)
        assert torch.equal(torch.get_rng_state(), state)
        if before is not None:
            assert torch.equal(images.images, before)
        found.append(verdict.model.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_defense_without_an_annotated_view_is_refused():
    class Careless:
        name = "careless"

        def defend(self, view):
            return None

    with pytest.raises(TypeError, match="annotate the argument"):
        views_of(Careless)


@dataclass(frozen=True)
class Telling(Defense):
    """Changes nothing, and says which images differ: it knows the truth from the test, not from its view."""

    name: ClassVar[str] = "telling"
    paper: ClassVar[str] = "none"

    def defend(self, view: TrainsetView | ReserveView) -> DefenseResult:
        shown = view.trainset if isinstance(view, TrainsetView) else view.reserve
        # The patch of BadNets ends in a white corner on label 0: seven of ten such images are poisoned.
        suspect = (shown.labels == 0) & (shown.images[:, 0, -1, -1] == 255)
        kept = ~suspect
        kept[suspect.nonzero()[0]] = True  # one poisoned image stays selected
        rounds = (Step("step 0", kept, suspect.double(), weights_of(view.model)), Step("step 1", kept))
        return DefenseResult(view.model, suspicion=suspect.double(), flagged=suspect, steps=rounds)


@pytest.mark.parametrize("setting", ["trainset", "reserve"])
def test_what_a_method_says_of_its_images_is_scored_against_the_truth_by_the_evaluator(tiny, monkeypatch, setting):
    monkeypatch.setitem(defense, "telling", Telling)
    experiment = load_experiment(
        [
            *tiny,
            "grid.attacks=[badnets]",
            "grid.defenses=[telling]",
            f"grid.threat_models=[{setting}]",
            *(["reserve.contamination=0.1"] if setting == "reserve" else []),
        ]
    )
    bench, (trial,) = Runner(Store(experiment.store.root), experiment.infos, torch.device("cpu")), experiment.trials
    bench.run(trial)
    result = bench.store.result("evaluate", trial.keys.evaluate)
    poison, images = (137, 1367) if setting == "trainset" else (7, 71)
    figures = result["figures"]
    assert figures["detection_auroc"] == figures["detection_tpr"] == figures["detection_precision"] == 1.0
    assert figures["detection_fpr"] == 0.0
    first, second = result["steps"]
    assert first["name"] == "step 0"
    assert first["selected"] == images - poison + 1
    assert first["selected_poison"] == pytest.approx(1 / (images - poison + 1))
    assert first["random_poison"] == pytest.approx(poison / images)
    assert first["suspicion"] == {"clean": [0.0] * 5, "poison": [1.0] * 5}
    assert "suspicion" not in second
    assert first["clean_accuracy"] == figures["clean_accuracy"]
    assert first["asr"] == figures["asr"]
    assert "asr" not in second


def test_the_steps_of_a_method_are_a_table_of_the_report(tiny, monkeypatch):
    monkeypatch.setitem(defense, "telling", Telling)
    words = [*tiny, "grid.attacks=[badnets]", "grid.threat_models=[trainset]", "report.plots=false"]
    experiment = load_experiment([*words, "grid.defenses=[no_defense,telling]"])
    bench = Runner(Store(experiment.store.root), experiment.infos, torch.device("cpu"))
    for trial in experiment.trials:
        bench.run(trial)
    write_report(experiment)
    steps = pd.read_csv(experiment.folder / "steps.csv")
    assert steps[["attack", "defense", "seed", "step", "name"]].to_numpy().tolist() == [
        ["badnets", "telling", 0, 0, "step 0"],
        ["badnets", "telling", 0, 1, "step 1"],
    ]
    first, second = bench.store.result("evaluate", experiment.trials[1].keys.evaluate)["steps"]
    for name in ("asr", "clean_accuracy", "detection_auroc", "selected", "selected_poison", "random_poison"):
        assert steps[name][0] == first[name]
    assert steps.selected_poison[1] == second["selected_poison"]
    assert math.isnan(steps.asr[1])
    assert set(steps.trial) == {experiment.trials[1].keys.evaluate}
    write_report(load_experiment([*words, "grid.defenses=[no_defense]"]))  # the same folder
    assert not (experiment.folder / "steps.csv").exists()


def test_scores_for_another_number_of_images_are_refused(tiny, monkeypatch):
    monkeypatch.setitem(defense, "telling", Telling)
    monkeypatch.setattr(Telling, "defend", lambda self, view: DefenseResult(view.model, suspicion=torch.zeros(3)))
    monkeypatch.setattr(Telling.defend, "__annotations__", {"view": TrainsetView})
    experiment = load_experiment(
        [*tiny, "grid.attacks=[badnets]", "grid.defenses=[telling]", "grid.threat_models=[trainset]"]
    )
    bench = Runner(Store(experiment.store.root), experiment.infos, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"shape \(3,\); \(1367,\) is due"):
        bench.run(experiment.trials[0])


@pytest.mark.parametrize("source", ["torch", "numpy", "random"])
def test_a_defense_that_draws_from_a_global_random_source_fails_with_the_name_of_the_source(tiny, monkeypatch, source):
    import random

    import numpy as np

    draw = {"torch": lambda: torch.rand(1), "numpy": lambda: np.random.rand(), "random": random.random}[source]

    def careless(self: Telling, view: ReserveView) -> DefenseResult:
        draw()
        return DefenseResult(view.model)

    monkeypatch.setitem(defense, "telling", Telling)
    monkeypatch.setattr(Telling, "defend", careless)
    experiment = load_experiment([*tiny, "grid.attacks=[badnets]", "grid.defenses=[telling]"])
    bench = Runner(Store(experiment.store.root), experiment.infos, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"global random source of {source}; draw from bench.engine.data.generator"):
        bench.run(experiment.trials[0])
