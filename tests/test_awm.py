import copy

import numpy as np
import pytest
import torch
from torch import nn

import baselines.awm as awm
from baselines.awm import AdversarialWeightMasking, batches, maskable, within
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import Diverged, TrainingLog
from defenses.base import ReserveView

SHORT = {"rounds": 2, "updates": 2, "batch_size": 10}


def timm_model(name: str) -> Classifier:
    stem = "small" if "convnext" in name else "stock"  # its kernels need maps of 2x2
    return ModelSpec(name, 4, 3, 16, (0.5,) * 3, (0.25,) * 3, stem).build(0).eval()


def noise(count: int, seed: int = 0) -> ImageSet:
    source = generator(seed, "noise")
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=source, dtype=torch.uint8)
    return ImageSet(images, torch.randint(0, 4, (count,), generator=source))


def view(model: Classifier, reserve: ImageSet) -> ReserveView:
    return ReserveView(
        copy.deepcopy(model), 4, 0, torch.device("cpu"), TrainingLog(), reserve=reserve, augmentation=Augmentation()
    )


def weights_and_masks(model: Classifier, value: float = 1.0) -> tuple[dict, dict]:
    weights = maskable(model)
    return weights, {name: torch.full_like(weight, value).requires_grad_(True) for name, weight in weights.items()}


def test_the_budget_is_the_released_one_for_the_released_image():
    assert AdversarialWeightMasking().budget * 3 * 32 * 32 == pytest.approx(1000)
    assert AdversarialWeightMasking().budget == pytest.approx(0.326, abs=1e-3)


@pytest.mark.parametrize("size", [4, 16])
def test_a_pattern_over_the_budget_is_scaled_to_it_and_one_under_it_is_left(size):
    pattern = torch.randn(1, 3, size, size, generator=generator(0, "pattern"))
    mean = np.abs(pattern.numpy()).mean()
    scaled = within(pattern, 0.1)
    np.testing.assert_allclose(scaled.numpy(), pattern.numpy() * 0.1 / mean, rtol=1e-5)
    # In the paper's words: an L1 norm of at most budget times pixels.
    assert np.abs(scaled.numpy()).sum() == pytest.approx(0.1 * 3 * size * size, rel=1e-5)
    assert torch.equal(within(pattern, 10.0), pattern)
    assert torch.equal(within(torch.zeros(1, 3, 4, 4), 0.1), torch.zeros(1, 3, 4, 4))


def test_the_perturbation_is_one_for_all_images_and_climbs_away_from_the_models_own_classes():
    model, data = timm_model("test_resnet"), noise(10)
    settings = AdversarialWeightMasking(updates=1, batch_size=10, perturbation_lr=0.5, budget=1.0)
    weights, _ = weights_and_masks(model)
    images, _ = next(batches(data, 10, 0))
    found = settings.perturbation(model, weights, batches(data, 10, 0))
    assert found.shape == (1, 3, 16, 16)
    says = model(images).argmax(1)
    assert not torch.equal(says, next(batches(data, 10, 0))[1])
    zero = torch.zeros(1, 3, 16, 16, requires_grad=True)
    nn.functional.cross_entropy(model(images + zero), says).backward()
    torch.testing.assert_close(found, 0.5 * zero.grad, rtol=1e-3, atol=1e-6)


def test_the_loss_has_both_cross_entropies_and_the_masks_l1_norm():
    model, data = timm_model("test_efficientnet"), noise(10)
    weights, masks = weights_and_masks(model, 0.9)
    images, pattern = data.images / 255, torch.randn(1, 3, 16, 16, generator=generator(0, "pattern"))
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name in weights:
            by_hand.get_parameter(name).mul_(0.9)
        clean, dirty = (
            -torch.log_softmax(by_hand(x).double(), 1)[torch.arange(10), data.labels].mean()
            for x in (images, (images + pattern).clamp(0, 1))
        )
    settings = AdversarialWeightMasking(alpha=0.7, gamma=1e-3)
    expected = 0.7 * clean + 0.3 * dirty + 1e-3 * 0.9 * sum(weight.numel() for weight in weights.values())
    found = settings.loss(model, weights, masks, pattern, images, data.labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "resnetv2_18", "test_efficientnet", "test_convnext", "test_vit"])
def test_every_convolution_and_linear_layer_is_masked_and_masks_of_one_are_the_network(name):
    model, data = timm_model(name), noise(6)
    weights, masks = weights_and_masks(model)
    assert set(weights) == {key for key, w in model.named_parameters() if key.endswith("weight") and w.ndim in (2, 4)}
    settings = AdversarialWeightMasking(alpha=1.0, gamma=0.0)
    images = data.images / 255
    found = settings.loss(model, weights, masks, torch.zeros(1), images, data.labels)
    assert torch.equal(found, nn.functional.cross_entropy(model(images), data.labels))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_weights_shrink_by_factors_in_zero_to_one_and_nothing_else_changes(name):
    model = timm_model(name)
    found = AdversarialWeightMasking(**SHORT, lr=0.9).defend(view(model, noise(30))).model
    weights, after = maskable(model), found.state_dict()
    for key, value in model.state_dict().items():
        if key in weights:
            factor = (after[key] / value)[value != 0]
            assert (factor >= 0).all()
            assert (factor <= 1 + 1e-6).all()
        else:
            assert torch.equal(after[key], value), key
    assert any((after[key] == 0).any() for key in weights)
    assert any(((after[key] / weights[key] > 0.05) & (after[key] / weights[key] < 0.95)).any() for key in weights)
    assert not found.training
    assert all(weight.requires_grad for weight in found.parameters())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.01] * 6),  # the released default
        ({"lr_decay": 0.9}, [0.01, 0.01, 0.009, 0.009, 0.0081, 0.0081]),  # the released --lr-decay
    ],
)
def test_the_rate_of_the_masks_is_the_released_one(monkeypatch, settings, expected):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    settings = AdversarialWeightMasking(rounds=3, updates=2, batch_size=10, **settings)
    settings.defend(view(timm_model("test_resnet"), noise(20)))
    assert rates == pytest.approx(expected)


def test_each_round_perturbs_the_network_as_it_is_masked_by_then(monkeypatch):
    seen = []
    original = AdversarialWeightMasking.perturbation

    def watched(self, model, kept, stream):
        seen.append(kept)
        return original(self, model, kept, stream)

    monkeypatch.setattr(AdversarialWeightMasking, "perturbation", watched)
    model = timm_model("test_resnet")
    AdversarialWeightMasking(**SHORT).defend(view(model, noise(30)))
    weights = maskable(model)
    assert all(torch.equal(seen[0][key], weights[key]) for key in weights)
    assert not any(torch.equal(seen[1][key], weights[key]) for key in weights)


def test_batches_go_through_all_images_before_one_comes_again():
    data = noise(30)
    data = ImageSet(data.images, torch.arange(30))
    stream = batches(data, 10, 0)
    labels = [next(stream)[1] for _ in range(6)]
    for part in (labels[:3], labels[3:]):
        assert sorted(torch.cat(part).tolist()) == list(range(30))
    assert not torch.equal(labels[0], labels[3])


def test_masks_without_a_number_say_that_it_diverged(monkeypatch):
    monkeypatch.setattr(awm, "within", lambda pattern, budget: pattern * float("nan"))
    with pytest.raises(Diverged, match=r"round 1; try a lower defense\.awm\.lr"):
        AdversarialWeightMasking(**SHORT).defend(view(timm_model("test_resnet"), noise(20)))


def test_it_repeats_under_a_seed():
    model, reserve = timm_model("test_resnet"), noise(30)
    one, two = (AdversarialWeightMasking(**SHORT).defend(view(model, reserve)).model.state_dict() for _ in range(2))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ({"lr_decay": 0.0}, r"defense\.awm\.lr_decay is 0"),
        ({"lr_decay": 1.1}, r"defense\.awm\.lr_decay is 1\.1"),
    ],
)
def test_settings_without_meaning_are_refused_with_advice(setting, advice):
    with pytest.raises(ValueError, match=advice):
        AdversarialWeightMasking(**setting)
