from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from baselines import neural_cleanse
from baselines.neural_cleanse import CostSchedule, NeuralCleanse, Stamped, anomaly_index, stamp
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import TrainingLog
from defenses.base import NotApplicable, ReserveView


class Quadrants(nn.Module):
    """Class c is the brightest quarter of 8x8 grey images; a white top left pixel, if planted, leads to class 0."""

    def __init__(self, planted: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 4)
        weight = torch.zeros(4, 8, 8)
        for label in range(4):
            row, column = 4 * (label // 2), 4 * (label % 2)
            weight[label, row : row + 4, column : column + 4] = 1.0
        weight[:, 0, 0] = 0.0
        if planted:
            weight[0, 0, 0] = 12.0
        with torch.no_grad():
            self.fc.weight.copy_(weight.flatten(1))
            self.fc.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))

    def get_classifier(self) -> nn.Linear:
        return self.fc


def quadrants(planted: bool) -> Classifier:
    return Classifier(Quadrants(planted), [0.0], [1.0]).eval()


def bright(count: int = 64) -> ImageSet:
    """Dark images with one bright quarter, and a black corner."""
    images = torch.randint(0, 40, (count, 1, 8, 8), generator=generator(0, "bright"), dtype=torch.uint8)
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[0, row : row + 4, column : column + 4] += 100
    images[:, 0, 0, 0] = 0
    return ImageSet(images, labels)


def view(model: Classifier, data: ImageSet, seed: int = 0, classes: int = 4) -> ReserveView:
    return ReserveView(
        copy.deepcopy(model),
        classes,
        seed,
        torch.device("cpu"),
        TrainingLog(),
        reserve=data,
        augmentation=Augmentation(),
    )


def test_the_reversed_mask_of_a_planted_class_is_the_smallest_by_far_and_lies_on_the_trigger():
    given = view(quadrants(planted=True), bright())
    masks, patterns = NeuralCleanse(steps=300, batches=2).reverse(given)
    norms = masks.flatten(1).sum(1)
    assert norms.argmin() == 0
    assert norms[0] < 1.0  # the trigger is one pixel
    assert norms[1:].min() > 3 * norms[0]
    assert masks[0, 0].argmax() == 0
    assert patterns[0, 0, 0, 0] > 0.9  # and white
    # Each stamp leads where it should.
    for label in range(4):
        reached = given.model(stamp(given.reserve.images / 255, masks[label], patterns[label])).argmax(1) == label
        assert reached.float().mean() >= 0.95


def test_the_planted_class_is_flagged_and_unlearnt():
    data, settings = bright(), NeuralCleanse(steps=200, batches=2, lr=1.0)
    given = view(quadrants(planted=True), data)
    done = settings.defend(given).model
    index = [value for _, value in given.log.curves["neural_cleanse/anomaly_index"]]
    assert index[0] > 2 > max(index[1:])
    triggered = data.images / 255
    triggered[:, 0, 0, 0] = 1.0
    others = data.labels != 0
    assert (quadrants(planted=True)(triggered).argmax(1) == 0).all()
    assert (done(triggered).argmax(1) == 0)[others].float().mean() < 0.1


def test_a_model_without_a_flagged_class_comes_back_as_it_was():
    infected = quadrants(planted=True)
    found = NeuralCleanse(steps=2, batches=1, threshold=1e9).defend(view(infected, bright())).model
    assert all(torch.equal(value, infected.state_dict()[key]) for key, value in found.state_dict().items())


def test_classes_that_share_a_forward_and_classes_that_take_turns_find_the_same(monkeypatch):
    settings = NeuralCleanse(steps=40, batches=2)
    masks, patterns = settings.reverse(view(quadrants(planted=True), bright()))
    monkeypatch.setattr(neural_cleanse, "AT_ONCE", 32)  # one class at a time
    alone = settings.reverse(view(quadrants(planted=True), bright()))
    torch.testing.assert_close(alone[0], masks, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(alone[1], patterns, atol=1e-4, rtol=1e-3)


def test_the_anomaly_index_is_counted_in_consistent_median_absolute_deviations_below_the_median():
    # Median 20, deviations 16 2 1 0 1 2 20, whose median is 2: 16 / (1.4826 * 2) for the first.
    found = anomaly_index(torch.tensor([4.0, 18.0, 19.0, 20.0, 21.0, 22.0, 40.0]))
    expected = [16 / 2.9652, 2 / 2.9652, 1 / 2.9652, 0, 0, 0, 0]  # the large one is no backdoor
    assert found.tolist() == pytest.approx(expected)


def test_of_an_even_number_of_classes_the_median_is_the_mean_of_the_middle_two():
    # Median 2.5, deviations 1.5 0.5 0.5 1.5, whose median is 1.
    assert anomaly_index(torch.tensor([1.0, 2.0, 3.0, 4.0]))[0].item() == pytest.approx(1.5 / 1.4826)


def test_equal_norms_have_no_outlier():
    assert anomaly_index(torch.full((7,), 3.0)).tolist() == [0.0] * 7


def one_class(successes: list[float], norms: list[float]) -> tuple[list[float], int, float]:
    """The rule for one class, step by step: costs after each step, how many steps it ran, the best norm."""
    cost, best, stalled, up, down, went_up, went_down, costs = 0.0, math.inf, 0, 0, 0, False, False, []
    for step, (success, norm) in enumerate(zip(successes, norms, strict=True)):
        works = success >= 0.99
        if works and norm < best:
            best, stalled = norm, 0
        elif best < math.inf:
            stalled += 1
        if went_up and went_down and stalled >= 25:
            return costs, step + 1, best
        up, down = (up + 1, 0) if works else (0, down + 1)
        if cost == 0 and up == 5:
            cost, up, went_up, went_down = 1e-3, 1, False, False
        elif up == 5:
            cost, up, went_up = cost * 2, 0, True
        elif down == 5:
            cost, down, went_down = cost / 2**1.5, 0, True
        costs.append(cost)
    return costs, len(successes), best


def test_the_weight_of_the_norm_and_the_early_stop_follow_the_rule_of_each_class_alone():
    source, steps, count = generator(0, "schedule"), 400, 12
    # Long runs of success and of failure, of every length.
    runs = torch.rand(steps // 4, count, generator=source).repeat_interleave(4, 0)
    success = torch.where(runs > torch.linspace(0, 0.9, count), 1.0, 0.5)
    norms = torch.rand(steps, count, generator=source) + torch.linspace(2, 0, steps)[:, None].clamp(min=1.6)
    schedule, costs, ran = CostSchedule(NeuralCleanse(), count), [], torch.zeros(count)
    for step in range(steps):
        ran += schedule.running
        schedule.update(success[step], norms[step])
        costs.append(schedule.cost.clone())
    expected = [one_class(success[:, k].tolist(), norms[:, k].tolist()) for k in range(count)]
    stopped = [length < steps for _, length, _ in expected]
    assert any(stopped)
    assert not all(stopped)
    for k, (by_hand, length, best) in enumerate(expected):
        assert [cost[k].item() for cost in costs[: len(by_hand)]] == pytest.approx(by_hand)
        assert ran[k] == length
        assert schedule.best[k].item() == pytest.approx(best)


def test_five_successes_set_the_weight_four_more_double_it_and_five_failures_lower_it():
    schedule = CostSchedule(NeuralCleanse(), 1)
    seen = []
    for success in [1.0] * 9 + [0.0] * 5:
        schedule.update(torch.tensor([success]), torch.tensor([1.0]))
        seen.append(schedule.cost.item())
    assert seen[:4] == [0.0] * 4
    assert seen[4:8] == [1e-3] * 4
    assert seen[8:13] == [2e-3] * 5
    assert seen[13] == pytest.approx(2e-3 / 2**1.5)


def test_a_fifth_of_a_batch_is_stamped_and_keeps_its_labels():
    masks, patterns = torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8)
    masks[0, 0, 0, 0] = masks[1, 0, 7, 7] = 1.0
    patterns[0], patterns[1] = 0.25, 0.75
    images, labels = torch.full((50, 3, 8, 8), 0.5), torch.arange(50)
    found, given = Stamped(masks, patterns, 0.2).augmented(nn.Identity(), images, labels, 0, generator(0))
    assert torch.equal(given, labels)
    first, second = (found[:, :, 0, 0] == 0.25).all(1), (found[:, :, 7, 7] == 0.75).all(1)
    assert int((first ^ second).sum()) == 10
    assert first.any()
    assert second.any()
    assert torch.equal(found[~(first | second)], images[:40])
    assert (found[first][:, :, 4] == 0.5).all()  # nothing else changes


def test_it_runs_on_a_network_and_repeats_under_a_seed():
    model = ModelSpec("test_efficientnet", 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0).eval()
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=generator(0), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(40) % 4)
    # Some class is always below the median, and a threshold of zero flags it.
    settings = NeuralCleanse(steps=2, batches=1, threshold=0.0, updates=2)
    one, two = (settings.defend(view(model, data)).model for _ in range(2))
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    assert not torch.equal(one.head.weight, model.head.weight)
    assert all(weight.requires_grad for weight in one.parameters())


def test_two_classes_are_not_applicable():
    with pytest.raises(NotApplicable, match="2 have none"):
        NeuralCleanse().defend(view(quadrants(planted=False), bright(), classes=2))


@pytest.mark.slow
def test_on_digits_it_finds_and_removes_badnets(run_grid):
    status, trials = run_grid(
        *("train.epochs=30", "train.batch_size=64", "model.stem=half", "grid.attacks=[badnets]"),
        *("grid.defenses=[no_defense,neural_cleanse]", "defense.neural_cleanse.steps=200"),
    )
    assert status == 0
    found = trials.set_index("defense")
    assert found.asr["no_defense"] > 0.9
    assert found.asr["neural_cleanse"] < 0.2
    assert found.clean_accuracy["neural_cleanse"] > 0.95
