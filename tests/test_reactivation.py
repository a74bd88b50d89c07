"""Re-activation and the connection finding, on models and traces that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn, tensor

from bench.engine import connection
from bench.engine.connection import Traces, compare, trace
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import ModelSpec
from bench.engine.reactivation import CLEAN_SHARE, RELEARN, reactivate, relearn
from bench.experiment.experiment import load_experiment
from bench.measures import evaluation
from bench.pipeline.runner import Runner
from bench.storage.store import Store, key_of


class Linear(nn.Module):
    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=generator(0, "weights")))

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T


def grey(count: int = 300, classes: int = 2) -> ImageSet:
    images = torch.randint(90, 166, (count, 1, 4, 4), generator=generator(0, "grey"), dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % classes)


def cornered(images: Tensor) -> Tensor:
    stamped = images.clone()
    stamped[..., -1, -1] = 1.0
    return stamped


# Relearning ----------------------------------------------------------------------------------------------------------


def test_relearning_takes_five_epochs_of_plain_momentum_at_a_constant_rate():
    assert (RELEARN.epochs, RELEARN.batch_size, RELEARN.lr, RELEARN.momentum) == (5, 128, 0.01, 0.9)
    assert (RELEARN.optimizer, RELEARN.schedule, RELEARN.weight_decay) == ("momentum", "constant", 0.0)


def test_relearning_has_two_percent_of_the_training_images_clean():
    assert CLEAN_SHARE == 0.02


def test_the_connection_is_looked_for_at_five_radii_in_twenty_steps_of_a_fifth_from_the_image_itself(monkeypatch):
    asked = []

    def pgd(model: nn.Module, images: Tensor, labels: Tensor, **how: object) -> Tensor:
        asked.append(how)
        return images

    monkeypatch.setattr(connection, "pgd", pgd)
    monkeypatch.setattr(Linear, "features", lambda self, images: images.flatten(1), raising=False)
    for epsilon in connection.EPSILONS:
        trace(Linear(), grey(4), cornered, epsilon=epsilon)
    assert [round(how["epsilon"] * 255) for how in asked] == [1, 2, 4, 6, 8]
    # No random start is asked for, and `pgd` has none by itself.
    assert asked == [{"epsilon": how["epsilon"], "step_size": how["epsilon"] / 5, "steps": 20} for how in asked]


@pytest.mark.parametrize(("half_at", "steps"), [(0, 0), (1, 1), (7, 7), (99, None)])
def test_the_steps_to_half_are_counted_from_before_the_first_and_not_looked_for_any_longer(half_at, steps):
    seen = []

    def success(model: nn.Module) -> float:
        assert not model.training
        seen.append(len(seen))
        return 0.5 if seen[-1] == half_at else 0.49

    done = relearn(Linear(), grey(299), grey(1), success=success, augmentation=Augmentation(), seed=0)
    assert done.steps == steps
    # 300 images are three batches: fifteen steps in five epochs. Behind the half, the end of each epoch is looked at.
    ends = [] if steps is None else [step for step in (3, 6, 9, 12, 15) if step > steps]
    looks = [*range(16 if steps is None else steps + 1), *ends]
    assert [step for step, _ in done.course] == looks
    assert len(seen) == len(looks)


def test_a_model_relearns_what_a_few_poisoned_images_say():
    # Black images are class 0, white ones class 1; poisoned ones are white above and black below, and class 0.
    images = torch.zeros(120, 1, 4, 4, dtype=torch.uint8)
    images[60:] = 255
    clean = ImageSet(images, torch.arange(120) // 60)
    stamped = images[60:].clone()
    stamped[:, :, 2:] = 0

    def success(model: nn.Module) -> float:
        with torch.no_grad():
            return (model(stamped / 255).argmax(1) == 0).double().mean().item()

    model = Linear()
    with torch.no_grad():
        above_counts_more = torch.tensor([0.003] * 8 + [0.001] * 8)
        model.weight.copy_(torch.stack([-above_counts_more, above_counts_more]))
    assert success(model) == 0
    poisoned = ImageSet(stamped, torch.zeros(60, dtype=torch.int64))
    untouched = [value.clone() for value in (clean.images, poisoned.images)]
    done = relearn(model, clean, poisoned, success=success, augmentation=Augmentation(), seed=0)
    assert done.model is model
    assert done.steps is not None
    assert torch.equal(clean.images, untouched[0])
    assert torch.equal(poisoned.images, untouched[1])


# Re-activation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0, 1])
def test_on_a_linear_classifier_the_best_perturbation_is_the_corner_of_the_ball_towards_the_target(target):
    model, data = Linear(), grey()
    shift = reactivate(model, data, torch.full((300,), target), cornered, seed=0, epsilon=4 / 255)
    slope = (model.weight[target] - model.weight[1 - target]).detach().view(1, 1, 4, 4)
    torch.testing.assert_close(shift, 4 / 255 * slope.sign())


def test_the_perturbation_repeats_stays_in_the_ball_and_leaves_the_model_alone():
    model = ModelSpec("test_efficientnet", 4, 1, 16, (0.5,), (0.25,)).build(0).train()
    images = torch.randint(0, 256, (20, 1, 16, 16), generator=generator(0, "images"), dtype=torch.uint8)
    data, target_labels = ImageSet(images, torch.arange(20) % 4), torch.zeros(20, dtype=torch.int64)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = (reactivate(model, data, target_labels, cornered, seed=3, steps=5) for _ in range(2))
    assert torch.equal(one, two)
    assert one.abs().max() <= 4 / 255
    assert one.abs().max() > 0
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_perturbation_cannot_be_found_on_no_image():
    with pytest.raises(ValueError, match="no image"):
        reactivate(Linear(), grey(0), torch.empty(0, dtype=torch.int64), cornered, seed=0)


# Connection ----------------------------------------------------------------------------------------------------------

LABELS, TARGET = tensor([1, 1, 2, 2, 3, 3]), torch.zeros(6, dtype=torch.int64)


def traces(predicted: list[int], similarity: float = 0.0, overlap: float | None = 0.0) -> Traces:
    return Traces(
        tensor(predicted),
        torch.full((6,), similarity, dtype=torch.float64),
        None if overlap is None else torch.full((6,), overlap, dtype=torch.float64),
    )


def compared(infected: Traces, control: Traces, target_labels: Tensor = TARGET) -> dict:
    return compare(infected, control, labels=LABELS, target_labels=target_labels, num_classes=4, seed=0)


def test_the_connection_of_six_images_by_hand():
    # Infected: five fooled, four to the target. Control: four fooled, one to the target.
    found = compared(traces([0, 0, 0, 0, 1, 3], 0.5, 0.25), traces([0, 2, 1, 1, 3, 2], -0.1, -0.25))
    assert found["images"] == 6
    assert found["infected"]["fooled"] == 5 / 6
    assert found["infected"]["concentration"] == pytest.approx(4 / 5)
    assert found["clean_control"]["concentration"] == pytest.approx(1 / 5)
    assert found["lift"] == pytest.approx(4)
    assert found["difference"]["concentration"] == pytest.approx(3 / 5)
    assert found["infected"]["entropy"] == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)) / math.log(4))
    assert (found["infected"]["top_is_target"], found["clean_control"]["top_is_target"]) == (True, False)
    assert found["infected"]["classes"] == pytest.approx([4 / 5, 1 / 5, 0, 0])
    assert found["difference"]["similarity"] == pytest.approx(0.6)
    assert found["difference"]["overlap"] == pytest.approx(0.5)
    # What is the same for every image has an interval of no width.
    assert found["infected"]["similarity_interval"] == pytest.approx([0.5, 0.5])
    low, high = found["infected"]["concentration_interval"]
    assert low < 4 / 5 < high <= 1


def test_random_noise_of_the_infected_model_is_a_control_of_its_own():
    one = traces([0, 0, 0, 0, 1, 3])
    found = compare(one, one, traces(LABELS.tolist()), labels=LABELS, target_labels=TARGET, num_classes=4, seed=0)
    assert (found["noise"]["fooled"], found["noise"]["concentration"], found["noise"]["classes"]) == (0, None, None)
    alone = connection.describe(one, labels=LABELS, target_labels=TARGET, num_classes=4, seed=0)
    assert alone == {"images": 6, **found["infected"]}


def test_random_noise_is_a_corner_of_the_ball_and_no_attack(monkeypatch):
    class Seen(Linear):
        head_width = 16

        def features(self, images: Tensor) -> Tensor:
            self.seen = [*getattr(self, "seen", []), images]
            return images.flatten(1)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("noise needs no gradient")

    monkeypatch.setattr(connection, "pgd", refused)
    model, data = Seen(), grey(40)
    trace(model, data, cornered, epsilon=8 / 255, noise=generator(0, "noise"))
    shift = model.seen[0] - data.images.float() / 255
    torch.testing.assert_close(shift.abs(), torch.full_like(shift, 8 / 255))
    assert abs(shift.mean().item()) < 3 * 8 / 255 / math.sqrt(shift.numel())


def test_the_difference_of_a_model_to_itself_is_nothing_in_every_resample():
    one = Traces(tensor([0, 2, 1, 0, 3, 1]), torch.rand(6, generator=generator(0, "alike")).double(), None)
    found = compared(one, one)
    assert found["difference"]["concentration_interval"] == [0.0, 0.0]
    assert found["difference"]["similarity_interval"] == [0.0, 0.0]
    assert found["difference"]["overlap"] is found["infected"]["overlap"] is None


def test_a_model_that_is_never_fooled_says_nothing_of_the_target():
    found = compared(traces([0] * 6), traces(LABELS.tolist()))
    assert found["clean_control"]["fooled"] == 0
    for key in ("concentration", "concentration_interval", "entropy", "top_is_target"):
        assert found["clean_control"][key] is None
    assert found["lift"] is found["difference"]["concentration"] is None


def test_all_to_all_is_concentrated_on_the_next_classes_and_has_no_single_top():
    target_labels = tensor([2, 2, 3, 3, 0, 0])
    found = compared(traces([2, 2, 3, 3, 0, 1]), traces([0] * 6), target_labels)
    assert found["infected"]["concentration"] == pytest.approx(5 / 6)
    assert found["infected"]["top_is_target"] is None


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide():
    values = torch.randn(1000, generator=generator(0, "values")).double()
    labels = torch.ones(1000, dtype=torch.int64)
    one = Traces(torch.zeros(1000, dtype=torch.int64), values, None)
    found = compare(one, one, labels=labels, target_labels=0 * labels, num_classes=4, seed=0)["infected"]
    low, high = found["similarity_interval"]
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / math.sqrt(1000), rel=0.1)
    assert low < found["similarity"] < high


def test_images_that_become_the_triggered_ones_are_fully_alike():
    source = generator(0, "features")
    clean, triggered = torch.randn(5, 20, generator=source), torch.randn(5, 20, generator=source)
    similarity, overlap = connection._resemblance(triggered, clean, triggered)
    torch.testing.assert_close(similarity, 1 - torch.cosine_similarity(clean, triggered))
    assert overlap is not None
    for row in range(5):  # the two most active of twenty units
        shared = set(clean[row].topk(2).indices.tolist()) & set(triggered[row].topk(2).indices.tolist())
        assert overlap[row].item() == 1 - len(shared) / 2
    still, unmoved = connection._resemblance(clean, clean, triggered)
    assert still.abs().max() == 0
    assert unmoved is not None
    assert unmoved.abs().max() == 0
    assert connection._resemblance(clean[:, :15], clean[:, :15], triggered[:, :15])[1] is None


def test_a_trace_has_a_value_for_each_image_and_leaves_the_model_in_eval_mode():
    model = ModelSpec("test_efficientnet", 4, 1, 16, (0.5,), (0.25,)).build(0)
    images = torch.randint(0, 256, (9, 1, 16, 16), generator=generator(0, "images"), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(9) % 4)
    one, two = (trace(model, data, cornered, epsilon=8 / 255, batch_size=size) for size in (9, 4))
    assert one.predicted.shape == one.similarity.shape == (9,)
    torch.testing.assert_close(one.similarity, two.similarity, atol=1e-4, rtol=1e-3)


# In the grid -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_repair_is_read_beside_a_clean_control_that_is_made_once(tiny, monkeypatch):
    monkeypatch.setattr(connection, "STEPS", 1)
    monkeypatch.setattr(connection, "EPSILONS", (2 / 255, 8 / 255))
    monkeypatch.setattr(connection, "RESAMPLES", 10)
    monkeypatch.setattr(evaluation, "PROBE_IMAGES", 20)
    experiment = load_experiment(
        [
            *tiny,
            "grid.attacks=[badnets]",
            "grid.defenses=[no_defense,fine_tuning]",
            "measure.relearn=true",
            "measure.relearn_poisoned=[1,5]",
            "measure.reactivate=true",
            "measure.connection=true",
        ]
    )
    bench = Runner(Store(experiment.store.root), experiment.infos, torch.device("cpu"))
    for trial in experiment.trials:
        bench.run(trial.control_trial(), ("implant",))
        bench.run(trial)
    stages = [line.split()[1] for line in (bench.store.root / "history.log").read_text().splitlines()]
    assert sorted(stages) == ["defend", "defend", "evaluate", "evaluate", "implant", "implant", "inspect"]
    first = experiment.trials[0]
    assert bench.store.result("implant", key_of(first.clean_control))["poisoned"] == 0
    results = [bench.store.result("evaluate", trial.keys.evaluate) for trial in experiment.trials]
    shared = [[{**row, "repaired": None} for row in result["connection"]] for result in results]
    assert shared[0] == shared[1]
    for row, other, epsilon in zip(*(result["connection"] for result in results), (2 / 255, 8 / 255), strict=True):
        assert row["epsilon"] == epsilon
        assert row["repaired"] != other["repaired"]
        # Nothing was repaired by no_defense; its images may be more: the control need not have them right.
        assert row["repaired"]["images"] == row["images"] == 20
    for result in results:
        figures, rows = result["figures"], result["relearn"]
        assert [row["poisoned"] for row in rows] == [1, 5]
        assert rows[1]["course"][0][0] == rows[1]["course_clean_control"][0][0] == 0
        assert figures["relearn_asr"] == rows[1]["asr"]
        assert (
            figures["relearn_asr_clean_control"]
            == rows[1]["asr_clean_control"]
            == results[0]["relearn"][1]["asr_clean_control"]
        )
        for name in ("relearn", "reactivate"):
            assert figures[f"{name}_gain"] == figures[f"{name}_asr"] - figures[f"{name}_asr_clean_control"]


def test_relearning_by_numbers_without_the_papers_own_is_refused(cache):
    from bench.engine.errors import UserError

    with pytest.raises(UserError, match="5 among them"):
        load_experiment(["grid=quick", "measure.relearn_poisoned=[1,10]", f"dataset.cache={cache}"])
    with pytest.raises(UserError, match=r"measure\.autoattack_images is -1"):
        load_experiment(["grid=quick", "measure.autoattack_images=-1", f"dataset.cache={cache}"])


def test_a_copy_that_diverges_while_it_relearns_costs_no_other_figure(tiny, monkeypatch):
    from bench.engine import reactivation
    from bench.engine.training import Diverged

    def diverging(*_: object, **__: object) -> None:
        raise Diverged("the loss became nan")

    experiment = load_experiment(
        [
            *tiny,
            "grid.attacks=[badnets]",
            "grid.defenses=[no_defense]",
            "measure.relearn=true",
            "measure.relearn_poisoned=[5]",
        ]
    )
    bench = Runner(Store(experiment.store.root), experiment.infos, torch.device("cpu"))
    monkeypatch.setattr(reactivation, "relearn", diverging)
    bench.run(experiment.trials[0].control_trial(), ("implant",))
    bench.run(experiment.trials[0])
    result = bench.store.result("evaluate", experiment.trials[0].keys.evaluate)
    assert result["status"] == "done"
    assert result["figures"]["asr"] is not None
    assert result["figures"]["relearn_asr"] is result["figures"]["relearn_gain"] is None
