from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import nn

from attacks.base import Setup
from attacks.low_frequency import LowFrequency, blurred, deepfool
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.training import Recipe, TrainingLog

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64)]


def linear(weights: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weights.shape[1], weights.shape[0])
    layer.load_state_dict({"weight": weights, "bias": bias})
    return nn.Sequential(nn.Flatten(), layer)


def setup(shape: tuple[int, ...] = (3, 32, 32), seed: int = 0, bias: float = 0.0) -> Setup:
    """Four classes and a linear network; `bias` pulls every image to class 0."""
    source = generator(0, "test")
    images = torch.randint(0, 256, (60, *shape), dtype=torch.uint8, generator=source)
    weights = torch.randn(4, images[0].numel(), generator=source) * 0.05
    data = ImageSet(images, torch.arange(60) % 4)
    return Setup(
        data,
        4,
        seed,
        lambda seed: linear(weights, torch.tensor([bias, 0.0, 0.0, 0.0])),
        Recipe(epochs=0),
        Augmentation(),
        TrainingLog(),
    )


@pytest.mark.parametrize("pattern", ["optimised", "noise"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pattern_fills_the_range_from_0_to_51_levels(shape, pattern):
    tensor = LowFrequency(pattern=pattern).prepare(setup(shape))["pattern"]
    assert tensor.shape == shape
    assert tensor.min() == 0
    assert tensor.max().item() == pytest.approx(51 / 255)


@pytest.mark.parametrize(("pattern", "draws"), [("optimised", 5), ("noise", 40)])
def test_its_energy_lies_in_low_frequencies(pattern, draws):
    frequency = np.fft.fftfreq(32, 1 / 32)
    radius = np.hypot(frequency[:, None], frequency)
    shares = []
    for seed in range(draws):
        mean = LowFrequency(pattern=pattern).prepare(setup(seed=seed))["pattern"].mean(dim=0).double().numpy()
        energy = np.abs(np.fft.fft2(mean - mean.mean())) ** 2
        shares.append([energy[radius <= reach].sum() / energy.sum() for reach in (2, 4)])
    # Opposite edges of an image do not fit together, which costs an unlucky draw some per cent; white noise has 1 %.
    assert (np.median(shares, axis=0) >= [0.90, 0.96]).all()
    assert (np.min(shares, axis=0) >= [0.80, 0.92]).all()


def test_the_blur_is_a_gaussian_of_six_pixels_with_zeros_around():
    picture = np.random.default_rng(0).normal(size=(2, 32, 32))
    ours = blurred(torch.tensor(picture)).numpy()
    for channel, result in zip(picture, ours, strict=True):
        expected = scipy.ndimage.gaussian_filter(channel, 6, mode="constant", radius=15)
        np.testing.assert_allclose(result, expected, atol=1e-6)


def test_deepfool_takes_the_shortest_way_to_the_boundary_of_a_linear_network():
    weights, bias = torch.tensor([[3.0, 4.0, 0, 0], [0, 0, 0, 0]]), torch.tensor([-1.0, 0.0])
    images = torch.tensor([[1.0, 1.0, 0.5, 0.5], [0.2, 0.9, 0.1, 0.3]]).view(2, 1, 2, 2)
    change, reached = deepfool(linear(weights, bias), images, torch.tensor([1, 1]), steps=3)
    assert reached.all()
    # Distances (3 + 4 - 1) / 5 and (0.6 + 3.6 - 1) / 5, along -(3, 4) / 5, and 2 % further (plus 1e-4).
    for moved, distance in zip(change.flatten(1), (1.2, 0.64), strict=True):
        expected = -1.02 * (distance + 1e-4) * torch.tensor([0.6, 0.8, 0, 0])
        torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)


def test_deepfool_says_which_images_do_not_get_there_and_leaves_those_at_their_target():
    weights, bias = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0.0, 0, 0, 0]]), torch.tensor([0.0, 0, -1])
    model = linear(weights, bias)
    images = torch.ones(2, 1, 2, 2)
    # Class 2 loses to class 1 by one everywhere: no image can reach it. The second image is at home already.
    change, reached = deepfool(model, images, torch.tensor([2, 0]), steps=5)
    assert reached.tolist() == [False, True]
    assert change[1].eq(0).all()
    assert all(weight.requires_grad for weight in model.parameters())


def halves() -> Setup:
    """Two smooth classes apart by their brightness in opposite halves: what a smooth pattern can turn."""
    half = torch.cat([torch.ones(1, 32, 16), -torch.ones(1, 32, 16)], dim=2).flatten()
    model = linear(torch.stack([half, -half]) * 0.01, torch.tensor([-1.0, 0.0]))
    images = torch.randint(90, 160, (60, 1, 32, 32), dtype=torch.uint8, generator=generator(1, "test"))
    data = ImageSet(images, torch.ones(60, dtype=torch.long))
    return Setup(data, 2, 0, lambda seed: model, Recipe(epochs=0), Augmentation(), TrainingLog())


@pytest.mark.parametrize(("settings", "passes"), [({}, 7), ({"passes": 3}, 3), ({"fooling_rate": 0.08}, 3)])
def test_the_search_ends_when_five_passes_lie_within_a_point_at_its_last_pass_or_at_its_rate(settings, passes):
    made = setup()
    LowFrequency(**settings).prepare(made)
    rates = [rate for _, rate in made.log.curves["low_frequency/fooling_rate"]]
    assert len(rates) == passes
    windows = [max(rates[at : at + 5]) - min(rates[at : at + 5]) for at in range(len(rates) - 4)]
    assert [window <= 0.01 for window in windows] == [False, False, True][: len(windows)]
    assert all(rate < settings.get("fooling_rate", 0.2) for rate in rates[:-1])


def test_the_optimised_pattern_fools_more_than_noise_does():
    made, attack = halves(), LowFrequency()
    model, images = made.surrogate(), made.trainset.images
    tensors = attack.prepare(made)
    with torch.no_grad():
        assert (model(images / 255).argmax(1) == 1).all()
        assert (model(attack.trigger(images / 255, tensors)).argmax(1) == 0).float().mean() >= 0.2
    assert made.log.curves["low_frequency/fooling_rate"][-1][1] >= 0.2
    left, right = tensors["pattern"][..., :16].mean(), tensors["pattern"][..., 16:].mean()
    assert left > right + 0.02  # class 0 is brighter on the left


def test_all_to_all_optimises_towards_each_image_s_next_class():
    tensors = [LowFrequency(label_mode=mode).prepare(setup())["pattern"] for mode in ("all_to_one", "all_to_all")]
    assert not torch.allclose(*tensors, atol=1e-3)


def test_a_surrogate_that_sends_all_to_the_target_leaves_the_noise_pattern():
    made = setup(bias=1000.0)
    expected = LowFrequency(pattern="noise").prepare(made)["pattern"]
    assert torch.equal(LowFrequency().prepare(made)["pattern"], expected)
    assert made.log.curves["low_frequency/noise"] == [(0, 1)]


def test_noise_trains_no_network():
    made = setup()
    poor = Setup(made.trainset, 4, 0, lambda seed: pytest.fail("trained"), Recipe(), Augmentation(), TrainingLog())
    LowFrequency(pattern="noise").prepare(poor)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_change_is_the_same_for_all_unclipped_images_and_most_survives_rounding(shape):
    attack = LowFrequency(pattern="noise")
    tensors, images = attack.prepare(setup(shape)), torch.rand(5, *shape) * 0.8
    change = attack.stamp(images, tensors) - images
    torch.testing.assert_close(change, change[:1].expand_as(change), atol=1e-6, rtol=0)
    grey = torch.full((1, *shape), 100 / 255)
    assert (attack.trigger(grey, tensors) != grey).float().mean() > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_images_stay_in_range_and_independent_of_their_batch(shape):
    attack = LowFrequency(pattern="noise")
    tensors, images = attack.prepare(setup(shape)), torch.rand(5, *shape)
    kept = images.clone()
    whole = attack.stamp(images, tensors)
    assert torch.equal(images, kept)
    assert whole.max() <= 1
    assert torch.equal(whole, torch.cat([attack.stamp(images[:2], tensors), attack.stamp(images[2:], tensors)]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pattern": "learned"}, "attack.low_frequency.pattern is 'learned'; write optimised or noise"),
        ({"strength": 0}, "attack.low_frequency.strength is 0; write"),
        ({"fooling_rate": 20}, "attack.low_frequency.fooling_rate is 20; write"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LowFrequency(**settings)
