from __future__ import annotations

import copy
import math

import pytest
import torch

from baselines.fst import FeatureShiftTuning, HeadShift, draw_head
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import TrainingLog
from defenses.base import ReserveView


def model(name: str = "test_efficientnet") -> Classifier:
    return ModelSpec(name, 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0).eval()


def view(infected: Classifier, seed: int = 0) -> ReserveView:
    images = torch.randint(0, 256, (32, 3, 16, 16), generator=generator(0, "reserve"), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(32) % 4)
    return ReserveView(
        copy.deepcopy(infected), 4, seed, torch.device("cpu"), TrainingLog(), reserve=data, augmentation=Augmentation()
    )


def tuned(infected: Classifier, seed: int = 0, **settings: float | str) -> Classifier:
    return FeatureShiftTuning(**{"epochs": 2, "batch_size": 8, **settings}).defend(view(infected, seed)).model


def same(one: Classifier, other: Classifier) -> bool:
    right = other.state_dict()
    return all(torch.equal(value, right[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("mode", ["fst", "ft_init", "fe_tuning"])
def test_the_norm_of_the_head_is_that_of_the_infected_one(mode):
    infected = model()
    torch.testing.assert_close(tuned(infected, mode=mode).head.weight.norm(), infected.head.weight.norm())


def test_without_the_inner_product_it_is_ft_init_bit_for_bit():
    assert same(tuned(model(), mode="fst", alpha=0.0), tuned(model(), mode="ft_init"))
    assert not same(tuned(model(), mode="fst", alpha=0.2), tuned(model(), mode="ft_init"))


def test_feature_tuning_leaves_the_drawn_head_up_to_one_scale_and_moves_the_features():
    infected = model()
    drawn = copy.deepcopy(infected)
    draw_head(drawn, generator(0, "fst head"))
    done = tuned(infected, mode="fe_tuning")
    ratio = done.head.weight / drawn.head.weight
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    assert torch.equal(done.head.bias, drawn.head.bias)
    assert not torch.equal(done.net.conv_stem.weight, infected.net.conv_stem.weight)
    assert all(weight.requires_grad for weight in done.parameters())


def test_the_new_head_is_uniform_within_one_over_the_root_of_its_inputs():
    infected = model("test_resnet")
    draw_head(infected, generator(1, "fst head"))
    bound = 1 / math.sqrt(infected.head.weight.shape[1])
    weight = infected.head.weight.detach()
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.95 * bound
    # The standard deviation of U(-b, b) is b / sqrt(3).
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert infected.head.bias.abs().max() <= bound


def test_the_loss_has_alpha_times_the_inner_product_with_the_infected_head():
    infected = model()
    shifted = copy.deepcopy(infected)
    draw_head(shifted, generator(1, "fst head"))
    images, labels = torch.rand(8, 3, 16, 16, generator=generator(0)), torch.arange(8) % 4
    with torch.no_grad():
        plain = HeadShift(infected, 0.0).loss(shifted, images, labels, 0.0)
        found = HeadShift(infected, 0.3).loss(shifted, images, labels, 0.0)
    inner = (infected.head.weight.detach().double() * shifted.head.weight.detach().double()).sum()
    assert (found - plain).item() == pytest.approx(0.3 * inner.item(), abs=1e-5)


def test_a_larger_alpha_turns_the_head_further_from_the_infected_one():
    infected = model()

    def cosine(done: Classifier) -> float:
        return torch.cosine_similarity(done.head.weight.flatten(), infected.head.weight.flatten(), dim=0).item()

    assert cosine(tuned(infected, alpha=5.0, epochs=10)) < cosine(tuned(infected, alpha=0.0, epochs=10)) - 0.3


def test_it_repeats_under_a_seed():
    assert same(tuned(model(), 1), tuned(model(), 1))
    assert not same(tuned(model(), 1), tuned(model(), 2))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alpha": -0.1}, r"defense\.fst\.alpha is -0\.1"),
    ],
)
def test_a_wrong_setting_says_what_to_write(setting, message):
    with pytest.raises(ValueError, match=message):
        FeatureShiftTuning(**setting)


@pytest.mark.slow
def test_on_digits_it_removes_badnets(run_grid):
    # The paper's ten epochs are ten updates on these 71 images.
    status, trials = run_grid(
        *("train.epochs=30", "train.batch_size=64", "model.stem=half", "grid.attacks=[badnets]"),
        *("grid.defenses=[no_defense,fst]", "defense.fst.epochs=100", "defense.fst.batch_size=32"),
    )
    assert status == 0
    found = trials.set_index("defense")
    assert found.asr["no_defense"] > 0.9
    assert found.asr["fst"] < 0.2
    assert found.clean_accuracy["fst"] > 0.9
