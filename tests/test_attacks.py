"""What every attack promises, and the exact triggers of BadNets and Blended."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks.base import CLEAN, COVER, POISON, Attack, Setup, attack
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import ModelSpec
from bench.engine.training import Recipe, TrainingLog

LABELS = torch.arange(10).repeat(20)

# Attacks that learn before they stamp have tests of their own, with budgets of their own.
DRAWN = ["none", "badnets", "blended", *sorted({"sig", "ftrojan", "wanet", "bpp", "adaptive_blend"} & set(attack))]


def setup_for(size: int = 32, channels: int = 3, seed: int = 0) -> Setup:
    images = torch.randint(0, 256, (200, channels, size, size), dtype=torch.uint8, generator=generator(9, "images"))
    spec = ModelSpec("test_resnet", 10, channels, size, (0.5,) * channels, (0.25,) * channels)
    return Setup(
        ImageSet(images, LABELS.clone()), 10, seed, spec.build, Recipe(epochs=1), Augmentation(), TrainingLog()
    )


def triggered(settings: Attack, setup: Setup) -> tuple[torch.Tensor, torch.Tensor]:
    """Float images without and with the trigger."""
    images = setup.trainset.images[:8].float() / 255
    return images, settings.trigger(images, settings.prepare(setup))


@pytest.mark.parametrize("name", sorted(attack))
def test_each_attack_states_its_paper_and_a_line(name):
    assert attack[name].paper
    assert attack[name].__module__.split(".")[-1] == name  # file name = registry name


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3)])
@pytest.mark.parametrize("name", DRAWN)
def test_a_trigger_keeps_shape_range_and_its_input_and_sees_each_image_by_itself(name, size, channels):
    setup, settings = setup_for(size, channels), attack[name]()
    tensors = settings.prepare(setup)
    images = setup.trainset.images[:8].float() / 255
    before = images.clone()
    whole = settings.trigger(images, tensors)
    assert torch.equal(images, before)
    assert whole.shape == images.shape
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert torch.equal(torch.cat([settings.trigger(images[:3], tensors), settings.trigger(images[3:], tensors)]), whole)
    assert torch.equal(whole, settings.trigger(images, settings.prepare(setup)))  # the seed says all


@pytest.mark.parametrize("name", ["badnets", "blended"])
def test_the_poisoned_set_holds_exactly_the_stated_share(name):
    setup = setup_for()
    settings = attack[name](poison_rate=0.15, cover_rate=0.05)
    poisoned, roles = settings.poison(setup.trainset, settings.prepare(setup), 10, seed=3)
    assert [int((roles == role).sum()) for role in (CLEAN, POISON, COVER)] == [160, 30, 10]
    assert torch.equal(poisoned.images[roles == CLEAN], setup.trainset.images[roles == CLEAN])
    assert torch.equal(poisoned.labels[roles != POISON], LABELS[roles != POISON])
    assert (poisoned.labels[roles == POISON] == 0).all()
    again = settings.poison(setup.trainset, settings.prepare(setup), 10, seed=3)
    assert torch.equal(again[1], roles)
    assert torch.equal(again[0].images, poisoned.images)
    assert not torch.equal(settings.poison(setup.trainset, settings.prepare(setup), 10, seed=4)[1], roles)


def test_all_to_all_sends_each_class_to_the_next_and_judges_every_image():
    settings = attack["badnets"](label_mode="all_to_all")
    assert settings.target_labels(torch.tensor([0, 8, 9]), 10).tolist() == [1, 9, 0]
    assert settings.eligible(torch.tensor([0, 1])).tolist() == [True, True]


def test_all_to_one_judges_only_images_of_other_classes():
    assert attack["badnets"](target_label=2).eligible(torch.tensor([1, 2, 3])).tolist() == [True, False, True]


def test_clean_label_poisons_only_the_target_class_and_changes_no_label():
    settings = attack["badnets"](label_mode="clean_label", target_label=4, poison_rate=0.05)
    setup = setup_for()
    poisoned, roles = settings.poison(setup.trainset, settings.prepare(setup), 10, seed=0)
    assert (LABELS[roles == POISON] == 4).all()
    assert int((roles == POISON).sum()) == 10
    assert torch.equal(poisoned.labels, LABELS)
    with pytest.raises(ValueError, match=r"write at most 0\.1000"):
        attack["badnets"](label_mode="clean_label", poison_rate=0.11).check([20] * 10, (3, 32, 32))


def test_a_per_batch_attack_poisons_its_share_of_every_batch_on_average():
    setup = setup_for()
    settings = attack["badnets"](regime="per_batch", poison_rate=0.1)
    hooks = settings.hooks(setup, settings.prepare(setup))
    source, images = generator(0, "test"), torch.zeros(45, 3, 32, 32)  # 4.5 images a batch
    counts = []
    for step in range(400):
        found, labels = hooks.augmented(None, images, torch.ones(45, dtype=torch.int64), step, source)
        stamped = found.flatten(1).any(1)
        assert torch.equal(stamped, labels == 0)
        counts.append(int(stamped.sum()))
    assert set(counts) == {4, 5}
    assert np.mean(counts) == 4.5


def test_a_clean_label_attack_per_batch_poisons_its_share_though_many_batches_have_no_image_of_its_class():
    setup = setup_for()
    setup.trainset.labels[:] = torch.where(torch.arange(200) < 4, 0, 1)  # 2 % of the images
    settings = attack["badnets"](regime="per_batch", label_mode="clean_label", poison_rate=0.01)
    hooks = settings.hooks(setup, settings.prepare(setup))
    source, draws = generator(0, "test"), generator(0, "batches")
    seen = stamped = 0
    for step in range(2000):
        labels = setup.trainset.labels[torch.randperm(200, generator=draws)[:20]]  # 0.4 of the class, on average
        found, after = hooks.augmented(None, torch.zeros(20, 3, 32, 32), labels, step, source)
        marked = found.flatten(1).any(1)
        assert torch.equal(after, labels)
        assert not marked[labels == 1].any()
        seen, stamped = seen + 20, stamped + int(marked.sum())
    assert stamped / seen == pytest.approx(0.01, rel=0.1)


def test_a_checker_of_one_pixel_is_refused():
    attack["badnets"](pattern="checker", patch_size=3).check([20] * 10, (1, 16, 16))
    with pytest.raises(ValueError, match=r"is no checker; write at least 6, or pattern=white"):
        attack["badnets"](pattern="checker", patch_size=3).check([20] * 10, (1, 8, 8))
    attack["badnets"](pattern="checker", patch_size=6).check([20] * 10, (1, 8, 8))


def test_a_stamp_that_leaves_the_range_or_the_shape_is_refused_by_name():
    class Wild(attack["badnets"]):
        def stamp(self, images, tensors):
            return self.damage(images)

    wild, images = Wild(), torch.rand(2, 3, 8, 8)
    for damage, words in ((lambda x: x + 1, "left"), (lambda x: x * torch.nan, "left"), (lambda x: x[:, :1], "turned")):
        object.__setattr__(wild, "damage", damage)
        with pytest.raises(ValueError, match=f"'badnets' {words}"):
            wild.trigger(images, {})


def test_the_badnets_checker_is_the_one_of_the_papers_at_32_pixels():
    images, stamped = triggered(attack["badnets"](pattern="checker"), setup_for())
    corner = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=np.float32)
    assert (stamped[:, :, 29:, 29:].numpy() == corner).all()
    assert corner.mean() == pytest.approx(4 / 9)
    rest = torch.ones(32, 32, dtype=torch.bool)
    rest[29:, 29:] = False
    assert torch.equal(stamped[:, :, rest], images[:, :, rest])


@pytest.mark.parametrize(("size", "side"), [(16, 2), (28, 3), (32, 3), (64, 6), (224, 21)])
def test_the_badnets_patch_keeps_its_share_of_the_image(size, side):
    settings = attack["badnets"]()
    black = torch.zeros(1, 1, size, size)
    stamped = settings.stamp(black, settings.prepare(setup_for(size, 1)))
    assert int(stamped.sum()) == side * side
    assert stamped[0, 0, size - side :, size - side :].all()
    assert torch.equal(settings.stamp(stamped, settings.prepare(setup_for(size, 1))), stamped)  # twice is once


def test_blended_mixes_by_its_opacity_and_nothing_else():
    setup = setup_for()
    picture = attack["blended"]().prepare(setup)["picture"]
    images = torch.rand(4, 3, 32, 32)
    for alpha in (0.0, 0.1, 0.2, 1.0):
        settings = attack["blended"](alpha=alpha, quantise=False)
        mixed = settings.trigger(images, {"picture": picture})
        assert torch.allclose(mixed, (1 - alpha) * images + alpha * picture, atol=1e-6)
        assert (mixed - images).abs().max() <= alpha + 1e-6
    assert 0.4 < picture.mean() < 0.6


def test_blended_may_train_with_another_opacity_than_it_attacks_with():
    setup, settings = setup_for(), attack["blended"](alpha=0.2, alpha_train=0.1)
    tensors, images = settings.prepare(setup), torch.zeros(1, 3, 32, 32)
    weak = settings.stamp_poison(images, tensors, generator(0))
    assert torch.allclose(2 * weak, settings.stamp(images, tensors))


def test_triggered_test_images_are_rounded_as_a_file_would_be():
    images, stamped = triggered(attack["blended"](), setup_for())
    assert torch.equal((stamped * 255).round() / 255, stamped)
    assert not torch.equal(stamped, images)


def test_a_tainted_set_gets_its_share_of_poison_and_no_cover_or_is_refused():
    setup, settings = setup_for(), attack["badnets"](poison_rate=0.15, cover_rate=0.05)
    _, roles = settings.poison(setup.trainset, settings.prepare(setup), 10, seed=0, rate=0.1)
    assert [int((roles == role).sum()) for role in (CLEAN, POISON, COVER)] == [180, 20, 0]
    settings = attack["badnets"](label_mode="clean_label", poison_rate=0.05)
    with pytest.raises(ValueError, match=r"30 images were to be poisoned and only 20 can be; lower its poison_rate"):
        settings.poison(setup.trainset, settings.prepare(setup), 10, seed=0, rate=0.15)


def test_the_poisoned_set_carries_the_trigger_of_training_and_not_that_of_the_test():
    setup = setup_for()
    settings = attack["blended"](alpha=0.2, alpha_train=0.1)
    tensors = settings.prepare(setup)
    poisoned, roles = settings.poison(setup.trainset, tensors, 10, seed=0)
    before, after = (images[roles == POISON].float() for images in (setup.trainset.images, poisoned.images))
    expected = (0.9 * before + 0.1 * 255 * tensors["picture"]).round()
    assert (after - expected).abs().max() <= 1  # a half may be rounded to either side
    assert (after == expected).float().mean() > 0.99


def test_what_is_checked_before_any_compute_has_its_bounds_where_they_are_said_to_be():
    shape, clean = (3, 32, 32), {"label_mode": "clean_label"}
    attack["badnets"](**clean, poison_rate=0.1).check([20] * 10, shape)  # the whole class
    attack["badnets"](target_label=9).check([20] * 10, shape)
    with pytest.raises(ValueError, match="target_label is 10; the classes are 0 to 9"):
        attack["badnets"](target_label=10).check([20] * 10, shape)
    attack["badnets"](poison_rate=0.0026).check([20] * 10, shape)  # 0.52 of an image is one
    with pytest.raises(ValueError, match=r"less than one of 200 images; write at least 0\.0026"):
        attack["badnets"](poison_rate=0.002).check([20] * 10, shape)
    with pytest.raises(ValueError, match=r"is 0\.05 and cover_rate 0\.08, but .* write at most 0\.1000 in all"):
        attack["badnets"](**clean, poison_rate=0.05, cover_rate=0.08).check([20] * 10, shape)
    attack["badnets"](poison_rate=0.5, cover_rate=0.5)
    with pytest.raises(ValueError, match="more than all images; lower one"):
        attack["badnets"](poison_rate=0.6, cover_rate=0.5)


def test_the_surrogate_is_the_victims_architecture_from_other_weights():
    from dataclasses import replace

    asked, setup = [], setup_for(16)
    build = setup.fresh_model
    setup = replace(setup, recipe=Recipe(epochs=1, lr=0.0), fresh_model=lambda seed: asked.append(seed) or build(seed))
    surrogate, victim = setup.surrogate(), build(setup.seed)
    assert len(asked) == 1
    assert asked[0] != setup.seed
    assert not torch.equal(surrogate.head.weight, victim.head.weight)
    assert not surrogate.training


def test_a_checker_twice_as_large_has_cells_of_two_pixels_and_no_grey():
    patch = attack["badnets"](pattern="checker").prepare(setup_for(64))["patch"]
    cells = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert torch.equal(patch[0], cells.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_an_opacity_of_zero_in_training_is_one():
    setup, settings, images = setup_for(), attack["blended"](alpha_train=0.0), torch.rand(2, 3, 32, 32)
    assert torch.equal(settings.stamp_poison(images, settings.prepare(setup), generator(0)), images)


@pytest.mark.parametrize("picture", ["noise", "shapes"])
def test_another_seed_blends_another_picture_in(picture):
    pictures = [attack["blended"](picture=picture).prepare(setup_for(seed=seed))["picture"] for seed in (0, 0, 1)]
    assert torch.equal(pictures[0], pictures[1])
    assert (pictures[0] - pictures[2]).abs().mean() > 0.1


def test_the_picture_of_shapes_has_hard_colours_and_soft_edges():
    picture = attack["blended"](picture="shapes").prepare(setup_for())["picture"]
    assert (picture.min(), picture.max()) == (0, 1)
    assert ((picture == 0) | (picture == 1)).float().mean() > 0.2
    assert picture.std() > 0.3  # uniform noise has 0.29, the coarse picture half as much
    assert (picture[..., 1:] - picture[..., :-1]).abs().mean() < 0.1  # of uniform noise 1 / 3
