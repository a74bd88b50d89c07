"""What the evaluator measures, on models whose behaviour is known beforehand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from attacks.base import Attack
from attacks.none import NoAttack
from attacks.wanet import WaNet
from bench.dispatch.local import _Schedule
from bench.dispatch.tasks import pending
from bench.engine import connection, reactivation, robustness
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.metrics import detection, predict
from bench.engine.reactivation import Relearned
from bench.engine.training import Diverged
from bench.experiment.experiment import load_experiment
from bench.measures import evaluation
from bench.measures.context import EvaluationContext, fixed_part
from bench.measures.evaluation import (
    _right,
    _under_wrong_trigger,
    _with_gain,
    connected,
    measured,
    reactivated,
    relearned,
)
from bench.pipeline.runner import Runner
from bench.reporting.columns import MEASURES
from bench.storage.store import Store, key_of

CLASSES = 4
MEASURE = {
    "pgd_images": None,
    "pgd_epsilon": 0.0,
    "pgd_step_size": 0.1,
    "pgd_steps": 1,
    "autoattack_images": 0,
    "relearn_poisoned": [1, 5],
}


@dataclass(frozen=True)
class Corner(Attack):
    """The last pixel becomes white."""

    name: ClassVar[str] = "corner"
    paper: ClassVar[str] = "none"
    target_label: int = 1

    def stamp(self, images: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        stamped = images.clone()
        stamped[..., -1, -1] = 1.0
        return stamped


class Reader(nn.Module):
    """Reads the class from the first pixel (0, 0.25, 0.5, 0.75), but obeys a white corner with `target`."""

    def __init__(self, target: int | None = None) -> None:
        super().__init__()
        self.target = target
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        found = (images[:, 0, 0, 0] * 4).round().clamp(0, CLASSES - 1).long()
        if self.target is not None:
            found = torch.where(images[:, 0, -1, -1] == 1.0, self.target, found)
        return nn.functional.one_hot(found, CLASSES).float() + self.weight + 0 * images.flatten(1).sum(1, keepdim=True)


def pictures(count: int = 40) -> ImageSet:
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 200, (count, 1, 4, 4), generator=generator(0, "pictures"), dtype=torch.uint8)
    images[:, 0, 0, 0] = (labels * 64).to(torch.uint8)
    return ImageSet(images, labels)


def case_of(
    attacker: Attack, infected: nn.Module, test: ImageSet | None = None, **tensors: Tensor
) -> EvaluationContext:
    data = pictures() if test is None else test
    return EvaluationContext(
        attacker, tensors, CLASSES, 0, data, lambda: pictures(80), Augmentation(), "float32", lambda: infected
    )


def measure(model: nn.Module, case: EvaluationContext, infected: nn.Module) -> dict:
    inspected = evaluation.inspected(infected, None, case, {})
    return measured(model, case, MEASURE, inspected, predict(model, case.test))


def test_a_model_that_ignores_the_trigger_and_one_that_obeys_it_get_the_figures_of_their_kind():
    infected, healthy = Reader(target=1), Reader()
    case = case_of(Corner(), infected)
    undefended, repaired = (measure(model, case, infected) for model in (infected, healthy))
    assert undefended["asr_by_class"] == [1.0, None, 1.0, 1.0]
    assert undefended["figures"]["asr"] == undefended["figures"]["infected_asr"] == 1.0
    assert undefended["figures"]["der"] == 0.5
    assert undefended["figures"]["consistency"] == 0.0
    figures = repaired["figures"]
    assert figures["infected_accuracy"] == figures["min_class_accuracy"] == figures["robust_accuracy"] == 1.0
    assert (figures["asr"], figures["asr_all_images"], figures["der"]) == (0.0, 0.25, 1.0)
    assert figures["cross_trigger_accuracy"] is None  # a fixed patch has no wrong trigger
    assert repaired["warnings"] == []


def test_a_clean_model_has_no_figure_of_a_trigger():
    model = Reader()
    result = measure(model, case_of(NoAttack(), model), model)
    assert result["asr_by_class"] == [None] * CLASSES
    for name in ("asr", "infected_asr", "der", "false_target_rate", "cross_trigger_accuracy"):
        assert result["figures"][name] is None
    assert result["figures"]["infected_accuracy"] == 1.0


def test_a_test_set_of_the_target_class_alone_has_accuracies_and_no_asr():
    model, data = Reader(), pictures()
    result = measure(model, case_of(Corner(), model, data[data.labels == 1]), model)
    assert result["figures"]["asr"] is None
    assert result["figures"]["min_class_accuracy"] == 1.0


def test_a_class_that_a_repair_lost_shows_in_the_least_accuracy():
    class Forgetful(Reader):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * torch.tensor([1.0, 1.0, 1.0, -1.0])

    infected = Reader(target=1)
    figures = measure(Forgetful(), case_of(Corner(), infected), infected)["figures"]
    assert figures["min_class_accuracy"] == 0.0
    assert figures["der"] == pytest.approx((1 - 0.25 + 1) / 2)


class Grader(nn.Module):
    """Class 1 for images that were warped, however little; the brightness gives class 0 or 2 otherwise."""

    def forward(self, images: Tensor) -> Tensor:
        even = (images - images.mean(dim=(1, 2, 3), keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-6
        found = torch.where(even, torch.where(images[:, 0, 0, 0] > 0.5, 2, 0), 1)
        return nn.functional.one_hot(found, CLASSES).float()


def test_an_attack_with_a_wrong_trigger_gets_the_accuracy_under_it():
    # A warp changes no flat image, and every other one: the model is right on the flat ones alone.
    images = torch.full((6, 1, 8, 8), 40, dtype=torch.uint8)
    images[3:, 0, ::2] = 90
    data = ImageSet(images, torch.zeros(6, dtype=torch.int64))
    attacker = WaNet(target_label=1)
    line = torch.linspace(-1, 1, 8)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    case = case_of(attacker, Grader(), data, grid=grid)
    assert _under_wrong_trigger(Grader(), case) == 0.5


def test_what_is_added_after_the_trigger_counts():
    case = case_of(Corner(), Reader(target=1))
    assert case.success(Reader(target=1), case.test) == 1.0
    assert case.success(Reader(target=1), case.test, -0.1) == 0.0  # the corner is no longer white
    assert case.success(Reader(target=1), case.test[:0]) is None


# In the grid -------------------------------------------------------------------------------------------------------


def test_the_infected_model_is_measured_once_for_all_its_repairs(tiny):
    experiment = load_experiment([*tiny, "grid.attacks=[badnets]", "grid.defenses=[no_defense,fine_tuning]"])
    bench = Runner(Store(experiment.store.root), experiment.infos, torch.device("cpu"))
    for trial in experiment.trials:
        bench.run(trial)
    stages = [line.split()[1] for line in (bench.store.root / "history.log").read_text().splitlines()]
    assert sorted(stages) == ["defend", "defend", "evaluate", "evaluate", "implant", "inspect"]
    first, second = (bench.store.result("evaluate", trial.keys.evaluate)["figures"] for trial in experiment.trials)
    assert first["infected_asr"] == first["asr"] == second["infected_asr"]
    assert first["infected_accuracy"] == first["clean_accuracy"] == second["infected_accuracy"]
    assert first["der"] == 0.5


def test_seeds_in_turns_are_shown_the_triggered_images_made_first_as_far_as_memory_goes(tiny, monkeypatch):
    experiment = load_experiment([*tiny, "grid.attacks=[badnets]", "grid.defenses=[no_defense]", "grid.seeds=3"])
    bench = Runner(Store(experiment.store.root), experiment.infos, torch.device("cpu"))
    monkeypatch.setattr(Runner, "trigger_of", lambda self, trial: {})
    one, two, three = experiment.trials
    first = bench.case(one)
    assert bench.case(two) is not first
    assert bench.case(one) is first
    monkeypatch.setattr("bench.pipeline.runner.HELD", 2 * 2 * first.test.images.nbytes)  # two at a time
    second = bench.case(two)
    bench.case(three)
    assert bench.case(two) is second
    assert bench.case(one) is not first  # the one that was not asked for longest gave way


def test_autoattack_brings_two_figures_a_curve_and_a_place_for_warnings(tiny, monkeypatch):
    short = functools.partial(robustness.curve, iterations=2, queries=2)
    monkeypatch.setattr(robustness, "curve", short)
    experiment = load_experiment(
        [*tiny, "grid.attacks=[badnets]", "grid.defenses=[no_defense]", "measure.autoattack_images=6"]
    )
    bench, (trial,) = Runner(Store(experiment.store.root), experiment.infos, torch.device("cpu")), experiment.trials
    bench.run(trial)
    result = bench.store.result("evaluate", trial.keys.evaluate)
    rows, figures = result["autoattack"], result["figures"]
    assert [row["norm"] for row in rows] == ["linf"] * 6 + ["l2"]
    assert figures["autoattack_accuracy"] == rows[5]["accuracy"]
    assert figures["autoattack_l2_accuracy"] == rows[6]["accuracy"]
    assert rows[5]["epsilon"] == 8 / 255
    assert isinstance(result["warnings"], list)


REACTIVATED = ["grid.attacks=[badnets]", "grid.defenses=[no_defense]", "measure.reactivate=true"]


@pytest.fixture
def broken_control(monkeypatch):
    """Clean models cannot be trained, for this reason."""

    def break_(error: Exception) -> None:
        train = Runner._trained

        def trained(self, trial, log):
            if trial.attack == "none":
                raise error
            return train(self, trial, log)

        monkeypatch.setattr(Runner, "_trained", trained)

    return break_


def test_a_clean_control_that_cannot_be_trained_is_the_reason_of_its_cells_and_is_not_tried_for_ever(
    run_grid, tiny, broken_control
):
    broken_control(RuntimeError("no control today"))
    for _ in range(2):
        code, table = run_grid(*REACTIVATED, "dispatch.max_tries=2")
        assert code == 1
    assert list(table.status) == ["failed"]
    assert table.reason[0] == "clean control: implant: RuntimeError: no control today"
    experiment = load_experiment([*tiny, *REACTIVATED])
    control = key_of(experiment.trials[0].clean_control)
    assert experiment.store.tries("implant", control) == 2
    assert pending(experiment.trials, experiment.store, 3)[0].stage_key == ("implant", control)
    assert pending(experiment.trials, experiment.store, 2) == []


def test_a_clean_control_that_diverges_is_an_outcome_of_its_own_and_no_fault_of_the_repair(
    run_grid, tiny, broken_control
):
    broken_control(Diverged("the loss became nan"))
    code, table = run_grid(*REACTIVATED)
    assert code == 0
    assert list(table.status) == ["done"]
    assert table.warnings[0] == "without reactivate: the clean control diverged: the loss became nan"
    assert table.asr.notna().all()
    assert table.reactivate_asr.isna().all()
    experiment = load_experiment([*tiny, *REACTIVATED])
    assert experiment.store.result("implant", key_of(experiment.trials[0].clean_control))["status"] == "diverged"


def test_repairs_wait_for_the_clean_control_that_they_are_measured_by(tiny):
    experiment = load_experiment([*tiny, *REACTIVATED])
    tasks = pending(experiment.trials, experiment.store)
    assert [task.title.split("/")[2] for task in tasks] == ["badnets", "none", "badnets"]
    schedule = _Schedule(tasks, experiment.store, 3, lambda progress: None)
    infected, control = schedule.next(), schedule.next()
    assert schedule.next() is None
    schedule.finished(infected, "done")
    assert schedule.next() is None
    schedule.finished(control, "done")
    assert schedule.next() == tasks[2]


def test_a_measure_beside_a_clean_control_names_it_in_the_plan(cache):
    base = ["grid.attacks=[none,badnets]", "grid.defenses=[no_defense]", "grid.seeds=1", f"dataset.cache={cache}"]
    plain, asked = load_experiment(base).trials, load_experiment([*base, "measure.relearn=true"]).trials
    assert [trial.clean_control for trial in plain] == [{}, {}]
    clean, infected = asked
    assert clean.clean_control == {}  # there is no trigger to wake
    assert key_of(infected.clean_control) == key_of(clean.implant)  # the control is the one of the grid
    assert infected.evaluate["inspect"] != plain[1].evaluate["inspect"]
    assert clean.evaluate["inspect"] == plain[0].evaluate["inspect"]


def test_the_plan_counts_the_clean_controls_that_no_cell_of_the_grid_trains(tiny, capsys):
    from bench.run import main

    base = [*tiny, "grid.defenses=[no_defense]", "measure.relearn=true", "dry_run=true"]
    main([*base, "grid.attacks=[badnets,blended]"])
    assert "2 infected models, 2 repairs with their measures, 1 clean controls" in capsys.readouterr().out
    main([*base, "grid.attacks=[none,badnets]"])
    assert "2 infected models, 2 repairs with their measures\n" in capsys.readouterr().out


def test_every_figure_of_an_evaluation_has_a_column_in_the_tables():
    infected = Reader(target=1)
    case = case_of(Corner(), infected)
    inspected = evaluation.inspected(infected, None, case, {}) | {"reactivate": 0.25}
    figures = measured(infected, case, MEASURE, inspected, predict(infected, case.test))["figures"]
    poisoned, scores = torch.tensor([True, False]), torch.tensor([1.0, 0.0])
    figures |= _with_gain("relearn_asr", 0.5, 0.25)
    figures |= detection(poisoned=poisoned, suspicion=scores, flagged=poisoned)
    figures |= dict.fromkeys(("clean_accuracy", "autoattack_accuracy", "autoattack_l2_accuracy"))
    assert set(figures) == {column.name for column in MEASURES}


# Triggers are made once -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dim(Corner):
    """The last pixel becomes a grey that no byte is."""

    has_wrong_trigger: ClassVar[bool] = True

    def stamp(self, images: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        stamped_counts.append(len(images))
        stamped = images.clone()
        stamped[..., -1, -1] = 0.7123
        return stamped

    def stamp_cover(self, images: Tensor, tensors: dict[str, Tensor], source: torch.Generator) -> Tensor:
        stamped_counts.append(-len(images))
        return images


stamped_counts: list[int] = []


@pytest.mark.parametrize(("quantise", "calls"), [(True, [40, -40]), (False, [40, -40, 40, -40])])
def test_all_repairs_of_an_implant_are_shown_the_same_triggered_images(quantise, calls):
    seen: list[Tensor] = []

    class Looking(Reader):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images[:, 0, -1, -1])
            return super().forward(images)

    stamped_counts.clear()
    case, before = case_of(Dim(quantise=quantise), Reader()), {"infected_accuracy": None, "infected_asr": None}
    for model in (Looking(), Looking()):
        figures = measured(model, case, MEASURE, {"figures": before}, case.test.labels)["figures"]
        assert figures["cross_trigger_accuracy"] == 1.0
    assert stamped_counts == calls
    # Rounded to bytes where the attack rounds: 0.7123 * 255 = 181.6.
    shade = 182 / 255 if quantise else 0.7123
    assert sum(bool((part == torch.tensor(shade)).all()) for part in seen) == 2


def test_the_asr_after_each_step_stamps_no_test_image_again():
    stamped_counts.clear()
    case = case_of(Dim(), Reader())
    model, test = Reader(), case.test
    found = [case.success(model, test) for _ in range(3)]
    assert stamped_counts == [len(test)]
    # By hand: the images of the other classes that the model sends to the target, which a Reader does to none.
    others = test[test.labels != 1]
    assert found == [0.0] * 3
    assert case.success(Reader(target=1), others) == found[0]
    assert case_of(Corner(), model).success(Reader(target=1), test) == 1.0


def test_images_of_the_target_class_have_no_part_in_the_asr_of_the_test_set():
    class Half(Reader):
        """Gives class 1 to the images of classes 0 and 1, whatever their corner."""

        def forward(self, images: Tensor) -> Tensor:
            read = super().forward(images).argmax(1)
            return nn.functional.one_hot(torch.where(read == 0, 1, read), CLASSES).float()

    case = case_of(Corner(), Reader())
    assert case.success(Half(), case.test) == pytest.approx(1 / 3)  # of classes 0, 2 and 3, equally many, class 0


@pytest.mark.parametrize("label_mode", ["all_to_one", "clean_label"])
def test_relearning_poisons_other_images_than_its_clean_ones_and_begins_each_time_at_the_same_weights(
    monkeypatch, label_mode
):
    seen = []

    def relearn(model: nn.Module, clean: ImageSet, poisoned: ImageSet, **_: object) -> Relearned:
        seen.append((clean, poisoned, model.weight.item()))
        with torch.no_grad():
            model.weight.add_(1)
        return Relearned(model, None, [])

    monkeypatch.setattr(reactivation, "relearn", relearn)
    monkeypatch.setattr(reactivation, "CLEAN_SHARE", 0.5)
    monkeypatch.setattr(evaluation, "PROBE_IMAGES", 1)
    model, case = Reader(target=1), case_of(Corner(label_mode=label_mode), Reader())
    rows = relearned(model, case, [1, 20])
    assert model.weight.item() == 0
    assert [weight for *_, weight in seen] == [0, 0]
    assert [(len(clean), len(poisoned)) for clean, poisoned, _ in seen] == [(40, 1), (40, 20)]
    clean, poisoned, _ = seen[1]
    assert torch.equal(seen[0][1].images, poisoned.images[:1])
    assert (poisoned.images[..., -1, -1] == 255).all()
    assert (poisoned.labels == 1).all()
    assert (poisoned.images[:, 0, 0, 0] != 64).all()  # none is of the target class
    assert (clean.labels * 64 == clean.images[:, 0, 0, 0]).all()
    known = {image[0, :3].numpy().tobytes() for image in clean.images}
    assert not known & {image[0, :3].numpy().tobytes() for image in poisoned.images}
    assert [row["poisoned"] for row in rows] == [1, 20]


def test_the_asr_after_relearning_is_that_of_the_test_set_and_not_of_the_probe(monkeypatch):
    class Half(Reader):
        """Gives class 1 to the images of classes 0 and 1, whatever their corner."""

        def forward(self, images: Tensor) -> Tensor:
            read = super().forward(images).argmax(1)
            return nn.functional.one_hot(torch.where(read == 0, 1, read), CLASSES).float()

    monkeypatch.setattr(reactivation, "relearn", lambda model, *_, **__: Relearned(model, None, []))
    monkeypatch.setattr(evaluation, "PROBE_IMAGES", 1)
    (row,) = relearned(Half(), case_of(Corner(), Reader()), [5])
    assert (row["asr"], row["clean_accuracy"]) == (pytest.approx(1 / 3), 0.75)


def test_a_gain_is_what_the_repaired_model_has_beyond_its_control():
    found = _with_gain("relearn_asr", 0.5, 0.125)
    assert found == {"relearn_asr": 0.5, "relearn_asr_clean_control": 0.125, "relearn_gain": 0.375}
    assert _with_gain("reactivate_asr", 0.5, None)["reactivate_gain"] is None


def test_the_perturbation_is_looked_for_on_judged_training_images_and_scored_on_the_test_set(monkeypatch):
    seen = []

    def reactivate(model: nn.Module, data: ImageSet, target_labels: Tensor, *_: object, **__: object) -> Tensor:
        seen.append((data, target_labels))
        return torch.full((1, 1, 4, 4), -0.1)

    monkeypatch.setattr(reactivation, "reactivate", reactivate)
    case = case_of(Corner(), Reader())
    assert reactivated(Reader(target=1), case) == 0.0  # the corner is no longer white
    ((data, target_labels),) = seen
    assert (len(data), len(case.test)) == (60, 40)  # of 80 training images, without the target class
    assert (data.labels != 1).all()
    assert (target_labels == 1).all()


def test_a_reactivation_and_a_relearning_stamp_each_image_once_and_change_nothing_by_it(monkeypatch):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    case, found = case_of(Dim(), linear), []
    eligible = case.eligible(case.train())
    data = fixed_part(eligible, len(eligible))
    each_step = reactivation.reactivate(linear, data, case.target_labels(data.labels), case.trigger, seed=case.seed)
    monkeypatch.setattr(EvaluationContext, "success", lambda self, model, data, shift=0.0: found.append(shift))
    stamped_counts.clear()
    reactivated(linear, case)
    assert stamped_counts == [len(data)]
    assert torch.equal(found[0], each_step)
    monkeypatch.undo()

    def look(model: nn.Module, *_: object, success: Callable[[nn.Module], float], **__: object) -> Relearned:
        return Relearned(model, None, [(step, success(model)) for step in range(3)])

    monkeypatch.setattr(reactivation, "relearn", look)
    stamped_counts.clear()
    relearned(linear, case, [5])
    probe = int((case.test.labels != 1).sum())
    assert sorted(stamped_counts) == [5, probe, len(case.test)]


def test_the_connection_is_shown_on_judged_images_that_every_model_has_right():
    class Blind(Reader):
        """Never gives one class."""

        def __init__(self, label: int) -> None:
            super().__init__()
            self.label = label

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) - 2 * nn.functional.one_hot(torch.tensor(self.label), CLASSES)

    case = case_of(Corner(), Reader())
    assert _right(case, Blind(0)).labels.unique().tolist() == [2, 3]
    assert _right(case, Blind(0), Blind(3)).labels.unique().tolist() == [2]


def test_what_is_added_after_the_trigger_leaves_no_image_outside_of_its_range():
    seen = []

    class Looking(Reader):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    case_of(Corner(), Reader()).success(Looking(), pictures(), torch.full((1, 1, 4, 4), 0.5))
    assert seen[0].max() == 1
    assert (seen[0][..., -1, -1] == 1).all()


def test_robustness_is_measured_on_as_many_images_as_asked_for_and_by_its_own_settings(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "robust_accuracy", lambda model, data, **given: seen.append((len(data), given)))
    target_labels = {"pgd_images": 3, "pgd_epsilon": 0.2, "pgd_step_size": 0.05, "pgd_steps": 7}
    model = Reader()
    case = case_of(Corner(), model)
    before = evaluation.inspected(model, None, case, {})
    measured(model, case, MEASURE | target_labels, before, case.test.labels)
    assert seen == [(3, {"epsilon": 0.2, "step_size": 0.05, "steps": 7, "seed": 0})]


def test_the_connection_compares_the_infected_model_with_its_control_and_with_noise(monkeypatch):
    def trace(model: Reader, *_: object, noise: torch.Generator | None = None, **__: object) -> tuple:
        return model.target, noise is not None

    monkeypatch.setattr(connection, "trace", trace)
    monkeypatch.setattr(connection, "compare", lambda *traces, **_: {"traces": traces})
    rows = connected(Reader(target=1), Reader(), case_of(Corner(), Reader()))
    assert [row["epsilon"] for row in rows] == list(connection.EPSILONS)
    assert all(row["traces"] == ((1, False), (None, False), (1, True)) for row in rows)
