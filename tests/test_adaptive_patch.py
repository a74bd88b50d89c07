from __future__ import annotations

import pytest
import torch

from attacks.adaptive_patch import AdaptivePatch
from attacks.base import Setup
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.training import Recipe, TrainingLog

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64)]


def setup(shape: tuple[int, ...] = (3, 32, 32), count: int = 40, seed: int = 0) -> Setup:
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator(0, "test"))
    data = ImageSet(images, torch.arange(count) % 4)
    return Setup(data, 4, seed, lambda seed: torch.nn.Identity(), Recipe(), Augmentation(), TrainingLog())


def region(*boxes: tuple[int, int, int]) -> torch.Tensor:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    for row, column, side in boxes:
        mask[row : row + side, column : column + side] = True
    return mask


REGIONS = {  # the sizes, places and opacities of the paper's code at 32 x 32; the 5x5 patch is three rows higher
    "blocks": (region((24, 27, 5)), 0.5, 25),
    "logo": (region((1, 18, 13)), 0.2, 169),
    "checker": (region((0, 0, 3), (0, 29, 3), (29, 0, 3), (29, 29, 3)), 0.5, 36),
    "square": (region((21, 21, 8)), 0.3, 64),
}


def trained(images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    attack = AdaptivePatch()
    return attack.stamp_poison(images, attack.prepare(setup(tuple(images.shape[1:]))), generator(seed, "x"))


def test_each_training_image_contains_one_of_the_four_patches_only_in_equal_numbers():
    # A grey that no patch colour leaves alone but at 0.5 itself, which seeded colours never meet exactly.
    images = torch.full((150, 3, 32, 32), 0.5)
    changed = (trained(images) != images).any(dim=1)
    counts = []
    for mask, _, area in REGIONS.values():
        assert int(mask.sum()) == area
        counts.append(int((changed == mask).flatten(1).all(dim=1).sum()))
    assert sum(counts) == 150
    assert sorted(counts) == [37, 37, 38, 38]


def test_no_pixel_moves_further_than_the_opacity_of_its_patch():
    images = torch.zeros(40, 3, 32, 32)
    stamped = trained(images)
    for name, (mask, opacity, _) in REGIONS.items():
        # Patches overlap only in the square and the blocks; each is told apart by what it leaves untouched.
        mine = [image for image in stamped if image.any() and not image[:, ~mask].any()]
        assert len(mine) >= 10, name
        assert max(float(image.max()) for image in mine) <= opacity + 1e-6
    assert stamped.max().item() == pytest.approx(0.5)


def test_chequers_mix_black_and_white_half_and_half():
    stamped = trained(torch.full((4, 3, 32, 32), 0.6))
    checker = next(image for image in stamped if image[0, 0, 0] != 0.6)
    expected = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 1]]) * 0.5 + 0.3
    for corner in (checker[1, :3, :3], checker[1, :3, -3:], checker[1, -3:, :3], checker[1, -3:, -3:]):
        torch.testing.assert_close(corner, expected)


def test_the_test_trigger_shows_86_opaque_pixels_at_the_lower_corners_and_chequers():
    attack = AdaptivePatch()
    tensors = attack.prepare(setup())
    white, black = (attack.stamp(torch.full((1, 3, 32, 32), value), tensors)[0] for value in (1.0, 0.0))
    opaque = (white == black).all(dim=0)
    blocks = region((24, 27, 5), (24, 0, 5))
    assert torch.equal(opaque, blocks | REGIONS["checker"][0])
    assert int(opaque.sum()) == 50 + 36
    assert torch.equal(white[:, 24:29, :5], white[:, 24:29, 27:])
    assert torch.equal(white[0, :3, :3], torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]]))


def test_the_other_test_trigger_shows_the_logo_and_the_square():
    attack = AdaptivePatch(test_triggers="logo_square")
    tensors = attack.prepare(setup())
    white, black = (attack.stamp(torch.full((1, 3, 32, 32), value), tensors)[0] for value in (1.0, 0.0))
    opaque = (white == black).all(dim=0)
    assert torch.equal(opaque, REGIONS["logo"][0] | REGIONS["square"][0])


def test_the_test_trigger_shows_the_colours_of_training():
    attack, images = AdaptivePatch(), torch.zeros(4, 3, 32, 32)
    tensors = attack.prepare(setup())
    mask = REGIONS["blocks"][0]
    faint = attack.stamp_poison(images, tensors, generator(0, "x"))
    blocks = next(image for image in faint if image.any() and not image[:, ~mask].any())
    torch.testing.assert_close(blocks[:, mask] * 2, attack.stamp(images, tensors)[0][:, mask])


def test_covers_are_twice_the_poison_and_keep_their_labels():
    data, attack = setup(count=1000).trainset, AdaptivePatch()
    poisoned, roles = attack.poison(data, attack.prepare(setup()), 4, seed=0)
    assert [int((roles == role).sum()) for role in (1, 2)] == [3, 6]
    assert (poisoned.labels[roles == 1] == 0).all()
    assert torch.equal(poisoned.labels[roles != 1], data.labels[roles != 1])
    assert torch.equal(poisoned.images[roles == 0], data.images[roles == 0])
    assert (poisoned.images[roles == 2] != data.images[roles == 2]).flatten(1).any(dim=1).all()


def test_the_source_alone_decides_which_image_gets_which_patch():
    images = torch.rand(16, 3, 32, 32)
    assert torch.equal(trained(images, 1), trained(images, 1))
    assert not torch.equal(trained(images, 1), trained(images, 2))


def test_single_images_get_all_four_patches_in_the_long_run():
    attack, image = AdaptivePatch(), torch.full((1, 1, 32, 32), 0.5)
    tensors, source = attack.prepare(setup((1, 32, 32))), generator(0, "x")
    seen = {int((attack.stamp_poison(image, tensors, source) != image).sum()) for _ in range(60)}
    assert seen == {25, 169, 36, 64}


@pytest.mark.parametrize(("width", "areas"), [(64, {100, 676, 144, 256}), (28, {16, 121, 36, 49})])
def test_patches_keep_their_share_of_other_sizes(width, areas):
    images = torch.full((8, 1, width, width), 0.4321)
    changed = (trained(images) != images).flatten(1).sum(dim=1)
    assert set(changed.tolist()) == areas


@pytest.mark.parametrize("shape", [*SHAPES, (1, 8, 8)])
def test_images_stay_in_range_and_independent_of_their_batch(shape):
    attack = AdaptivePatch()
    tensors, images = attack.prepare(setup(shape)), torch.rand(5, *shape)
    kept = images.clone()
    whole, faint = attack.stamp(images, tensors), attack.stamp_poison(images, tensors, generator(0, "x"))
    assert torch.equal(images, kept)
    for stamped in (whole, faint):
        assert stamped.min() >= 0
        assert stamped.max() <= 1
        assert (stamped != images).flatten(1).any(dim=1).all()
    assert torch.equal(whole, torch.cat([attack.stamp(images[:2], tensors), attack.stamp(images[2:], tensors)]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"test_triggers": "all"}, "test_triggers is 'all'; write corners or logo_square"),
        ({"regime": "per_batch"}, "this attack takes static"),
        ({"label_mode": "clean_label"}, "this attack takes all_to_one or all_to_all"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        AdaptivePatch(**settings)
