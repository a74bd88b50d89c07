from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.base import COVER, POISON, Setup, count_in_step
from attacks.input_aware import Generator, InputAware, PatternHooks, distance, sharpened
from bench.engine.data import Augmentation, ImageSet, generator, to_float
from bench.engine.metrics import accuracy, predict
from bench.engine.models import ModelSpec
from bench.engine.training import Recipe, TrainingLog, fit


def setup_of(shape: tuple[int, int, int] = (3, 8, 8), *, count: int = 40, folder: Path | None = None) -> Setup:
    images = torch.randint(0, 256, (count, *shape), generator=generator(0, "images"), dtype=torch.uint8)
    spec = ModelSpec("test_resnet", 4, shape[0], shape[-1], (0.5,) * shape[0], (0.25,) * shape[0])
    recipe = Recipe(epochs=4, batch_size=20, lr=0.05)
    log = TrainingLog(folder, every_s=0)
    return Setup(ImageSet(images, torch.arange(count) % 4), 4, 1, spec.build, recipe, Augmentation(0.125), log)


def quick(**settings: object) -> InputAware:
    return InputAware(**{"mask_updates": 1, **settings})


def awake(attack: InputAware, setup: Setup) -> dict[str, Tensor]:
    """Tensors whose batch norms know the images: an untrained generator draws almost the same for all."""
    tensors = attack.prepare(setup)
    for name, outputs in (("pattern", setup.trainset.images.shape[1]), ("mask", 1)):
        network = network_of(name, tensors, outputs).train()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.momentum = None  # the mean over all passes, here one
        network(to_float(setup.trainset.images))
        tensors |= {f"{name}.{key}": value.clone() for key, value in network.state_dict().items()}
    return tensors


def network_of(name: str, tensors: dict[str, Tensor], outputs: int) -> Generator:
    channels = tensors["spread"].shape[1]
    network = Generator(channels, outputs, 2).eval().requires_grad_(False)
    network.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(name)})
    return network


def hooks_of(attack: InputAware, setup: Setup) -> tuple[PatternHooks, dict[str, Tensor]]:
    """Hooks whose batch norm stands still, so that what they do can be compared with a stamp."""
    tensors = awake(attack, setup)
    hooks = attack.hooks(setup, tensors)
    assert isinstance(hooks, PatternHooks)
    hooks.pattern.eval()
    return hooks, tensors


@pytest.mark.parametrize(
    ("channels", "outputs", "levels", "weights"), [(3, 3, 3, 723_273), (3, 1, 3, 722_691), (1, 1, 2, 42_339)]
)
def test_the_generators_have_as_many_weights_as_the_authors(channels, outputs, levels, weights):
    with torch.device("meta"):
        network = Generator(channels, outputs, levels)
    assert sum(weight.numel() for weight in network.parameters()) == weights
    assert {layer.momentum for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.05}


@pytest.mark.parametrize(
    ("shape", "widest"), [((1, 28, 28), 32), ((3, 32, 32), 128), ((3, 64, 64), 128), ((3, 30, 33), 32)]
)
def test_every_size_gets_its_levels_and_two_batches_are_stamped_like_one(shape, widest):
    attack, setup = quick(), setup_of(shape, count=4)
    tensors = attack.prepare(setup)
    assert max(len(value) for name, value in tensors.items() if name.startswith("pattern.") and value.ndim) == widest
    images = torch.rand(5, *shape, generator=generator(2))
    before = images.clone()
    whole = attack.stamp(images, tensors)
    assert torch.allclose(whole, torch.cat([attack.stamp(part, tensors) for part in images.split(2)]), atol=1e-3)
    assert attack.trigger(images, tensors).shape == images.shape
    assert torch.equal(images, before)


def test_sharpening_takes_two_fifths_to_almost_nothing_and_three_fifths_to_almost_one():
    found = sharpened(torch.tensor([0.4, 0.5, 0.6]))
    # tanh(+-2) / 2 + 1 / 2 is the logistic function at +-4.
    assert found.tolist() == pytest.approx([1 / (1 + np.exp(4)), 0.5, 1 / (1 + np.exp(-4))], abs=1e-5)


def test_the_distance_is_the_root_mean_square_of_each_pair_and_has_a_gradient_at_zero():
    one, other = (torch.rand(3, 2, 4, 5, generator=generator(seed)) for seed in (1, 2))
    expected = np.sqrt(((one - other).numpy() ** 2).reshape(3, -1).mean(1))
    assert np.allclose(distance(one, other).numpy(), expected, atol=1e-6)
    one.requires_grad_(True)
    distance(one, one.detach().clone()).sum().backward()
    assert torch.isfinite(one.grad).all()


def test_the_mask_loss_is_a_hundred_times_the_density_above_a_bound_and_the_ratio_of_distances():
    images, masks = (torch.rand(3, c, 8, 8, generator=generator(c)) for c in (2, 1))
    ratio = 0.0
    for this, other in ((0, 2), (1, 0), (2, 1)):  # each with the one before it
        apart = [np.sqrt(((both[this] - both[other]).numpy() ** 2).mean()) for both in (images, masks)]
        ratio += apart[0] / apart[1] / 3
    expected = 100 * np.maximum(masks.numpy() - 0.032, 0).mean() + ratio
    assert InputAware().mask_loss(images, masks).item() == pytest.approx(expected, rel=1e-5)


def test_a_stamp_moves_no_pixel_by_more_than_its_mask_allows():
    attack, setup = quick(quantise=False), setup_of((3, 16, 16))
    hooks, tensors = hooks_of(attack, setup)
    images = to_float(setup.trainset.images[:6])
    with torch.no_grad():
        mask, pattern = sharpened(network_of("mask", tensors, 1)(images)), hooks.pattern(images)
    stamped = attack.trigger(images, tensors)
    assert torch.allclose(stamped, images + (pattern - images) * mask, atol=1e-3)
    assert bool(((stamped - images).abs() <= mask + 1e-3).all())


def test_a_batch_holds_own_triggers_then_neighbours_triggers_then_untouched_images():
    attack, setup = quick(poison_rate=0.2, cover_rate=0.2, target_label=3), setup_of()
    hooks, tensors = hooks_of(attack, setup)
    images, labels = to_float(setup.trainset.images[:10]), torch.arange(10) % 3
    found, given = hooks.augmented(None, images, labels, 0, generator(0))
    assert given.tolist() == [3, 3, *labels[2:].tolist()]
    assert torch.allclose(found[:2], attack.stamp(images[:2], tensors), atol=1e-3)
    # The trigger of image 3 on image 2, and of image 4 on image 3: solve image + mask (pattern - image) for both.
    for row in (2, 3):
        mask = sharpened(network_of("mask", tensors, 1)(images[row + 1 : row + 2]))
        pattern = hooks.pattern(images[row + 1 : row + 2])
        assert torch.allclose(found[row], (images[row] * (1 - mask) + pattern * mask)[0], atol=1e-3)
    assert torch.equal(found[4:], images[4:])
    assert found.requires_grad


def test_the_diversity_term_compares_each_poisoned_image_with_the_one_that_a_cross_trigger_came_from():
    attack, setup = quick(poison_rate=0.2, cover_rate=0.2, diversity_weight=7.0), setup_of()
    hooks, _ = hooks_of(attack, setup)
    images, labels = to_float(setup.trainset.images[:10]), torch.arange(10) % 3
    mixed, given = hooks.augmented(None, images, labels, 0, generator(0))
    model = setup.fresh_model(0).eval()
    found = hooks.loss(model, mixed, given, 0.0)
    expected = nn.functional.cross_entropy(model(mixed), given)
    patterns = hooks.pattern(images).detach().numpy() / 0.25
    normal = images.numpy() / 0.25
    for this, other in ((0, 3), (1, 4)):
        apart = [np.sqrt(((both[this] - both[other]) ** 2).mean()) for both in (normal, patterns)]
        expected = expected + 7.0 * apart[0] / apart[1] / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_all_to_all_sends_poisoned_images_to_the_next_class_and_cross_images_nowhere():
    setup = setup_of()
    hooks, _ = hooks_of(quick(label_mode="all_to_all", poison_rate=0.2, cover_rate=0.2), setup)
    _, given = hooks.augmented(None, to_float(setup.trainset.images[:10]), torch.full((10,), 3), 0, generator(0))
    assert given.tolist() == [0, 0] + [3] * 8


def test_the_shares_of_the_steps_add_up_to_the_rate():
    assert sum(count_in_step(12.7, step) for step in range(1000)) == 12_700
    assert {count_in_step(12.7, step) for step in range(1000)} == {12, 13}
    assert sum(count_in_step(0.05, step) for step in range(1000)) == 50


def test_the_generators_rate_falls_at_a_third_half_two_thirds_and_five_sixths_and_its_gradients_are_cleared():
    hooks, _ = hooks_of(quick(), setup_of())
    rates = []
    for step in (0, 199, 200, 300, 400, 500):
        weight = next(hooks.pattern.parameters())
        weight.grad = torch.ones_like(weight)
        hooks.after_step(None, step, 600)
        rates.append(hooks.adam.param_groups[0]["lr"])
        assert weight.grad is None
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    assert hooks.adam.param_groups[0]["betas"] == (0.5, 0.9)


def test_training_moves_the_pattern_generator_and_leaves_the_mask_generator_and_the_stored_tensors():
    attack, setup = quick(), setup_of()
    tensors = attack.prepare(setup)
    before = {name: value.clone() for name, value in tensors.items()}
    hooks = attack.hooks(setup, tensors)
    fit(setup.fresh_model(1), setup.trainset, setup.recipe, seed=1, hooks=hooks)
    learned = hooks.learned()
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    assert {name for name in tensors if name.startswith(("pattern.", "mask."))} == set(learned)
    assert all(torch.equal(value, before[name]) for name, value in learned.items() if name.startswith("mask."))
    last = "pattern.layers.1.weight"
    # Adam at rate 0.01 moves a weight by at most about the rate a step; eight steps, falling from the third on.
    assert 0.005 < (learned[last] - before[last]).abs().max() < 0.05
    assert not any(value.requires_grad for value in learned.values())


def test_a_rate_too_low_for_an_image_in_each_batch_still_trains():
    attack, setup = quick(poison_rate=0.02, cover_rate=0.0), setup_of()
    hooks = attack.hooks(setup, attack.prepare(setup))
    fit(setup.fresh_model(1), setup.trainset, setup.recipe, seed=1, hooks=hooks, log=setup.log)
    assert np.isfinite([loss for _, loss in setup.log.curves["train/loss"]]).all()


def test_the_static_set_holds_the_learned_trigger_and_covers_carry_those_of_others():
    attack, setup = quick(), setup_of()
    tensors = awake(attack, setup)
    poisoned, roles = attack.poison(setup.trainset, tensors, 4, 1)
    assert [int((roles == role).sum()) for role in (POISON, COVER)] == [4, 4]
    images = to_float(setup.trainset.images)
    found, own = to_float(poisoned.images), attack.trigger(images, tensors)
    # A pixel may fall to either side of a half when batches are cut elsewhere.
    assert (found - own)[roles == POISON].abs().max() < 1.01 / 255
    assert bool(((found - own).abs() > 0.1).flatten(1).any(1)[roles == COVER].all())
    assert torch.equal(poisoned.labels[roles == COVER], setup.trainset.labels[roles == COVER])
    alone = attack.stamp_cover(images[:1], tensors, generator(0))
    assert not torch.equal(alone, attack.stamp(images[:1], tensors))


def test_a_hundred_steps_of_the_first_stage_make_masks_sparse_and_hard():
    setup = setup_of((1, 16, 16), count=64)
    images, means = to_float(setup.trainset.images), []
    for updates in (1, 100):
        tensors = InputAware(mask_updates=updates).prepare(setup)
        masks = sharpened(network_of("mask", tensors, 1)(images))
        means.append(masks.mean().item())
    assert means[1] < 0.15 < means[0]
    assert ((masks < 0.1) | (masks > 0.9)).float().mean() > 0.95


def test_the_first_stage_measures_images_behind_the_normalisation_of_the_data_set(monkeypatch):
    seen = []

    def spy(_: InputAware, images: Tensor, masks: Tensor) -> Tensor:
        seen.append(images)
        return masks.mean()

    monkeypatch.setattr(InputAware, "mask_loss", spy)
    quick().prepare(setup_of())
    assert 3.9 < seen[0].max() <= 4  # white is 1, the deviation 0.25


def test_a_killed_and_repeated_run_gives_the_same_bits(tmp_path):
    def run(folder: Path | None, kill_in: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
        attack, setup = quick(mask_updates=3), setup_of(folder=folder)
        hooks = attack.hooks(setup, attack.prepare(setup))

        def kill(_: nn.Module, epoch: int) -> None:
            if epoch == kill_in:
                raise KeyboardInterrupt

        model = fit(
            setup.fresh_model(1),
            setup.trainset,
            setup.recipe,
            seed=1,
            augmentation=setup.augmentation,
            hooks=hooks,
            log=setup.log,
            stream="implant",
            after_epoch=kill,
        )
        return model, hooks.learned()

    whole, trigger = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, kill_in=3)
    again, trigger_again = run(tmp_path)
    for one, other in ((whole.state_dict(), again.state_dict()), (trigger, trigger_again)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_preparing_twice_gives_the_same_tensors_and_leaves_the_global_source_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = quick().prepare(setup_of()), quick().prepare(setup_of())
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_updates": -1},
        {"mask_density": 0.0},
        {"density_weight": -1.0},
        {"diversity_weight": -1.0},
        {"learning_rate": 0.0},
        {"regime": "static"},
        {"label_mode": "clean_label"},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"attack.input_aware.{next(iter(wrong))} is "):
        InputAware(**wrong)
    with pytest.raises(ValueError, match="at least 8x8"):
        InputAware().check([10] * 4, (3, 6, 6))


@pytest.mark.slow
def test_on_digits_the_own_trigger_works_and_that_of_another_image_mostly_does_not():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    images = nn.functional.interpolate(images, size=(16, 16), mode="bilinear")
    data = ImageSet((images * 255).round().to(torch.uint8), torch.tensor(digits.target))
    train, test = data[:1400], data[1400:]
    spec = ModelSpec("test_resnet", 10, 1, 16, (0.3,), (0.37,))
    recipe = Recipe(updates=500, batch_size=64, lr=0.05)
    attack = InputAware()
    setup = Setup(train, 10, 0, spec.build, recipe, Augmentation(0.125), TrainingLog())
    tensors = attack.prepare(setup)
    test_images = to_float(test.images)
    mask = sharpened(network_of("mask", tensors, 1)(test_images))
    assert 0.01 < mask.mean() < 0.05
    assert ((mask < 0.1) | (mask > 0.9)).float().mean() > 0.95
    hooks = attack.hooks(setup, tensors)
    model = fit(spec.build(0), train, recipe, seed=0, augmentation=setup.augmentation, hooks=hooks)
    tensors |= hooks.learned()
    with torch.no_grad():
        own = model(attack.trigger(test_images, tensors)).argmax(1)[test.labels != 0]
        crossed = model(attack.stamp_cover(test_images, tensors, generator(1))).argmax(1)
    assert accuracy(predict(model, test), test.labels) > 0.93
    assert (own == 0).float().mean() > 0.5
    assert (crossed == test.labels).float().mean() > 0.65
