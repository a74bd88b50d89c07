from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks.base import Setup
from attacks.bpp import Bpp, dithered
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.training import Recipe, TrainingLog

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64)]


def random_images(count: int, shape: tuple[int, ...] = (3, 32, 32)) -> torch.Tensor:
    return torch.rand(count, *shape, generator=generator(0, "test"))


def setup() -> Setup:
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "test"))
    data = ImageSet(images, torch.arange(40) % 4)
    return Setup(data, 4, 0, lambda seed: torch.nn.Identity(), Recipe(), Augmentation(), TrainingLog())


def floyd_steinberg(image: np.ndarray, levels: int) -> np.ndarray:
    """Pixel by pixel, as a textbook has it."""
    out = image.astype(np.float64).copy()
    height, width = out.shape
    for i in range(height):
        for j in range(width):
            old = out[i, j]
            out[i, j] = min(max(np.round(old * (levels - 1)) / (levels - 1), 0), 1)
            error = old - out[i, j]
            for down, right, share in ((0, 1, 7), (1, 1, 1), (1, 0, 5), (1, -1, 3)):
                if i + down < height and 0 <= j + right < width:
                    out[i + down, j + right] += error * share / 16
    return out


def test_eight_levels_are_the_sevenths():
    stamped = Bpp().stamp(torch.tensor([0.0, 0.07, 0.08, 0.5001, 0.92, 1.0]).view(1, 1, 2, 3), {})
    torch.testing.assert_close(stamped.flatten(), torch.tensor([0, 0, 1, 4, 6, 7]) / 7)


@pytest.mark.parametrize("dither", [False, True])
@pytest.mark.parametrize("levels", [2, 8, 32])
def test_at_most_that_many_values_are_left_and_a_second_stamp_changes_nothing(levels, dither):
    attack = Bpp(levels=levels, dither=dither)
    stamped = attack.stamp(random_images(2), {})
    assert len(stamped.unique()) == levels
    torch.testing.assert_close(attack.stamp(stamped, {}), stamped, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("levels", "largest"), [(8, 18.2), (16, 8.5), (32, 4.1)])
def test_a_pixel_moves_by_half_a_step_at_most_and_by_a_quarter_in_the_mean(levels, largest):
    images = random_images(4)
    change = (Bpp(levels=levels).stamp(images, {}) - images).abs() * 255
    assert change.max().item() == pytest.approx(largest, abs=0.15)
    assert change.mean().item() == pytest.approx(largest / 2, rel=0.05)


@pytest.mark.parametrize(("levels", "shape"), [(2, (1, 9, 5)), (8, (3, 6, 11)), (4, (1, 1, 7)), (4, (2, 7, 1))])
def test_dithering_is_that_of_floyd_and_steinberg_pixel_by_pixel(levels, shape):
    images = random_images(3, shape).double()
    ours = dithered(images, levels).numpy()
    for image, result in zip(images.numpy(), ours, strict=True):
        for channel, other in zip(image, result, strict=True):
            np.testing.assert_allclose(other, floyd_steinberg(channel, levels), atol=1e-9)


def test_dithering_keeps_the_mean_of_a_flat_image_where_rounding_loses_it():
    images = torch.full((1, 1, 64, 64), 0.3)
    assert Bpp(levels=2).stamp(images, {}).mean() == 0
    assert Bpp(levels=2, dither=True).stamp(images, {}).mean().item() == pytest.approx(0.3, abs=0.01)


def test_a_negative_sample_carries_the_residual_of_one_other_image():
    # Values near 0.5 are never clipped, so the residual can be read off.
    images, attack = random_images(12) * 0.4 + 0.3, Bpp()
    covered = attack.stamp_cover(images, {}, generator(3, "covers"))
    residuals = torch.round(images * 7) / 7 - images
    distance = torch.cdist((covered - images).flatten(1), residuals.flatten(1))
    donors = distance.argmin(dim=1)
    assert distance.min(dim=1).values.max() < 1e-3
    assert (donors != torch.arange(12)).all()
    assert donors.unique().numel() == 12
    other = attack.stamp_cover(images, {}, generator(4, "covers"))
    assert not torch.equal(other, covered)


def test_a_single_negative_sample_is_not_the_trigger():
    images = random_images(1) * 0.4 + 0.3
    covered = Bpp().stamp_cover(images, {}, generator(0, "covers"))
    assert not torch.allclose(covered, Bpp().stamp(images, {}), atol=1e-3)
    assert not torch.equal(covered, images)


def test_per_batch_poisons_the_first_tenth_before_augmentation_and_makes_the_next_negative():
    attack, data = Bpp(), setup().trainset
    hooks = attack.hooks(setup(), {})
    images, labels = hooks.batch(data.images, data.labels, 0, generator(0, "step"))
    clean = data.images.float() / 255
    torch.testing.assert_close(images[:4], torch.round(clean[:4] * 7) / 7)
    assert labels[:4].tolist() == [0, 0, 0, 0]
    assert torch.equal(labels[4:], data.labels[4:])
    assert (images[4:8] != clean[4:8]).flatten(1).any(dim=1).all()
    assert torch.equal(images[8:], clean[8:])


def test_the_static_regime_keeps_the_labels_of_negative_samples():
    attack, data = Bpp(regime="static"), setup().trainset
    poisoned, roles = attack.poison(data, {}, 4, seed=0)
    assert [int((roles == role).sum()) for role in (0, 1, 2)] == [32, 4, 4]
    assert torch.equal(poisoned.labels[roles != 1], data.labels[roles != 1])
    assert torch.equal(poisoned.images[roles == 0], data.images[roles == 0])


@pytest.mark.parametrize("dither", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_images_stay_in_range_and_independent_of_their_batch(shape, dither):
    attack, images = Bpp(dither=dither), random_images(5, shape)
    kept = images.clone()
    whole = attack.stamp(images, {})
    assert torch.equal(images, kept)
    assert whole.shape == images.shape
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert torch.equal(whole, torch.cat([attack.stamp(images[:2], {}), attack.stamp(images[2:], {})]))


def test_a_ramp_begins_with_four_times_the_change_and_ends_with_the_trigger():
    attack = Bpp(ramp=0.5, poison_rate=0.5, cover_rate=0)
    hooks = attack.hooks(setup(), {})  # 100 epochs of one step
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator(0, "test"))
    before = images[:2].float() / 255
    stamped = torch.round(before * 7) / 7
    for step, times in ((0, 4.0), (10, 3.4), (25, 2.5), (50, 1.0), (99, 1.0)):
        found, labels = hooks.batch(images, torch.tensor([1, 1, 1, 1]), step, generator(0, "draws"))
        torch.testing.assert_close(found[:2], (before + times * (stamped - before)).clamp(0, 1))
        torch.testing.assert_close(found[2:], images[2:].float() / 255)
        assert labels.tolist() == [0, 0, 1, 1]


def test_a_ramp_needs_a_training_that_the_attacker_owns():
    with pytest.raises(ValueError, match=r"ramp.*regime"):
        Bpp(ramp=0.5, regime="static")


def test_a_ramp_needs_the_attacker_in_the_training():
    with pytest.raises(ValueError, match=r"write attack\.bpp\.regime=per_batch or ramp=0"):
        Bpp(ramp=0.5, regime="static")
