from __future__ import annotations

import math

import pytest
import torch

from attacks.base import Setup
from attacks.sig import Sig
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.training import Recipe, TrainingLog

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64)]


def setup(shape: tuple[int, ...] = (3, 32, 32), count: int = 40) -> Setup:
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator(0, "test"))
    data = ImageSet(images, torch.arange(count) % 4)
    return Setup(data, 4, 0, lambda seed: torch.nn.Identity(), Recipe(), Augmentation(), TrainingLog())


def grey(shape: tuple[int, ...] = (3, 32, 32), count: int = 2) -> torch.Tensor:
    return torch.full((count, *shape), 0.5)


def test_columns_on_a_zero_of_the_sine_stay_as_they_are_and_all_others_change():
    attack = Sig()
    images = torch.cat([grey(), torch.zeros(1, 3, 32, 32)])  # black ones: even 1e-17 would be a change
    changed = (attack.stamp(images, attack.prepare(setup())) != images)[0].all(dim=0).all(dim=0)
    assert (~changed).nonzero().flatten().tolist() == [0, 8, 16, 24]
    black = attack.stamp(images, attack.prepare(setup()))[2]
    assert black[..., [0, 8, 16, 24]].eq(0).all()


def test_pixel_at_column_j_moves_by_the_sine_of_equation_delta_sin_2_pi_j_6_over_width():
    attack = Sig()
    for shape in SHAPES:
        change = (attack.stamp(grey(shape), attack.prepare(setup(shape))) - 0.5)[0]
        for column in range(shape[2]):
            expected = 40 / 255 * math.sin(2 * math.pi * column * 6 / shape[2])
            assert torch.allclose(change[..., column], torch.tensor(expected), atol=1e-6)


def test_every_row_sums_to_zero_and_the_peak_is_delta():
    attack = Sig(delta=10)
    change = attack.stamp(grey(), attack.prepare(setup())).double() - 0.5
    assert change.sum(dim=-1).abs().max() < 1e-5
    assert change.abs().max().item() == pytest.approx(10 / 255, abs=1e-6)


def test_at_28_pixels_the_sampled_peak_is_0975_of_delta():
    attack = Sig()
    change = attack.stamp(grey((1, 28, 28)), attack.prepare(setup((1, 28, 28)))) - 0.5
    assert change.abs().max().item() == pytest.approx(0.975 * 40 / 255, rel=1e-3)


@pytest.mark.parametrize(("delta", "decibel"), [(10, 31.1), (20, 25.1), (30, 21.6), (40, 19.1)])
def test_unclipped_psnr_is_that_of_a_sine(delta, decibel):
    attack = Sig(delta=delta)
    change = attack.stamp(grey(), attack.prepare(setup())) - 0.5
    assert -10 * math.log10(change.square().mean().item()) == pytest.approx(decibel, abs=0.05)


def test_training_takes_its_own_amplitude_only_if_there_is_one():
    source = generator(0, "unused")
    tensors = Sig().prepare(setup())
    weak = Sig(delta_train=10).stamp_poison(grey(), tensors, source) - 0.5
    assert weak.max().item() == pytest.approx(10 / 255, abs=1e-6)
    assert torch.equal(Sig().stamp_poison(grey(), tensors, source), Sig().stamp(grey(), tensors))


def test_clean_label_poison_lies_in_the_target_class_and_keeps_its_label():
    attack, data = Sig(target_label=2), setup().trainset
    poisoned, roles = attack.poison(data, attack.prepare(setup()), 4, seed=0)
    assert torch.equal(poisoned.labels, data.labels)
    assert int((roles == 1).sum()) == 2  # 5 % of 40
    assert (data.labels[roles == 1] == 2).all()
    assert torch.equal(poisoned.images[roles == 0], data.images[roles == 0])


def test_dirty_label_variant_relabels_exactly_the_poison_of_other_classes():
    attack, data = Sig(label_mode="all_to_one", poison_rate=0.5, delta=10), setup().trainset
    poisoned, roles = attack.poison(data, attack.prepare(setup()), 4, seed=0)
    assert torch.equal(poisoned.labels != data.labels, (roles == 1) & (data.labels != 0))


@pytest.mark.parametrize("shape", SHAPES)
def test_images_stay_in_range_and_independent_of_their_batch(shape):
    attack = Sig()
    tensors, images = attack.prepare(setup(shape)), torch.rand(5, *shape)
    kept = images.clone()
    whole = attack.stamp(images, tensors)
    assert torch.equal(images, kept)
    assert whole.shape == images.shape
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert torch.equal(whole, torch.cat([attack.stamp(images[:2], tensors), attack.stamp(images[2:], tensors)]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"delta": 0}, "attack.sig.delta is 0; write"),
        ({"delta_train": 300.0}, "attack.sig.delta_train is 300; write"),
        ({"frequency": 0}, "attack.sig.frequency is 0; write"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Sig(**settings)


def test_a_frequency_that_no_width_can_carry_is_refused_before_training():
    with pytest.raises(ValueError, match="write at most 3"):
        Sig().check([10, 10], (1, 8, 8))
    Sig(frequency=3).check([10, 10], (1, 8, 8))


def test_more_poison_than_the_target_class_has_is_refused():
    with pytest.raises(ValueError, match=r"write at most 0\.0400"):
        Sig().check([4, 96], (3, 32, 32))


def test_at_half_of_the_width_there_is_no_trigger_and_the_frequency_is_refused():
    stripes = Sig(frequency=4).prepare(setup((1, 8, 8)))["stripes"]
    assert not stripes.any()
    with pytest.raises(ValueError, match="write at most 3"):
        Sig(frequency=4).check([10, 10], (1, 8, 8))
