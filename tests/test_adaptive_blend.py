from __future__ import annotations

import pytest
import torch

from attacks.adaptive_blend import AdaptiveBlend
from attacks.base import Setup
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.training import Recipe, TrainingLog

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64)]


def setup(shape: tuple[int, ...] = (3, 32, 32), count: int = 40, seed: int = 0) -> Setup:
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator(0, "test"))
    data = ImageSet(images, torch.arange(count) % 4)
    return Setup(data, 4, seed, lambda seed: torch.nn.Identity(), Recipe(), Augmentation(), TrainingLog())


def pieces(stamped: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(B, 16) bool: which of the 4 x 4 squares of an image have any changed pixel."""
    side = images.shape[-1] // 4
    changed = (stamped != images).any(dim=1, keepdim=True).float()
    return torch.nn.functional.max_pool2d(changed, side).flatten(1) > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_exactly_eight_of_sixteen_squares_are_untouched_and_others_in_each_image(shape):
    attack, images = AdaptiveBlend(), torch.rand(60, *shape)
    tensors = attack.prepare(setup(shape))
    shown = pieces(attack.stamp_poison(images, tensors, generator(0, "masks")), images)
    assert (shown.sum(dim=1) == 8).all()
    assert len(shown.unique(dim=0)) > 50
    assert (shown.float().mean(dim=0) - 0.5).abs().max() < 0.3  # no square is favoured


def test_a_shown_square_is_blended_at_015_in_training_and_the_whole_image_at_02_at_test():
    attack, images = AdaptiveBlend(), torch.zeros(6, 3, 32, 32)
    picture = torch.full((3, 32, 32), 1.0)
    train = attack.stamp_poison(images, {"picture": picture}, generator(0, "masks"))
    torch.testing.assert_close(train.unique(), torch.tensor([0, 0.15]))
    assert train.mean().item() == pytest.approx(0.075)
    torch.testing.assert_close(attack.stamp(images, {"picture": picture}), torch.full_like(images, 0.2))


def test_covers_are_stamped_like_poison_and_keep_their_labels():
    data = setup(count=1000).trainset
    attack = AdaptiveBlend()
    poisoned, roles = attack.poison(data, attack.prepare(setup()), 4, seed=0)
    assert [int((roles == role).sum()) for role in (1, 2)] == [3, 3]  # 0.3 % of 1000 each, disjoint by role
    assert (poisoned.labels[roles == 1] == 0).all()
    assert torch.equal(poisoned.labels[roles != 1], data.labels[roles != 1])
    assert torch.equal(poisoned.images[roles == 0], data.images[roles == 0])
    touched = poisoned.images[roles == 2] != data.images[roles == 2]
    assert touched.flatten(1).any(dim=1).all()


def test_the_source_alone_decides_the_masks():
    attack, images = AdaptiveBlend(), torch.rand(8, 3, 32, 32)
    tensors = attack.prepare(setup())
    first = attack.stamp_poison(images, tensors, generator(1, "masks"))
    assert torch.equal(first, attack.stamp_poison(images, tensors, generator(1, "masks")))
    assert not torch.equal(first, attack.stamp_poison(images, tensors, generator(2, "masks")))


def test_another_seed_draws_another_picture_and_no_picture_is_flat():
    pictures = [AdaptiveBlend().prepare(setup(seed=seed))["picture"] for seed in (0, 0, 1)]
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.allclose(pictures[0], pictures[2], atol=0.1)
    assert pictures[0].std() > 0.2


def test_squares_cover_an_image_that_they_do_not_divide():
    mask = AdaptiveBlend(mask_rate=0.0).masks(1, 30, 21, generator(0, "masks"))
    assert mask.shape == (1, 1, 30, 21)
    assert mask.all()


@pytest.mark.parametrize("shape", SHAPES)
def test_images_stay_in_range_and_independent_of_their_batch(shape):
    attack = AdaptiveBlend()
    tensors, images = attack.prepare(setup(shape)), torch.rand(5, *shape)
    kept = images.clone()
    whole = attack.stamp(images, tensors)
    trained = attack.stamp_poison(images, tensors, generator(0, "masks"))
    assert torch.equal(images, kept)
    for stamped in (whole, trained):
        assert stamped.min() >= 0
        assert stamped.max() <= 1
    assert torch.equal(whole, torch.cat([attack.stamp(images[:2], tensors), attack.stamp(images[2:], tensors)]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0}, "attack.adaptive_blend.alpha is 0; write"),
        ({"alpha_train": 2.0}, "attack.adaptive_blend.alpha_train is 2; write"),
        ({"pieces_per_side": 0}, "attack.adaptive_blend.pieces_per_side is 0; write"),
        ({"mask_rate": 1.0}, "attack.adaptive_blend.mask_rate is 1; write"),
        ({"regime": "per_batch"}, "this attack takes static"),
        ({"label_mode": "clean_label"}, "this attack takes all_to_one or all_to_all"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        AdaptiveBlend(**settings)


def test_more_pieces_than_pixels_are_refused_before_training():
    with pytest.raises(ValueError, match="write at most 8"):
        AdaptiveBlend(pieces_per_side=9).check([500, 500], (1, 8, 8))


def test_another_seed_of_the_poisoned_set_gives_its_images_other_masks():
    data, attack = setup(count=20).trainset, AdaptiveBlend(poison_rate=1.0, cover_rate=0.0)
    tensors = attack.prepare(setup())
    one, again, other = (attack.poison(data, tensors, 4, seed=seed)[0].images for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
