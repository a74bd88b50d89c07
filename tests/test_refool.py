import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from attacks.base import Setup
from attacks.refool import Refool, blurred, doubled, vignette
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import ModelSpec
from bench.engine.training import Recipe, Tensors, TrainingLog


def small_setup(images: Tensor, labels: Tensor, seed: int = 7) -> Setup:
    spec = ModelSpec("test_resnet", 4, 3, 16, (0.5,) * 3, (0.25,) * 3)
    return Setup(ImageSet(images, labels), 4, seed, spec.build, Recipe(), Augmentation(), TrainingLog())


def random_setup(shape: tuple[int, int, int] = (3, 32, 32), count: int = 400, seed: int = 7) -> Setup:
    images = torch.randint(0, 256, (count, *shape), generator=generator(0, *shape), dtype=torch.uint8)
    return small_setup(images, torch.arange(count) % 4, seed)


def one_reflection(levels: Tensor, opacity: float, attenuation: float, rows: Tensor, columns: Tensor) -> Tensors:
    return {
        "reflections": levels[None],
        "opacity": torch.tensor([opacity]),
        "attenuation": torch.tensor([attenuation]),
        "rows": rows[None],
        "columns": columns[None],
        "hash": torch.ones(levels.shape[-2], dtype=torch.int64),
    }


def test_a_black_reflection_seen_double_only_darkens_by_the_gamma_of_the_opacity():
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=generator(1), dtype=torch.uint8)
    images[1::2] = 0  # all other classes are black, and they are what is reflected
    attack = Refool(ghost_share=1.0, weakest=0.3, strongest=0.3, quantise=False)
    tensors = attack.prepare(small_setup(images, torch.arange(40) % 2))
    scene = torch.rand(6, 3, 16, 16, generator=generator(2))
    assert torch.allclose(attack.trigger(scene, tensors), 0.7 ** (1 / 2.2) * scene, atol=1e-6)


def test_a_ghost_is_added_in_linear_light():
    # Half of the light of grey 0.5, and half of that of white: ((0.5^2.2 + 1) / 2)^(1 / 2.2).
    tensors = one_reflection(
        torch.full((1, 4, 4), 255, dtype=torch.uint8), 0.5, 0.0, torch.full((4,), 0.5), torch.ones(4)
    )
    stamped = Refool(quantise=False).trigger(torch.full((1, 1, 4, 4), 0.5), tensors)
    assert torch.allclose(stamped, torch.full_like(stamped, ((0.5**2.2 + 1) / 2) ** (1 / 2.2)), atol=1e-5)


def test_a_reflection_out_of_focus_loses_the_mean_excess_of_each_channel():
    source = np.random.default_rng(0)
    levels = source.integers(0, 256, (3, 8, 8)).astype(np.uint8)
    scene = source.random((3, 8, 8)).astype(np.float32)
    rows, columns = source.random(8).astype(np.float32), source.random(8).astype(np.float32)
    opacity, attenuation = 0.8, 1.1
    expected = np.zeros((3, 8, 8))
    for channel in range(3):
        light = scene[channel] ** 2.2
        reflected = (levels[channel] / 255) ** 2.2
        over = [a + b - 1 for a, b in zip(light.flat, reflected.flat, strict=True) if a + b > 1]
        reflected = np.clip(reflected - attenuation * sum(over) / len(over), 0, 1)
        total = opacity * light + np.outer(rows, columns) * reflected
        expected[channel] = np.clip(total, 0, 1) ** (1 / 2.2)
    tensors = one_reflection(
        torch.from_numpy(levels), opacity, attenuation, torch.from_numpy(rows), torch.from_numpy(columns)
    )
    stamped = Refool(quantise=False).trigger(torch.from_numpy(scene)[None], tensors)[0]
    assert np.allclose(stamped.numpy(), expected, atol=1e-5)


def test_a_double_is_the_mix_of_two_shifted_copies_stretched_over_the_image():
    rows = torch.arange(8.0).view(1, 8, 1).expand(1, 8, 8)
    # Row i holds 0.3 i + 0.7 (i - 2) = i - 1.4 for i = 2 to 7: six rows, stretched to eight.
    both = np.arange(2, 8) - 1.4
    places = (np.arange(8) + 0.5) * 6 / 8 - 0.5
    expected = np.interp(places, np.arange(6), both)
    result = doubled(rows, down=2, right=3, mix=0.3)
    assert np.allclose(result.numpy(), np.broadcast_to(expected[None, :, None], (1, 8, 8)), atol=1e-5)


@pytest.mark.parametrize("sigma", [0.2, 0.7, 1.9])
def test_the_blur_is_gaussian(sigma):
    photo = torch.rand(3, 12, 15, generator=generator(3))
    expected = gaussian_filter(
        photo.numpy(), sigma=(0, sigma, sigma), mode="nearest", radius=(0, *2 * (math.ceil(2 * sigma),))
    )
    assert np.allclose(blurred(photo, sigma).numpy(), expected, atol=1e-5)


def test_the_vignette_is_one_at_its_centre_and_a_tenth_half_an_image_away():
    profile = vignette(1001, torch.tensor([0.0, 0.5]))
    assert profile.shape == (2, 1001)
    assert profile[0, 500].item() == pytest.approx(1.0)
    assert profile[0, 0].item() == pytest.approx(math.exp(-9 / 4), rel=0.01)
    assert int(profile[1].argmax()) == 750


def test_draws_lie_in_the_published_ranges():
    tensors = Refool(photos=400).prepare(random_setup(count=800))
    opacity, ghost = tensors["opacity"], tensors["attenuation"] == 0
    assert 0.55 <= float(opacity.min()) < 0.57
    assert 0.93 < float(opacity.max()) <= 0.95
    assert 0.40 < float(ghost.float().mean()) < 0.58
    focus = tensors["attenuation"][~ghost]
    assert 1.08 <= float(focus.min()) < 1.09 < 1.17 < float(focus.max()) <= 1.18
    # The weight of a ghost is what the image lost; out of focus it is at most 1 - opacity / 2.
    weight = tensors["rows"][:, :, None] * tensors["columns"][:, None, :]
    lost = (1 - opacity)[ghost, None, None]
    assert torch.allclose(weight[ghost], lost.expand_as(weight[ghost]))
    assert torch.allclose(weight[~ghost].amax((1, 2)), 1 - opacity[~ghost] / 2, rtol=0.02)


def test_reflections_are_of_other_classes_only():
    images = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
    images[::4] = 255  # class 0, the target
    tensors = Refool().prepare(small_setup(images, torch.arange(40) % 4))
    assert len(tensors["reflections"]) == 30
    assert int(tensors["reflections"].max()) == 0


def test_all_reflections_are_used_about_equally_and_one_image_has_always_the_same():
    tensors = Refool(photos=20).prepare(random_setup())
    tensors = {**tensors, "opacity": torch.linspace(0.1, 0.9, 20), "rows": torch.zeros(20, 32)}
    images = torch.randint(1, 256, (400, 3, 32, 32), generator=generator(9)).float() / 255
    attack = Refool(quantise=False)
    seen = (attack.stamp(images, tensors) / images)[:, 0, 0, 0] ** 2.2  # the opacity tells which one it was
    picked = ((seen - 0.1) / 0.8 * 19).round().long()
    counts = picked.bincount(minlength=20)
    assert counts.min() >= 5  # 20 expected; fewer than 5 has a probability below 1e-4
    again = attack.stamp(images.flip(0), tensors).flip(0)
    assert torch.equal(again, attack.stamp(images, tensors))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (3, 32, 32)])
def test_two_batches_are_stamped_like_one_and_the_images_stay(shape):
    attack = Refool()
    tensors = attack.prepare(random_setup(shape, count=60))
    images = torch.randint(0, 256, (7, *shape), generator=generator(5)).float() / 255
    before = images.clone()
    whole = attack.trigger(images, tensors)
    assert torch.equal(whole, torch.cat([attack.trigger(part, tensors) for part in images.split(3)]))
    assert torch.equal(images, before)
    assert float((whole - images).abs().mean()) > 0.01


def test_the_seed_decides_the_reflections():
    attack = Refool()
    first, again = attack.prepare(random_setup()), attack.prepare(random_setup())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["reflections"], attack.prepare(random_setup(seed=8))["reflections"])


def test_offsets_of_a_large_image_are_three_to_eight_pixels():
    # A white row at 112: a double shows it twice, the offset apart.
    images = torch.zeros(12, 1, 224, 224, dtype=torch.uint8)
    images[:, :, 112] = 255
    tensors = Refool(ghost_share=1.0).prepare(small_setup(images, torch.ones(12, dtype=torch.int64)))
    gaps = []
    for photo in tensors["reflections"]:
        bright = (photo[0, :, 100] > 60).nonzero().flatten()
        gaps.append(int(bright.max() - bright.min()))
    assert min(gaps) >= 3
    assert 6 <= max(gaps) <= 10  # stretching may spread each line over one more row


def test_the_weaker_bound_is_the_smaller():
    with pytest.raises(ValueError, match=r"attack\.refool\.weakest is 0\.5"):
        Refool(weakest=0.5, strongest=0.4)
