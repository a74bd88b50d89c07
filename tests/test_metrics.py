import numpy as np
import pytest
import torch
from torch import Tensor, nn, tensor

from bench.engine.data import ImageSet, generator
from bench.engine.metrics import (
    accuracy,
    accuracy_by_class,
    attack_figures,
    attack_success_rate,
    defense_effectiveness,
    detection,
    predict,
    recovery_accuracy,
    robust_accuracy,
    robust_images,
    success_by_class,
)
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import Recipe, fit


def noise(count: int, channels: int = 3, size: int = 16, classes: int = 4) -> ImageSet:
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator(0, "noise"), dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % classes)


class Linear(nn.Module):
    """Class 1 if w x + b > 0, for pixels in [0, 1]."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, images: Tensor) -> Tensor:
        score = images.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(score), score], dim=1)


def test_accuracy_is_the_share_of_equal_labels():
    assert accuracy(tensor([0, 1, 2, 2]), tensor([0, 1, 1, 2])) == 0.75
    assert accuracy(tensor([5]), tensor([5])) == 1.0
    assert accuracy(tensor([1, 1]), tensor([0, 0])) == 0.0


def test_accuracy_of_a_third_is_exact_to_double_precision():
    assert accuracy(tensor([1, 0, 0]), tensor([1, 1, 1])) == 1 / 3


def test_success_rate_leaves_out_images_already_of_the_target_class():
    predicted, true = tensor([0, 0, 1, 2]), tensor([0, 1, 1, 2])
    assert attack_success_rate(predicted, torch.zeros(4, dtype=torch.int64), true != 0) == 1 / 3


def test_a_model_that_says_target_always_has_success_rate_one_and_recovery_zero():
    true = torch.arange(100) % 10
    predicted, target_labels = torch.full((100,), 3), torch.full((100,), 3)
    assert attack_success_rate(predicted, target_labels, true != 3) == 1.0
    assert recovery_accuracy(predicted, true, true != 3) == 0.0


def test_a_perfect_model_has_success_rate_zero_and_recovery_one():
    true = torch.arange(100) % 10
    assert attack_success_rate(true, torch.full((100,), 3), true != 3) == 0.0
    assert recovery_accuracy(true, true, true != 3) == 1.0


def test_all_to_all_judges_every_image_by_its_next_class():
    true = torch.arange(8) % 4
    target_labels, eligible = (true + 1) % 4, torch.ones(8, dtype=torch.bool)
    assert attack_success_rate(target_labels, target_labels, eligible) == 1.0
    assert attack_success_rate(tensor([1, 1, 1, 1, 1, 1, 1, 1]), target_labels, eligible) == 0.25
    assert recovery_accuracy(tensor([1, 1, 1, 1, 1, 1, 1, 1]), true, eligible) == 0.25


def test_success_and_recovery_together_are_at_most_one():
    source = generator(0, "random models")
    for _ in range(50):
        true = torch.randint(0, 5, (40,), generator=source)
        predicted = torch.randint(0, 5, (40,), generator=source)
        eligible = true != 2
        target_labels = torch.full((40,), 2)
        success, recovery = (
            attack_success_rate(predicted, target_labels, eligible),
            recovery_accuracy(predicted, true, eligible),
        )
        counts = [(int(p), int(t)) for p, t in zip(predicted, true, strict=True) if t != 2]
        assert success == sum(p == 2 for p, _ in counts) / len(counts)
        assert recovery == sum(p == t for p, t in counts) / len(counts)
        assert success + recovery <= 1


def figures(clean: list[int], triggered: list[int], true: list[int], target_labels: list[int], eligible: list[bool]):
    return attack_figures(
        clean=tensor(clean),
        triggered=tensor(triggered),
        true=tensor(true),
        target_labels=tensor(target_labels),
        eligible=tensor(eligible),
    )


def test_what_a_trigger_does_worked_out_by_hand_for_target_class_zero():
    # Two images of class 0, which are not judged, three of class 1, two of class 2.
    found = figures(
        clean=[0, 1, 1, 0, 1, 2, 2],
        triggered=[0, 0, 0, 0, 1, 0, 2],
        true=[0, 0, 1, 1, 1, 2, 2],
        target_labels=[0] * 7,
        eligible=[False, False, True, True, True, True, True],
    )
    assert found == {
        "asr": 3 / 5,  # images 3, 4 and 6
        "asr_all_images": 5 / 7,  # and both of class 0
        "recovery_accuracy": 2 / 5,  # images 5 and 7
        "false_target_rate": 1 / 5,  # image 4
        "worst_source_asr": 2 / 3,  # of class 1; class 2 has 1 / 2
        "consistency": 3 / 5,  # images 4, 5 and 7
    }


def test_a_perfect_model_has_an_asr_of_nothing_that_some_toolkits_call_a_tenth():
    true = list(range(10))
    found = figures(
        clean=true, triggered=true, true=true, target_labels=[3] * 10, eligible=[label != 3 for label in true]
    )
    assert (found["asr"], found["asr_all_images"], found["false_target_rate"]) == (0.0, 0.1, 0.0)
    assert (found["recovery_accuracy"], found["consistency"], found["worst_source_asr"]) == (1.0, 1.0, 0.0)


def test_a_model_collapsed_to_the_target_has_its_whole_asr_as_floor():
    true = list(range(4))
    found = figures(
        clean=[2] * 4, triggered=[2] * 4, true=true, target_labels=[2] * 4, eligible=[True, True, False, True]
    )
    assert found["asr"] == found["false_target_rate"] == found["asr_all_images"] == found["consistency"] == 1.0


def test_all_to_all_leaves_no_image_out():
    true, target_labels = [0, 1, 2, 2], [1, 2, 0, 0]
    found = figures(clean=true, triggered=[1, 2, 0, 2], true=true, target_labels=target_labels, eligible=[True] * 4)
    assert found["asr"] == found["asr_all_images"] == 3 / 4
    assert found["worst_source_asr"] == 1.0
    assert found["recovery_accuracy"] == found["consistency"] == 1 / 4
    assert found["false_target_rate"] == 0.0


@pytest.mark.parametrize("count", [0, 4])
def test_without_an_image_to_judge_every_figure_is_none_and_never_zero(count):
    one = [1] * count
    found = figures(clean=one, triggered=one, true=one, target_labels=one, eligible=[False] * count)
    assert set(found.values()) == {None}
    assert len(found) == 6


def test_figures_by_class_are_none_for_a_class_without_images():
    predicted, true = tensor([0, 0, 1, 3]), tensor([0, 1, 1, 3])
    assert accuracy_by_class(predicted, true, 5) == [1.0, 0.5, None, 1.0, None]
    assert success_by_class(predicted, torch.zeros(4), true, true != 0, 5) == [None, 0.5, None, 0.0, None]


def test_a_source_class_without_images_does_not_hide_the_worst_one():
    found = figures(clean=[4, 4], triggered=[0, 4], true=[4, 4], target_labels=[0, 0], eligible=[True, True])
    assert found["worst_source_asr"] == 0.5


@pytest.mark.parametrize(
    ("accuracies", "rates", "expected"),
    [
        ((0.93, 0.92), (1.0, 0.01), 0.99),
        ((0.93, 0.93), (1.0, 1.0), 0.5),  # a defense that does nothing
        ((0.93, 0.10), (1.0, 0.0), 0.585),  # a model that names one class, not the target
        ((0.93, 0.10), (1.0, 0.1), 0.535),  # a model that guesses
        ((0.93, 0.95), (0.2, 0.9), 0.5),  # neither a gain of accuracy nor a rise of the ASR counts
    ],
)
def test_the_defense_effectiveness_rating_takes_the_loss_of_accuracy_off(accuracies, rates, expected):
    assert defense_effectiveness(accuracy=accuracies, asr=rates) == pytest.approx(expected)


def test_a_share_of_nothing_is_an_error_and_not_zero():
    nothing = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="no image"):
        accuracy(nothing, nothing)
    with pytest.raises(ValueError, match="none of 0 images"):
        attack_success_rate(nothing, nothing, nothing.bool())
    with pytest.raises(ValueError, match="robust accuracy of no image"):
        robust_accuracy(Linear(torch.ones(4), 0.0), noise(0, 1, 2), epsilon=0.1, step_size=0.1, steps=1, seed=0)


def test_a_test_set_of_the_target_class_alone_cannot_be_judged():
    true = torch.full((6,), 2)
    for measure in (attack_success_rate, recovery_accuracy):
        with pytest.raises(ValueError, match="eligible"):
            measure(true, true, true != 2)


def test_predictions_do_not_depend_on_the_batch_size_or_on_the_mode_and_change_no_buffer():
    model, data = ModelSpec("test_efficientnet", 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0), noise(50)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model.eval()(data.images.float() / 255).argmax(1)
    for batch_size in (7, 50, 1024):
        found = predict(model.train(), data, batch_size)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_predictions_can_be_trained_on():
    data, model = noise(6, 1, 2), Linear(torch.ones(4), -2.0)
    torch.nn.functional.cross_entropy(model(data.images / 255), predict(model, data)).backward()
    assert model.weight.grad is not None


def test_there_are_no_predictions_for_no_image():
    assert predict(Linear(torch.ones(4), 0.0), noise(0, 1, 2)).tolist() == []


def test_robust_accuracy_at_radius_zero_is_accuracy():
    model, data = ModelSpec("test_efficientnet", 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0), noise(60)
    plain = accuracy(predict(model, data), data.labels)
    assert 0 < plain < 1
    assert robust_accuracy(model, data, epsilon=0.0, step_size=2 / 255, steps=3, seed=0) == plain


@pytest.mark.parametrize("epsilon", [1 / 255, 4 / 255, 16 / 255])
def test_on_a_linear_classifier_an_image_survives_if_its_margin_is_larger_than_epsilon_times_the_weights(epsilon):
    source = generator(0, "linear")
    # Far from black and white: nothing but the ball limits the attack.
    images = torch.randint(64, 192, (300, 1, 4, 4), generator=source, dtype=torch.uint8)
    weight = torch.randn(16, generator=source)
    score = (images.flatten(1).double() / 255 @ weight.double()).numpy()
    bias = -float(np.median(score))
    score = score + bias
    labels = np.where(np.random.default_rng(0).random(300) < 0.9, score > 0, score <= 0).astype(np.int64)
    margin = np.where(labels == 1, score, -score)
    expected = float(np.mean(margin > epsilon * weight.abs().sum().item()))
    found = robust_accuracy(
        Linear(weight, bias),
        ImageSet(images, torch.from_numpy(labels)),
        epsilon=epsilon,
        step_size=epsilon / 4,
        steps=9,
        seed=0,
        batch_size=128,
    )
    assert 0 < expected < 0.9
    assert found == pytest.approx(expected, abs=1e-9)


def test_an_image_that_noise_happens_to_put_right_still_counts_as_wrong():
    # All scores are just below 0 and all labels are 1: noise alone puts about half of the images right.
    data = ImageSet(torch.full((200, 1, 2, 2), 127, dtype=torch.uint8), torch.ones(200, dtype=torch.int64))
    model = Linear(torch.ones(4), -2.0)
    assert accuracy(predict(model, data), data.labels) == 0.0
    assert robust_accuracy(model, data, epsilon=0.3, step_size=0.1, steps=0, seed=0) == 0.0


def by_hand(model, data, steps, epsilon, step_size, seed):
    """Every iterate of every image, all at once: is each classified correctly, and is the last one?"""
    whole = data.images.float() / 255
    noise_ = torch.cat(
        [
            torch.rand(512, *whole.shape[1:], generator=generator(seed, "robust accuracy", block))
            for block in range(-(-len(whole) // 512))
        ]
    )[: len(whole)]
    points = (whole + epsilon * (2 * noise_ - 1)).clamp(0, 1)
    with torch.no_grad():
        right = clean = model(whole).argmax(1) == data.labels
    for step in range(steps + 1):
        points.requires_grad_(True)
        logits = model(points)
        now = logits.argmax(1) == data.labels
        right = right & now
        if step < steps:
            (slope,) = torch.autograd.grad(
                torch.nn.functional.cross_entropy(logits, data.labels, reduction="sum"), points
            )
            points = (points.detach() + step_size * slope.sign()).clamp(0, 1)
            points = torch.minimum(torch.maximum(points, whole - epsilon), whole + epsilon)
    return right, clean & now


def trained(data):
    """A network that has learned half of the images: right and wrong, robust and fragile ones."""
    model = ModelSpec("test_resnet", 4, 3, 16, (0.5,) * 3, (0.25,) * 3, "half").build(0)
    recipe = Recipe(epochs=12, batch_size=64, lr=0.05, optimizer="momentum")
    return fit(model, data[: len(data) // 2], recipe, seed=0)


def test_an_image_is_robust_if_no_iterate_fools_the_model_whatever_the_batch():
    data = noise(700)
    model = trained(data)
    settings = {"epsilon": 1 / 255, "step_size": 0.4 / 255, "seed": 5}
    counts = []
    for steps in (0, 1, 4, 10):
        every, last = by_hand(model, data, steps, **settings)
        for batch_size in (33, 512, 5000):
            found = robust_images(model, data, steps=steps, **settings, batch_size=batch_size)
            assert (found != every).sum() <= 1  # an image on a boundary may fall to either side by rounding
        assert not (every & ~last).any()
        counts.append(int(found.sum()))
    assert counts == sorted(counts, reverse=True)  # more steps find no fewer
    assert len(set(counts)) > 2
    assert robust_accuracy(model, data, steps=10, **settings) == counts[-1] / 700


def test_what_is_fooled_at_once_costs_a_pass_and_what_is_wrong_none():
    data = noise(600)
    model = trained(data)
    right = int((predict(model, data) == data.labels).sum())
    before = Classifier.passes
    assert robust_accuracy(model, data, epsilon=64 / 255, step_size=64 / 255, steps=20, seed=0) == 0.0
    # The predictions, and for each image that was right one or two passes with the slope at the images.
    assert 600 + 2 * right <= Classifier.passes - before <= 600 + 6 * right < 600 * 42


def test_robust_accuracy_repeats_under_a_seed_and_leaves_weights_trainable():
    model, data = ModelSpec("test_efficientnet", 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0), noise(40)
    found = {robust_accuracy(model, data, epsilon=4 / 255, step_size=1 / 255, steps=2, seed=3) for _ in range(2)}
    assert len(found) == 1
    assert all(weight.requires_grad for weight in model.parameters())


def test_detection_of_the_textbook_case():
    found = detection(suspicion=tensor([0.9, 0.8, 0.7, 0.6]), poisoned=tensor([True, False, True, False]))
    assert found["detection_auroc"] == 0.75  # three of the four pairs stand in order
    assert found["detection_auprc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["detection_tpr_at_fpr_5"] == 0.5


def test_equal_scores_tell_nothing_and_reversed_ones_the_opposite():
    truth = tensor([True, False, True, False, False])
    assert detection(suspicion=torch.ones(5), poisoned=truth)["detection_auroc"] == 0.5
    score = tensor([0.3, 0.1, 0.2, 0.25, 0.0])
    one, two = (detection(suspicion=s, poisoned=truth)["detection_auroc"] for s in (score, -score))
    assert one == pytest.approx(5 / 6)
    assert one + two == pytest.approx(1)


def test_flags_are_judged_by_their_own_rule():
    flagged, truth = tensor([True, True, False, False, False]), tensor([True, False, True, False, False])
    found = detection(flagged=flagged, poisoned=truth)
    assert found == {"detection_tpr": 0.5, "detection_fpr": 1 / 3, "detection_precision": 0.5}


def test_detection_without_poison_has_a_false_positive_rate_and_no_alarm_that_is_right():
    found = detection(
        suspicion=tensor([0.2, 0.1]), flagged=tensor([True, False]), poisoned=torch.zeros(2, dtype=torch.bool)
    )
    assert found["detection_fpr"] == 0.5
    assert found["detection_precision"] == 0.0
    assert found["detection_auroc"] is None
    assert found["detection_tpr"] is None


def test_one_false_alarm_of_twenty_is_still_five_percent():
    scores = tensor([9.0, 7.0, 8.0] + [1.0] * 19)  # a poisoned image, then a clean one, then the other poisoned one
    truth = tensor([True, True] + [False] * 20)
    assert detection(suspicion=scores, poisoned=truth)["detection_tpr_at_fpr_5"] == 1.0
    scores[3] = 8.5
    assert detection(suspicion=scores, poisoned=truth)["detection_tpr_at_fpr_5"] == 0.5


def test_every_threshold_counts_for_what_is_found_at_few_false_alarms_also_on_a_straight_piece_of_the_curve():
    # Pairs of equal scores, one clean and one poisoned: the curve rises in a line through (0.05, 0.5).
    scores = tensor([9.0, 9.0, 8.0, 8.0, 7.0, 7.0, 6.0, 6.0] + [1.0] * 36)
    truth = tensor([True, False] * 4 + [False] * 36)
    assert detection(suspicion=scores, poisoned=truth)["detection_tpr_at_fpr_5"] == 0.5


def test_detection_where_all_is_poison_tells_nothing_apart():
    truth = torch.ones(3, dtype=torch.bool)
    found = detection(suspicion=tensor([0.3, 0.2, 0.1]), flagged=tensor([True, False, False]), poisoned=truth)
    assert [found[f"detection_{key}"] for key in ("auroc", "auprc", "tpr_at_fpr_5", "fpr")] == [None] * 4
    assert (found["detection_tpr"], found["detection_precision"]) == (1 / 3, 1.0)
