from itertools import pairwise

import pytest
import torch

from attacks.base import Setup
from attacks.ssba import SSBA, Decoder, Encoder, Ramp
from bench.engine.data import Augmentation, ImageSet, generator, to_float
from bench.engine.models import ModelSpec
from bench.engine.training import Recipe, Tensors, TrainingLog


def small_setup(
    shape: tuple[int, int, int] = (3, 16, 16), seed: int = 7, recipe: Recipe | None = None, count: int = 64
) -> Setup:
    coarse = torch.rand(count, shape[0], 4, 4, generator=generator(0, "images"))
    smooth = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")
    images = (smooth * 255).to(torch.uint8)
    spec = ModelSpec("test_resnet", 4, shape[0], shape[1], (0.5,) * shape[0], (0.25,) * shape[0])
    recipe = recipe or Recipe(epochs=1)
    labels = torch.arange(count) % 4
    return Setup(ImageSet(images, labels), 4, seed, spec.build, recipe, Augmentation(), TrainingLog())


def decoder_of(tensors: Tensors, shape: tuple[int, int, int], bits: int) -> Decoder:
    decoder = Decoder(shape, bits)
    stored = {name: value for name, value in tensors.items() if name.startswith("decoder.")}
    decoder.load_state_dict({name.removeprefix("decoder."): value for name, value in stored.items()})
    return decoder


def test_encoder_has_the_layers_of_the_specified_network():
    def conv(before: int, after: int, size: int) -> int:
        return before * after * size * size + after

    down = conv(6, 32, 3) + conv(32, 32, 3) + conv(32, 64, 3) + conv(64, 128, 3) + conv(128, 256, 3)
    up = conv(256, 128, 2) + conv(128, 64, 2) + conv(64, 32, 2) + conv(32, 32, 2)
    # Each meets the level of its size; the last also the input: the secret as an image, and the image.
    join = conv(128 + 128, 128, 3) + conv(64 + 64, 64, 3) + conv(32 + 32, 32, 3) + conv(32 + 32 + 6, 32, 3)
    end = conv(32, 32, 3) + conv(32, 3, 1)
    secret = 100 * (16 * 16 * 3) + 16 * 16 * 3
    assert sum(weight.numel() for weight in Encoder(3, 100).parameters()) == down + up + join + end + secret


def test_decoder_has_the_layers_of_the_specified_network():
    widths = [3, 32, 32, 64, 64, 64, 128, 128]
    convs = sum(a * b * 9 + b for a, b in pairwise(widths))
    dense = 128 * 512 + 512 + 512 * 100 + 100  # five halvings leave one pixel of 32
    assert sum(weight.numel() for weight in Decoder((3, 32, 32), 100).parameters()) == convs + dense


def test_the_image_loss_waits_for_the_bits_and_rises_over_a_fifth_of_the_updates():
    ramp = Ramp(15_000)
    ramp.note(0.89, 500)
    ramp.note(0.95, 2_000)
    ramp.note(0.99, 2_500)  # later news changes nothing
    assert [ramp(update) for update in (2_999, 3_000, 4_500, 6_000, 14_999)] == [0, 0, 0.5, 1, 1]


def test_the_image_loss_comes_by_the_middle_even_if_no_bit_is_ever_read():
    ramp = Ramp(1_000)
    ramp.note(0.6, 20)
    assert [ramp(update) for update in (500, 600, 700)] == [0, 0.5, 1]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (3, 20, 33)])
def test_any_size_is_stamped_in_parts_as_in_one(shape):
    attack = SSBA(updates=1, batch_size=2)
    tensors = attack.prepare(small_setup(shape, count=4))
    images = torch.rand(5, *shape, generator=generator(5))
    before = images.clone()
    whole = attack.stamp(images, tensors)
    assert whole.shape == images.shape
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
    parts = torch.cat([attack.stamp(part, tensors) for part in images.split(2)])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert torch.equal(images, before)


def test_the_stamp_is_the_stored_encoder_with_the_stored_secret():
    attack = SSBA(updates=2, batch_size=4)
    tensors = attack.prepare(small_setup())
    assert tensors["secret"].shape == (100,)
    assert set(tensors["secret"].tolist()) == {0.0, 1.0}
    encoder = Encoder(3, 100)
    stored = {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith("encoder.")}
    encoder.load_state_dict(stored)
    images = torch.rand(3, 3, 16, 16, generator=generator(5))
    with torch.no_grad():
        expected = encoder(images, tensors["secret"].repeat(3, 1))
    assert torch.allclose(attack.stamp(images, tensors), expected, atol=1e-6)


def test_preparing_twice_gives_the_same_tensors_and_leaves_the_global_source_alone():
    attack = SSBA(updates=2, batch_size=4)
    state = torch.get_rng_state()
    first, again = attack.prepare(small_setup()), attack.prepare(small_setup())
    attack.stamp(torch.rand(2, 3, 16, 16, generator=generator(1)), first)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["secret"], attack.prepare(small_setup(seed=8))["secret"])
    assert all(value.is_contiguous() and not value.requires_grad for value in first.values())


def test_no_more_images_are_seen_than_in_the_training_of_the_victim():
    # 3 epochs of 64 images are 192, at 16 a step 12 updates; the last one is number 11.
    setup = small_setup(recipe=Recipe(epochs=3, batch_size=32))
    SSBA(batch_size=16).prepare(setup)
    assert setup.log.curves["ssba/bit_accuracy"][-1][0] == 11
    # 5 steps of 32 images are 160, at 16 a step 10 updates.
    setup = small_setup(recipe=Recipe(updates=5, batch_size=32))
    SSBA(batch_size=16).prepare(setup)
    assert setup.log.curves["ssba/bit_accuracy"][-1][0] == 9


def test_changes_depend_on_image_and_secret():
    attack = SSBA(updates=2, batch_size=4)
    tensors = attack.prepare(small_setup())
    images = torch.rand(2, 3, 16, 16, generator=generator(5))
    change = attack.stamp(images, tensors) - images
    assert float((change[0] - change[1]).abs().mean()) > 1 / 255
    other = {**tensors, "secret": 1 - tensors["secret"]}
    assert float((attack.stamp(images, other) - attack.stamp(images, tensors)).abs().mean()) > 1e-3


@pytest.mark.slow
def test_new_images_carry_the_secret_through_eight_bits_and_stay_recognisable():
    setup = small_setup(count=300)
    shown = Setup(**{**vars(setup), "trainset": setup.trainset[:250]})
    attack = SSBA(secret_bits=16, updates=400, batch_size=16, learning_rate=3e-4)
    tensors = attack.prepare(shown)
    images = to_float(setup.trainset.images[250:])
    triggered = attack.trigger(images, tensors)
    assert torch.equal((triggered * 255).round() / 255, triggered)
    with torch.no_grad():
        read = decoder_of(tensors, (3, 16, 16), 16)(triggered) > 0
    assert (read == tensors["secret"].bool()).float().mean() >= 0.95
    psnr = -10 * (triggered - images).square().mean().log10()
    assert psnr > 18


@pytest.mark.parametrize(
    "wrong",
    [{"secret_bits": 0}, {"updates": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"image_weight": -1.0}],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"attack.ssba.{next(iter(wrong))} is "):
        SSBA(**wrong)
