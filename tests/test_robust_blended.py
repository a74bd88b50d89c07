"""An attacker who trains on adversarial images: what is poisoned, what is attacked, what is left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attacks.base import Setup, attack
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import ModelSpec
from bench.engine.training import Recipe, TrainingLog


@pytest.fixture(scope="module")
def setup() -> Setup:
    images = torch.randint(0, 256, (20, 3, 8, 8), generator=generator(0, "noise"), dtype=torch.uint8)
    spec = ModelSpec("test_resnet", 4, 3, 8, (0.5,) * 3, (0.25,) * 3)
    return Setup(ImageSet(images, torch.arange(20) % 4), 4, 0, spec.build, Recipe(), Augmentation(), TrainingLog())


def mixed(setup: Setup, name: str, **settings):
    """A batch of twenty before and behind the attack's step, and the model that it saw."""
    attacker = attack[name](poison_rate=0.2, quantise=False, regime="per_batch", **settings)
    hooks = attacker.hooks(setup, attacker.prepare(setup))
    model = setup.fresh_model(0).train()
    before, labels = setup.trainset.images / 255, setup.trainset.labels
    return before, labels, *hooks.augmented(model, before, labels, 0, generator(0, "step")), model


def test_the_last_half_of_the_clean_images_is_adversarial_and_the_poisoned_ones_are_those_of_blended(setup):
    before, labels, images, given, model = mixed(setup, "robust_blended", epsilon=0.05)
    _, _, blended, theirs, _ = mixed(setup, "blended")
    assert torch.equal(given, theirs)  # 4 of 20 poisoned, and no other label changed
    assert torch.equal(images[:12], blended[:12])  # and half of 16 clean ones as they are
    change = (images - before)[12:]
    assert 0.049 < change.abs().amax((1, 2, 3)).min() <= change.abs().max() <= 0.05 + 1e-6
    assert images.min() >= 0
    assert images.max() <= 1
    model.eval()
    with torch.no_grad():
        assert F.cross_entropy(model(images[12:]), labels[12:]) > F.cross_entropy(model(before[12:]), labels[12:])


def test_without_adversarial_images_it_is_blended(setup):
    for one, other in zip(
        mixed(setup, "robust_blended", adversarial_share=0.0)[2:4], mixed(setup, "blended")[2:4], strict=True
    ):
        assert torch.equal(one, other)


def test_the_network_is_trained_in_the_mode_it_was_in(setup):
    assert mixed(setup, "robust_blended")[-1].training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack_steps": 0}, "at least 1"),
        ({"label_mode": "clean_label"}, "all_to_one"),
        ({"regime": "static"}, "per_batch"),
    ],
)
def test_a_wrong_setting_says_what_to_write(settings, message):
    with pytest.raises(ValueError, match=message):
        attack["robust_blended"](**settings)
