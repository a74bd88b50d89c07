import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.engine.data import Augmentation, ImageSet, equal_batches, generator, to_float, to_uint8


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def moved_by_hand(images: Tensor, pad: int, flip: bool, source: torch.Generator) -> np.ndarray:
    """Cut a window from the zero-padded image, then mirror the window: pixel by pixel, with the same draws."""
    count, channels, height, width = images.shape
    shift = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=source).numpy()
    mirror = torch.rand(count, 1, generator=source).numpy() < (0.5 if flip else 0.0)
    moved = np.zeros((count, channels, height, width), dtype=np.float64)
    for n in range(count):
        for i in range(height):
            for j in range(width):
                column = width - 1 - j if mirror[n, 0] else j
                y, x = i + shift[0, n, 0] - pad, column + shift[1, n, 0] - pad
                if 0 <= y < height and 0 <= x < width:
                    moved[n, :, i, j] = images[n, :, y, x].numpy() / 255
    return moved


@pytest.mark.parametrize("shape", [(6, 3, 16, 16), (6, 1, 16, 24), (6, 3, 20, 16)])
@pytest.mark.parametrize(("crop", "flip"), [(1 / 8, False), (0.0, True), (1 / 8, True), (1 / 4, True)])
def test_crop_and_flip_pick_the_pixels_that_a_loop_over_pixels_picks(shape, crop, flip):
    images = noise(*shape)
    moved = Augmentation(crop=crop, flip=flip)(images, generator(3, "loop"))
    expected = moved_by_hand(images, round(crop * shape[-1]), flip, generator(3, "loop"))
    np.testing.assert_allclose(moved.numpy(), expected, atol=1e-7)


def test_crop_and_flip_do_the_same_to_float_images_as_to_bytes():
    images, how = noise(8, 3, 16, 16), Augmentation(crop=1 / 8, flip=True, rotation=10)
    assert torch.equal(how(images, generator(1, "a")), how(to_float(images), generator(1, "a")))


def test_every_shift_of_four_pixels_of_32_is_drawn_equally_often_on_both_axes():
    images = torch.zeros(8100, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 16] = 255
    moved = Augmentation(crop=1 / 8)(images, generator(0, "shifts"))
    place = moved.flatten(1).argmax(1)
    rows, columns = 16 - place // 32, 16 - place % 32
    table = np.zeros((9, 9))
    np.add.at(table, (rows.numpy() + 4, columns.numpy() + 4), 1)
    assert moved.flatten(1).sum(1).eq(1).all()  # the pixel never leaves
    # 81 cells of 100 expected each: chi-squared with 80 degrees of freedom is below 140 (p < 1e-4 above).
    assert ((table - 100) ** 2 / 100).sum() < 140


def test_half_of_the_images_are_mirrored_and_only_if_asked():
    images = torch.zeros(4000, 1, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255
    mirrored = Augmentation(flip=True)(images, generator(0, "mirror"))[:, 0, 0, 3]
    assert abs(mirrored.mean().item() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    assert Augmentation(crop=1 / 4)(images, generator(0, "mirror"))[:, 0, 2, 3].max() == 0


def test_no_augmentation_and_a_vanishing_rotation_leave_images_as_they_are():
    images = noise(5, 3, 12, 20)
    assert torch.equal(Augmentation()(images, generator(0)), to_float(images))
    torch.testing.assert_close(Augmentation(rotation=1e-4)(images, generator(0)), to_float(images), atol=1e-3, rtol=0)


def turned_by_hand(image: np.ndarray, angle: float) -> np.ndarray:
    """Rotate about the centre in pixel units, bilinear, zeros outside."""
    _, height, width = image.shape
    turned = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            right, down = j + 0.5 - width / 2, i + 0.5 - height / 2
            x = math.cos(angle) * right - math.sin(angle) * down + width / 2 - 0.5
            y = math.sin(angle) * right + math.cos(angle) * down + height / 2 - 0.5
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        share = (1 - abs(y - row)) * (1 - abs(x - column))
                        turned[:, i, j] += share * image[:, row, column]
    return turned


@pytest.mark.parametrize("shape", [(4, 3, 12, 12), (4, 1, 10, 18), (4, 1, 18, 10)])
@pytest.mark.parametrize("largest", [10, 180])
def test_rotation_is_one_of_pixels_also_where_images_are_not_square(shape, largest):
    images = noise(*shape)
    angles = (torch.rand(shape[0], generator=generator(5, "turn")).double().numpy() * 2 - 1) * math.radians(largest)
    turned = Augmentation(rotation=largest)(images, generator(5, "turn")).numpy()
    for image, angle, found in zip(images.numpy() / 255, angles, turned, strict=True):
        np.testing.assert_allclose(found, turned_by_hand(image, angle), atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (16, 32)])
def test_angles_are_uniform_between_minus_and_plus_the_largest(height, width):
    ramp = (torch.arange(width) * 4 + 40).to(torch.uint8).expand(3000, 1, height, width)
    turned = Augmentation(rotation=30)(ramp, generator(0, "angles"))[:, 0] * 255 / 4
    # In the middle nothing is cut off, and the slopes of a turned ramp are the cosine and minus the sine.
    y, x = height // 2, width // 2
    cosine = turned[:, y, x + 1] - turned[:, y, x]
    sine = turned[:, y, x] - turned[:, y + 1, x]
    angle = torch.atan2(sine, cosine).rad2deg()
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones(3000), atol=1e-3, rtol=0)
    assert 29.5 < angle.abs().max() < 30.01
    assert abs(angle.mean().item()) < 4 * 30 / math.sqrt(3 * 3000)
    assert abs(angle.std().item() - 30 / math.sqrt(3)) < 0.5


def test_augmented_images_stay_in_range_and_are_float_and_channels_last():
    images = torch.full((64, 3, 16, 16), 255, dtype=torch.uint8)
    moved = Augmentation(crop=1 / 8, flip=True, rotation=25)(images, generator(0))
    assert moved.dtype == torch.float32
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert moved.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_leaves_its_input_alone_and_repeats_under_a_seed(dtype):
    images = noise(16, 3, 16, 16) if dtype == torch.uint8 else to_float(noise(16, 3, 16, 16))
    before, how = images.clone(), Augmentation(crop=1 / 8, flip=True, rotation=10)
    first, again, other = (how(images, generator(seed, "epoch")) for seed in (0, 0, 1))
    assert torch.equal(images, before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_of_a_batch_do_not_share_their_draws():
    images = noise(1, 1, 16, 16).expand(64, 1, 16, 16)
    for how in (Augmentation(crop=1 / 8), Augmentation(rotation=20)):
        assert len(how(images, generator(0)).flatten(1).unique(dim=0)) > 15  # of 25 shifts
    assert len(Augmentation(flip=True)(images, generator(0)).flatten(1).unique(dim=0)) == 2


def test_float_to_bytes_rounds_as_numpy_does_and_clips():
    values = torch.linspace(-0.2, 1.2, 10_001)
    expected = np.clip(np.rint(values.numpy() * np.float32(255)), 0, 255).astype(np.uint8)
    assert np.array_equal(to_uint8(values).numpy(), expected)
    assert to_uint8(torch.tensor([0.9999])).item() == 255  # truncation would say 254


def test_every_byte_survives_the_way_to_float_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    np.testing.assert_allclose(to_float(levels).numpy(), np.arange(256) / 255, rtol=1e-7)


def test_conversions_do_not_write_into_their_input():
    values, levels = torch.rand(50), noise(50)
    kept_values, kept_levels = values.clone(), levels.clone()
    to_uint8(values), to_float(levels)
    assert torch.equal(values, kept_values)
    assert torch.equal(levels, kept_levels)


def test_sources_of_other_seeds_words_or_word_orders_are_independent():
    keys = [
        (0,),
        (1,),
        (0, "a"),
        (0, "b"),
        (0, "a", "b"),
        (0, "b", "a"),
        (0, "ab"),
        (0, "a", 1),
        (0, "a", "1"),
        (1, "a"),
    ]
    draws = torch.stack([torch.randn(20_000, generator=generator(*key)) for key in keys])
    correlation = torch.corrcoef(draws) - torch.eye(len(keys))
    assert correlation.abs().max() < 5 / math.sqrt(20_000)


def test_a_source_repeats_and_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    assert torch.equal(torch.rand(9, generator=generator(7, "x")), torch.rand(9, generator=generator(7, "x")))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 32, 128, 1000])
def test_batches_are_equal_not_too_large_and_leave_out_fewer_images_than_there_are_batches(batch_size):
    for count in [*range(1, 300), 1438, 2500, 50_000]:
        batches, size = equal_batches(count, batch_size)
        assert 1 <= size <= batch_size
        assert 0 <= count - batches * size < batches
        assert batches == math.ceil(count / batch_size)  # no more steps than the usual loop makes


def test_batch_norm_never_meets_a_last_batch_of_one():
    assert equal_batches(129, 128) == (2, 64)
    assert equal_batches(50_000, 128) == (391, 127)
    assert equal_batches(2500, 128) == (20, 125)


def test_chunks_go_through_the_set_in_order_and_leave_none_out():
    data = ImageSet(noise(25, 1, 4, 4), torch.arange(25))
    parts = list(data.chunks(10))
    assert [len(labels) for _, labels in parts] == [10, 10, 5]
    assert torch.equal(torch.cat([images for images, _ in parts]), data.images.float() / 255)
    assert torch.equal(torch.cat([labels for _, labels in parts]), data.labels)


def test_a_set_is_cut_by_slices_masks_and_indices():
    data = ImageSet(noise(6, 1, 2, 2), torch.tensor([3, 1, 3, 0, 3, 2]))
    assert data[2:4].labels.tolist() == [3, 0]
    assert len(data[data.labels == 3]) == 3
    picked = data[torch.tensor([5, 0])]
    assert picked.labels.tolist() == [2, 3]
    assert torch.equal(picked.images, data.images[[5, 0]])
    assert torch.equal(picked.images, data.batch(torch.tensor([5, 0])))
    mask = np.array([False, True, False, False, False, True])
    assert data[mask].labels.tolist() == data[[1, 5]].labels.tolist() == [1, 2]


def test_a_set_refuses_float_images_flat_images_and_a_wrong_number_of_labels():
    with pytest.raises(TypeError, match="uint8"):
        ImageSet(torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"\(2, 16\)"):
        ImageSet(noise(2, 16), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 images came with labels of shape"):
        ImageSet(noise(2, 1, 4, 4), torch.zeros(3, dtype=torch.int64))


LARGE_SET = """
import hashlib
import sys
from pathlib import Path
import torch
from bench.engine.datasets import DatasetInfo, write_facts
from bench.engine.metrics import predict
from bench.engine.models import ModelSpec
from bench.engine.training import Recipe, fit

folder = Path(sys.argv[1])
sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*_labels.npy")}
with (folder / "train_images.npy").open("rb") as file:
    sums["train_images.npy"] = hashlib.file_digest(file, "sha256").hexdigest()
write_facts(folder, {"digest": "", "checksums": sums})
info = DatasetInfo("x", "x", "", (3, 32, 32), (1,), (1,), (0.5,) * 3, (0.5,) * 3, folder)
images = info.load("train").to("cpu")
model = ModelSpec("test_resnet", 4, 3, 32, (0.5,) * 3, (0.25,) * 3, "half").build(0)
fit(model, images, Recipe(updates=3, batch_size=16), seed=0)
predict(model, images[torch.arange(0, len(images), 100_000)])
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak) * 1024)
"""


@pytest.mark.slow
def test_a_set_is_trained_on_from_its_file(tmp_path):
    count = 700_000  # 2.2 GB, of which the file system keeps nothing: they are all black
    np.lib.format.open_memmap(tmp_path / "train_images.npy", "w+", np.uint8, (count, 3, 32, 32))
    np.save(tmp_path / "train_labels.npy", np.arange(count) % 4)
    words = [sys.executable, "-c", LARGE_SET, str(tmp_path)]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert int(found) < count * 3 * 32 * 32 / 2  # torch itself included
