import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines.nad import Distillation, NeuralAttentionDistillation, attention, distance, informative
from bench.engine.data import Augmentation, ImageSet, equal_batches, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import Recipe, TrainingLog, fit, make_optimizer
from defenses import base
from defenses.base import NotApplicable, ReserveView

HOW = Augmentation(crop=1 / 8, flip=True)
SHARED = {"lr": 0.02, "batch_size": 16, "momentum": 0.8, "weight_decay": 1e-3}
SMALL = {"epochs": 2, "teacher_epochs": 1, **SHARED}
FAMILIES = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "mobilenetv3_small_050", "resnetv2_18"]


def model(name: str = "test_resnet", size: int = 16, stem: str = "small") -> Classifier:
    return ModelSpec(name, 4, 3, size, (0.5,) * 3, (0.25,) * 3, stem).build(0).eval()


def reserve(count: int = 50, size: int = 16) -> ImageSet:
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator(0, "reserve"), dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 4)


def view(infected: Classifier, data: ImageSet, seed: int = 0) -> ReserveView:
    return ReserveView(
        copy.deepcopy(infected), 4, seed, torch.device("cpu"), TrainingLog(), reserve=data, augmentation=HOW
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    right = other.state_dict()
    return all(torch.equal(value, right[key]) for key, value in one.state_dict().items())


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed, "maps"))


@torch.no_grad()
@pytest.mark.parametrize("name", [*FAMILIES, "vgg16_bn", "swin_tiny_patch4_window7_224"])
def test_one_pass_gives_the_logits_and_the_stages_of_two(name):
    network, images = model(name, 32), reserve(2, 32).images / 255
    logits, found = network.logits_and_stages(images)
    assert torch.equal(logits, network(images))
    assert all(torch.equal(one, two) for one, two in zip(found, network.stages(images), strict=True))


def test_attention_is_the_sum_of_squares_over_channels_at_unit_length():
    given = maps(3, 5, 4, 6)
    squares = (given.double().numpy() ** 2).sum(1).reshape(3, 24)
    expected = squares / np.sqrt((squares**2).sum(1, keepdims=True))
    np.testing.assert_allclose(attention(given).numpy(), expected, rtol=1e-5)


def test_the_distance_is_the_squared_length_of_the_difference_by_hand():
    # Attention (0, 1, 0, 0) against (3, 4, 0, 0) / 5: 0.36 + 0.04; the second image agrees: mean 0.2.
    one = torch.tensor([0.0, 2.0, 0.0, 0.0]).view(1, 1, 2, 2).repeat(2, 1, 1, 1)
    two = torch.stack([torch.tensor([3.0, 4.0, 0.0, 0.0]).sqrt().view(1, 2, 2), one[1]])
    assert distance(one, two).item() == pytest.approx(0.2, abs=1e-6)


def released(one: torch.Tensor, two: torch.Tensor) -> float:
    """The distance of the released code: the mean over images and positions of the squared difference."""

    def unit(maps: np.ndarray) -> np.ndarray:
        squares = (np.abs(maps) ** 2).sum(1)
        return squares / (np.sqrt((squares**2).sum((1, 2), keepdims=True)) + 1e-6)

    return float(((unit(one.double().numpy()) - unit(two.double().numpy())) ** 2).mean())


@pytest.mark.parametrize(
    ("sizes", "betas"),
    [
        ([(32, 32), (16, 16), (8, 8)], (500, 1000, 1000)),  # the released network
        ([(8, 8), (4, 4), (2, 2)], (500, 1000, 1000)),
        ([(7, 7), (7, 7), (7, 7)], (500, 1000, 1000)),  # a transformer
        ([(8, 6), (4, 3)], (1000, 1000)),  # the deepest weights of fewer maps
        ([(4, 4)], (1000,)),
    ],
)
def test_the_default_loss_is_the_released_one_on_maps_of_any_size(sizes, betas):
    pairs = [(maps(2, 4, *size), maps(2, 4, *size, seed=1)) for size in sizes]
    expected = sum(beta * released(one, two) for beta, (one, two) in zip(betas, pairs, strict=True))
    weights = NeuralAttentionDistillation().weights(sizes)
    found = sum(weight * distance(one, two).item() for weight, (one, two) in zip(weights, pairs, strict=True))
    assert found == pytest.approx(expected, rel=1e-4)


def test_rescaled_weights_are_those_of_the_released_maps_whatever_the_maps():
    settings = NeuralAttentionDistillation(weighting="rescaled")
    own = NeuralAttentionDistillation()
    assert settings.weights([(32, 32), (16, 16), (8, 8)]) == own.weights([(32, 32), (16, 16), (8, 8)])
    assert [round(value, 2) for value in settings.weights([(8, 8), (4, 4), (2, 2)])] == [0.49, 3.91, 15.62]
    assert [round(value, 2) for value in settings.weights([(2, 2)])] == [15.62]


def test_a_training_weighs_the_stages_of_its_network_by_the_released_formula(monkeypatch):
    made = watched(monkeypatch)
    NeuralAttentionDistillation(**SMALL, beta=200).defend(view(model(), reserve()))
    sizes = [tuple(stage.shape[-2:]) for stage in model().stages(torch.zeros(1, 3, 16, 16))]
    weights, betas = made[0].weights, (100, 200, 200)
    assert len(weights) == 3
    for (at, weight), beta in zip(sorted(weights.items()), betas, strict=True):
        assert weight == pytest.approx(beta / np.prod(sizes[at]))


def test_both_trainings_use_the_released_optimizer(monkeypatch):
    recipes = []
    train = base.fit
    monkeypatch.setattr(base, "fit", lambda *given, **more: (recipes.append(given[2]), train(*given, **more))[1])
    NeuralAttentionDistillation(epochs=1, teacher_epochs=1).defend(view(model(), reserve(20)))
    assert len(recipes) == 2
    for recipe in recipes:
        options = make_optimizer(recipe, nn.Linear(2, 2)).param_groups[0]
        assert (options["momentum"], options["nesterov"], options["weight_decay"]) == (0.9, True, 1e-4)
        assert recipe.batch_size == 64


def test_equal_scaled_or_permuted_maps_are_at_distance_zero_and_no_two_maps_beyond_two():
    given = maps(3, 8, 4, 4)
    assert distance(given, given).item() == 0
    assert distance(given, -7 * given).item() == pytest.approx(0, abs=1e-10)
    assert distance(given, given[:, torch.randperm(8, generator=generator(0))]).item() == pytest.approx(0, abs=1e-10)
    apart = torch.zeros(2, 1, 1, 2, 2)
    apart[0, ..., 0, 0] = apart[1, ..., 1, 1] = 3.0
    assert distance(apart[0], apart[1]).item() == pytest.approx(2)
    assert 0 < distance(given, maps(3, 8, 4, 4, seed=1)).item() < 2


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ([32, 32, 16, 8, 4], [2, 3, 4]),  # of two maps of one size, the later; of four sizes, the smaller three
        ([32, 16, 8, 4, 2], [2, 3, 4]),
        ([16, 16, 8, 4, 1], [1, 2, 3]),  # a map of one position says nothing
        ([4, 4, 2, 1, 1], [1, 2]),
        ([2, 1, 1], [0]),
        ([1, 1, 1], []),
        ([8] * 12, [3, 7, 11]),  # transformers: thirds of the depth
        ([8] * 6, [1, 3, 5]),
        ([8], [0]),
    ],
)
def test_the_last_three_informative_resolutions_are_compared(sides, expected):
    assert informative([(side, side) for side in sides]) == expected


def test_a_network_whose_maps_are_single_positions_is_not_applicable():
    class Flat(nn.Module):
        def forward_intermediates(self, images, **_):
            return [images.mean((2, 3), keepdim=True)]

    with pytest.raises(NotApplicable, match="four positions"):
        NeuralAttentionDistillation(**SMALL).defend(view(Classifier(Flat(), [0.0], [1.0]), reserve()))


def tuned(seed: int) -> Classifier:
    """The plain fine-tune, which `fine_tuning` makes too, but with classical momentum."""
    settings = {"momentum": SHARED["momentum"], "weight_decay": SHARED["weight_decay"], "optimizer": "sgd"}
    recipe = Recipe(epochs=2, lr=SHARED["lr"], batch_size=SHARED["batch_size"], **settings)
    return fit(model(), reserve(), recipe, seed=seed, augmentation=HOW, stream="fine_tuning")


def test_without_distillation_it_is_fine_tuning_bit_for_bit():
    found, other = (
        NeuralAttentionDistillation(**setting, **SMALL).defend(view(model(), reserve(), 3)).model
        for setting in ({"beta": 0}, {})
    )
    assert same(found, tuned(3))
    assert not same(other, tuned(3))


def test_a_vanishing_weight_is_nearly_fine_tuning_though_a_teacher_was_trained():
    found = NeuralAttentionDistillation(beta=1e-7, **SMALL).defend(view(model(), reserve())).model
    for key, value in tuned(0).state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, atol=1e-4, rtol=1e-3)


def watched(monkeypatch) -> list[Distillation]:
    made: list[Distillation] = []

    class Watched(Distillation):
        def __init__(self, *given):
            super().__init__(*given)
            self.before = copy.deepcopy(self.teacher.state_dict())
            made.append(self)

        def loss(self, student, *given):
            assert student.training
            assert not self.teacher.training
            return super().loss(student, *given)

    monkeypatch.setattr("baselines.nad.Distillation", Watched)
    return made


def test_the_teacher_is_the_fine_tuned_infected_model_and_never_changes(monkeypatch):
    made = watched(monkeypatch)
    done = NeuralAttentionDistillation(**SMALL).defend(view(model(), reserve())).model
    (hooks,) = made
    assert not any(weight.requires_grad for weight in hooks.teacher.parameters())
    assert all(torch.equal(value, hooks.before[key]) for key, value in hooks.teacher.state_dict().items())
    assert not same(hooks.teacher, model())  # one epoch of training
    steps = 2 * equal_batches(50, 16)[0]  # and the student's running averages take in each batch once
    assert {int(v) for k, v in done.state_dict().items() if k.endswith("num_batches_tracked")} == {steps}
    assert {int(v) for k, v in hooks.before.items() if k.endswith("num_batches_tracked")} == {steps // 2}
    assert all(weight.requires_grad for weight in done.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_each_compared_stage_pulls_on_the_student(name):
    teacher, student, images = model(name), model(name), reserve(2).images / 255
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=generator(0, "noise")))
        sizes = [tuple(stage.shape[-2:]) for stage in teacher.stages(images)]
    chosen = informative(sizes)
    assert len(chosen) == 3
    for at in chosen:
        student.zero_grad()
        plain = F.cross_entropy(student(images), torch.zeros(2, dtype=torch.int64)).item()
        hooks = Distillation(teacher, {at: 1.0})
        loss = hooks.loss(student, images, torch.zeros(2, dtype=torch.int64), 0.0)
        expected = distance(student.stages(images)[at], teacher.stages(images)[at])
        assert loss.item() == pytest.approx(plain + expected.item(), rel=1e-4)
        assert expected.item() > 1e-6
        expected.backward()
        assert sum(weight.grad.abs().sum() for weight in student.parameters() if weight.grad is not None) > 1e-6


def test_the_ratio_of_distillation_to_cross_entropy_is_logged_for_each_epoch():
    given = view(model(), reserve())
    NeuralAttentionDistillation(**SMALL).defend(given)
    curve = given.log.curves["nad/attention_to_cross_entropy"]
    assert [step for step, _ in curve] == [1, 2]
    assert all(value > 0 for _, value in curve)
    assert len(given.log.curves["teacher/loss"]) == 1


def test_the_ratio_is_that_of_the_sums_and_starts_anew():
    hooks = Distillation(model(), {})
    hooks.parts = [torch.tensor([2.0, 1.0]), torch.tensor([3.0, 4.0])]
    assert hooks.ratio() == pytest.approx(1.0)
    hooks.parts.append(torch.tensor([2.0, 1.0]))
    assert hooks.ratio() == pytest.approx(0.5)


def test_it_repeats_under_a_seed():
    one, two, other = (
        NeuralAttentionDistillation(**SMALL).defend(view(model(), reserve(), seed)).model for seed in (1, 1, 2)
    )
    assert same(one, two)
    assert not same(one, other)
    assert not one.training


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"weighting": "paper"}, r"defense\.nad\.weighting is 'paper'"),
    ],
)
def test_a_wrong_setting_says_what_to_write(setting, message):
    with pytest.raises(ValueError, match=message):
        NeuralAttentionDistillation(**setting)


@pytest.mark.slow
def test_on_digits_distillation_erases_more_than_its_control_without(run_grid):
    # Forty steps at a rate of 0.01: the fine-tune alone changes next to nothing.
    _, trials = run_grid(
        "grid.attacks=[badnets]",
        "grid.ablations=[{name: nad_beta_0, defense: nad, set: {beta: 0}}]",
        "grid.defenses=[no_defense,nad,nad_beta_0]",
        "model.stem=half",
        "train.epochs=30",
    )
    mean = trials.set_index("defense")[["clean_accuracy", "asr"]]
    assert mean.asr["no_defense"] > 0.95
    assert mean.asr["nad"] < mean.asr["nad_beta_0"] - 0.1
    assert mean.clean_accuracy["nad"] > 0.95
