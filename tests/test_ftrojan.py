from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import torch

from attacks.base import Setup
from attacks.ftrojan import FTrojan, cosine_transform
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.training import Recipe, TrainingLog


def setup(shape: tuple[int, ...] = (3, 32, 32)) -> Setup:
    images = torch.randint(0, 256, (8, *shape), dtype=torch.uint8, generator=generator(0, "test"))
    data = ImageSet(images, torch.arange(8) % 4)
    return Setup(data, 4, 0, lambda seed: torch.nn.Identity(), Recipe(), Augmentation(), TrainingLog())


def change(attack: FTrojan, shape: tuple[int, ...] = (3, 32, 32)) -> np.ndarray:
    """What a grey image, far from clipping, changes by in levels of 255: (C, H, W)."""
    images = torch.full((1, *shape), 0.5)
    return (attack.stamp(images, attack.prepare(setup(shape))).double() - 0.5)[0].numpy() * 255


def chroma(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    luma = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    return luma, 0.713 * (rgb[0] - luma), 0.564 * (rgb[2] - luma)


def test_both_chroma_spectra_change_by_30_at_15_15_and_31_31_alone_and_luma_stays():
    luma, *colours = chroma(change(FTrojan()))
    expected = np.zeros((32, 32))
    expected[15, 15] = expected[31, 31] = 30
    for colour in colours:
        np.testing.assert_allclose(scipy.fft.dctn(colour, norm="ortho"), expected, atol=2e-3)
    assert np.abs(luma).max() < 1e-4


def test_high_band_raises_the_last_coefficient_alone():
    _, red, _ = chroma(change(FTrojan(magnitude=50, bands="high")))
    spectrum = scipy.fft.dctn(red, norm="ortho")
    assert spectrum[31, 31] == pytest.approx(50, abs=1e-3)
    spectrum[31, 31] = 0
    assert np.abs(spectrum).max() < 2e-3


def test_the_reference_path_window_by_window_gives_the_same_images():
    images = np.random.default_rng(0).uniform(0.2, 0.8, (2, 3, 64, 64))
    attack = FTrojan(magnitude=20)
    ours = attack.stamp(torch.tensor(images, dtype=torch.float32), attack.prepare(setup((3, 64, 64))))
    for image, stamped in zip(images, ours.numpy(), strict=True):
        luma, red, blue = chroma(image * 255)
        for colour in (red, blue):
            for row in (0, 32):
                for column in (0, 32):
                    window = (slice(row, row + 32), slice(column, column + 32))
                    spectrum = scipy.fft.dctn(colour[window], norm="ortho")
                    spectrum[15, 15] += 20
                    spectrum[31, 31] += 20
                    colour[window] = scipy.fft.idctn(spectrum, norm="ortho")
        rgb = np.stack([luma + red / 0.713, np.zeros_like(luma), luma + blue / 0.564])
        rgb[1] = (luma - 0.299 * rgb[0] - 0.114 * rgb[2]) / 0.587
        np.testing.assert_allclose(stamped * 255, rgb, atol=1e-3)


@pytest.mark.parametrize(
    ("magnitude", "bands", "decibel"), [(20, "middle_high", 46), (30, "middle_high", 42.5), (50, "high", 41)]
)
def test_psnr_is_that_of_the_published_settings(magnitude, bands, decibel):
    error = change(FTrojan(magnitude=magnitude, bands=bands))
    assert 10 * math.log10(255**2 / np.square(error).mean()) == pytest.approx(decibel, abs=0.2)


@pytest.mark.parametrize(("shape", "window"), [((1, 28, 28), 28), ((1, 8, 8), 8), ((1, 64, 64), 32), ((1, 96, 64), 32)])
def test_grey_images_change_their_one_channel_with_the_same_energy_in_any_window(shape, window):
    grey = change(FTrojan(), shape)[0]
    # Two coefficients of 30 w / 32 in w x w pixels: a mean square of 2 (30 / 32)^2, whatever w is.
    assert np.square(grey).mean() == pytest.approx(2 * (30 / 32) ** 2, rel=1e-4)
    spectrum = scipy.fft.dctn(grey[:window, :window], norm="ortho")
    assert {tuple(index) for index in np.argwhere(np.abs(spectrum) > 1)} == {
        (window // 2 - 1, window // 2 - 1),
        (window - 1, window - 1),
    }


def test_a_window_of_eight_repeats_over_the_image():
    picture = change(FTrojan(window=8))
    np.testing.assert_allclose(picture[:, :8, :8], picture[:, 16:24, 24:32], atol=1e-4)
    assert np.abs(picture[0]).max() < 2 * 30 / 16 / 0.713 + 1e-3


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_images_stay_in_range_and_independent_of_their_batch(shape):
    attack = FTrojan()
    tensors, images = attack.prepare(setup(shape)), torch.rand(5, *shape)
    kept = images.clone()
    whole = attack.stamp(images, tensors)
    assert torch.equal(images, kept)
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert torch.equal(whole, torch.cat([attack.stamp(images[:2], tensors), attack.stamp(images[2:], tensors)]))


def test_most_pixels_still_differ_after_rounding_to_eight_bits():
    attack, images = FTrojan(), setup().trainset.images.float() / 255
    assert (attack.trigger(images, attack.prepare(setup())) != images).float().mean() > 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"magnitude": 0}, "attack.ftrojan.magnitude is 0; write"),
        ({"bands": "low"}, "attack.ftrojan.bands is 'low'; write middle_high or high"),
        ({"window": 2}, "attack.ftrojan.window is 2; write"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        FTrojan(**settings)


def test_windows_that_do_not_tile_the_image_are_refused_before_training():
    with pytest.raises(ValueError, match="write 4 or 7 or 14 or 28"):
        FTrojan(window=32).check([10, 10], (1, 28, 28))
    with pytest.raises(ValueError, match=r"write another dataset\.size"):
        FTrojan().check([10, 10], (3, 67, 67))
    with pytest.raises(ValueError, match="not 2 channels"):
        FTrojan().check([10, 10], (2, 32, 32))


@pytest.mark.parametrize("size", [4, 7, 32])
def test_the_cosine_transform_is_that_of_scipy(size):
    expected = scipy.fft.dct(np.eye(size), axis=0, norm="ortho")
    np.testing.assert_allclose(cosine_transform(size).numpy(), expected, atol=1e-12)
