import math

import numpy as np
import pytest
import torch

from attacks.base import COVER, POISON, Setup
from attacks.wanet import WaNet
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import ModelSpec
from bench.engine.training import Recipe, TrainingLog


def setup_of(shape: tuple[int, int, int], seed: int = 0, count: int = 20) -> Setup:
    images = torch.randint(0, 256, (count, *shape), generator=generator(0, "images"), dtype=torch.uint8)
    spec = ModelSpec("test_resnet", 10, shape[0], shape[-1], (0.5,) * shape[0], (0.25,) * shape[0])
    labels = torch.arange(count) % 10
    return Setup(ImageSet(images, labels), 10, seed, spec.build, Recipe(epochs=1), Augmentation(), TrainingLog())


def straight(height: int, width: int) -> np.ndarray:
    """(H, W, 2): the coordinates of an image that is not warped, column first."""
    return np.stack(np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height)), axis=-1)


def field_of(attack: WaNet, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """(H, W, 2): the field F in g = (I + s F / size) r; half the scale keeps the edges from being clipped."""
    grid = attack.prepare(setup_of(shape, seed))["grid"].numpy() / attack.grid_rescale
    return (grid - straight(*shape[1:])) * np.array([shape[2], shape[1]]) / 0.5


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 20, 36)])
def test_a_warp_of_strength_zero_changes_nothing(shape):
    attack, images = WaNet(strength=0.0), torch.rand(4, *shape, generator=generator(1))
    assert (attack.stamp(images, attack.prepare(setup_of(shape))) - images).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 28, 55)])
def test_the_mean_size_of_the_field_at_its_control_points_is_one(shape):
    # Bicubic interpolation passes through its control points, a third of the image apart.
    field = field_of(WaNet(grid_rescale=0.5), shape)
    at_controls = field[:: (shape[1] - 1) // 3, :: (shape[2] - 1) // 3]
    assert at_controls.shape == (4, 4, 2)
    assert np.abs(at_controls).mean() == pytest.approx(1, abs=1e-4)


def test_offsets_are_a_quarter_of_the_field_in_pixels_and_never_reach_one_pixel():
    lengths, largest = [], []
    for seed in range(60):
        grid = WaNet().prepare(setup_of((3, 32, 32), seed, count=1))["grid"].numpy()
        length = np.linalg.norm((grid - straight(32, 32)) * 31 / 2, axis=-1)
        lengths.append(length.mean())
        largest.append(length.max())
    assert np.mean(lengths) == pytest.approx(0.28, abs=0.01)
    assert min(lengths) > 0.2
    assert max(lengths) < 0.37
    assert max(largest) < 0.85


def test_the_first_coordinate_moves_columns_and_the_second_moves_rows():
    attack = WaNet()
    tensors = attack.prepare(setup_of((1, 20, 36)))
    columns = torch.linspace(0, 1, 36).expand(1, 1, 20, 36)
    rows = torch.linspace(0, 1, 20)[:, None].expand(1, 1, 20, 36)
    for picture, axis in ((columns, 0), (rows, 1)):
        found = attack.stamp(picture, tensors)[0, 0]
        assert torch.allclose(found, (tensors["grid"][..., axis] + 1) / 2, atol=1e-5)


def test_each_pixel_is_the_bilinear_mean_of_the_four_around_its_place():
    attack = WaNet()
    tensors = attack.prepare(setup_of((3, 32, 32)))
    images = torch.rand(1, 3, 32, 32, generator=generator(2))
    stamped = attack.stamp(images, tensors)
    for row, column in ((0, 0), (5, 17), (16, 3), (31, 31), (31, 12)):
        x, y = ((tensors["grid"][row, column] + 1) / 2 * 31).tolist()
        left, top = min(math.floor(x), 30), min(math.floor(y), 30)
        expected = sum(
            images[0, :, top + j, left + i] * abs(1 - i - (x - left)) * abs(1 - j - (y - top))
            for i in (0, 1)
            for j in (0, 1)
        )
        assert torch.allclose(stamped[0, :, row, column], expected, atol=1e-4)


def test_the_warp_commutes_with_normalisation():
    attack = WaNet()
    tensors = attack.prepare(setup_of((1, 32, 32)))
    images = torch.rand(5, 1, 32, 32, generator=generator(3))
    darker = images * 0.5 + 0.2  # a change of mean and deviation that stays in [0, 1]
    expected = attack.stamp(images, tensors) * 0.5 + 0.2
    assert torch.allclose(attack.stamp(darker, tensors), expected, atol=1e-6)


def test_a_cover_is_jittered_anew_for_each_image_by_up_to_half_a_pixel():
    attack = WaNet(strength=0.0)
    tensors = attack.prepare(setup_of((1, 24, 40)))
    columns = torch.linspace(0, 1, 40).expand(50, 1, 24, 40)
    jitter = (attack.stamp_cover(columns, tensors, generator(4)) - columns)[..., 2:-2] * 2 * 40  # of uniform [-1, 1]
    assert jitter.abs().max() <= 1.0001
    assert jitter.abs().mean().item() == pytest.approx(0.5, abs=0.01)
    assert jitter.mean().item() == pytest.approx(0, abs=0.01)
    assert not torch.equal(jitter[0], jitter[1])


def test_scaling_with_size_doubles_the_field_at_64_pixels_and_not_at_32():
    for size, factor in ((32, 1), (64, 2)):
        plain = field_of(WaNet(grid_rescale=0.5), (1, size, size))
        scaled = field_of(WaNet(grid_rescale=0.5, scale_with_size=True), (1, size, size))
        assert np.allclose(scaled, factor * plain, atol=1e-4)


def test_a_tenth_is_poisoned_and_a_fifth_carries_jittered_warps_with_its_own_label():
    setup, attack = setup_of((3, 16, 16), count=100), WaNet()
    poisoned, roles = attack.poison(setup.trainset, attack.prepare(setup), 10, 0)
    assert [int((roles == role).sum()) for role in (POISON, COVER)] == [10, 20]
    assert bool((poisoned.labels[roles == POISON] == 0).all())
    assert torch.equal(poisoned.labels[roles == COVER], setup.trainset.labels[roles == COVER])
    changed = (poisoned.images != setup.trainset.images).flatten(1).any(1)
    assert torch.equal(changed, roles != 0)


def test_a_batch_is_warped_before_augmentation_unless_the_set_is_static():
    setup, attack = setup_of((3, 16, 16)), WaNet()
    assert attack.regime == "per_batch"
    assert WaNet(regime="static").regime == "static"
    tensors = attack.prepare(setup)
    images, labels = setup.trainset.images, torch.full((20,), 5)
    found, given = attack.hooks(setup, tensors).batch(images, labels, 0, generator(0))
    assert given.tolist() == [0] * 2 + [5] * 18
    assert torch.equal(found[:2], attack.stamp(images[:2].float() / 255, tensors))
    changed = (found != images.float() / 255).flatten(1).any(1)
    assert changed.tolist() == [True] * 6 + [False] * 14


def test_a_seed_fixes_the_field_and_another_seed_gives_another():
    fields = [WaNet().prepare(setup_of((1, 28, 28), seed))["grid"] for seed in (3, 3, 4)]
    assert torch.equal(fields[0], fields[1])
    assert not torch.allclose(fields[0], fields[2], atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (3, 20, 36)])
def test_two_batches_are_warped_like_one_and_the_images_stay(shape):
    attack = WaNet()
    tensors = attack.prepare(setup_of(shape))
    images = torch.rand(5, *shape, generator=generator(5))
    before = images.clone()
    whole = attack.trigger(images, tensors)
    assert torch.equal(whole, torch.cat([attack.trigger(part, tensors) for part in images.split(2)]))
    assert torch.equal(images, before)


@pytest.mark.parametrize("wrong", [{"strength": -1.0}, {"control_points": 1}, {"grid_rescale": 0.0}])
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"attack.wanet.{next(iter(wrong))} is .*; write "):
        WaNet(**wrong)


def test_covers_of_a_static_set_are_not_warped_like_its_poison():
    setup, attack = setup_of((1, 16, 16), count=100), WaNet(regime="static", strength=0.0)
    poisoned, roles = attack.poison(setup.trainset, attack.prepare(setup), 10, 0)
    changed = (poisoned.images != setup.trainset.images).flatten(1).any(1)
    assert torch.equal(changed, roles == COVER)  # a warp of strength zero is none; the jitter is there all the same


def test_a_cover_is_jittered_around_the_warp_and_not_around_the_image():
    attack = WaNet(strength=2.0)
    tensors = attack.prepare(setup_of((1, 24, 40)))
    columns = torch.linspace(0, 1, 40).expand(2000, 1, 24, 40)
    mean = attack.stamp_cover(columns, tensors, generator(4)).mean(dim=0)[..., 3:-3]
    warped = attack.stamp(columns[:1], tensors)[0, ..., 3:-3]
    assert (warped - columns[0, ..., 3:-3]).abs().max() > 0.01
    assert torch.allclose(mean, warped, atol=2e-3)
