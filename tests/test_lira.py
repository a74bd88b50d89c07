from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import Setup
from attacks.lira import LIRA, TwoStages, UNet
from bench.engine.data import Augmentation, ImageSet, generator, to_float
from bench.engine.metrics import accuracy, predict
from bench.engine.models import ModelSpec
from bench.engine.training import Recipe, TrainingLog, fit


def setup_of(shape: tuple[int, int, int] = (3, 16, 16), *, count: int = 40, folder: Path | None = None) -> Setup:
    images = torch.randint(0, 256, (count, *shape), generator=generator(0, "images"), dtype=torch.uint8)
    spec = ModelSpec("test_resnet", 4, shape[0], shape[-1], (0.5,) * shape[0], (0.25,) * shape[0])
    recipe = Recipe(epochs=4, batch_size=20, lr=0.05)
    log = TrainingLog(folder, every_s=0)
    return Setup(ImageSet(images, torch.arange(count) % 4), 4, 1, spec.build, recipe, Augmentation(0.125), log)


def small(**settings: object) -> LIRA:
    return LIRA(**{"width": 2, **settings})


def hooks_of(attack: LIRA, setup: Setup) -> TwoStages:
    hooks = attack.hooks(setup, attack.prepare(setup))
    assert isinstance(hooks, TwoStages)
    return hooks


def test_the_u_net_joins_each_level_with_what_comes_from_below():
    with torch.device("meta"):
        network = UNet(3, 64)
    shapes = {tuple(layer.weight.shape) for layer in network.modules() if isinstance(layer, nn.Conv2d)}
    down = {(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (512, 256), (512, 512)}
    up = {(256, 512 + 256), (128, 256 + 128), (64, 128 + 64)}
    assert shapes == {(*pair, 3, 3) for pair in down | up} | {(3, 64, 1, 1)}


def test_a_generator_that_is_one_everywhere_adds_epsilon_and_clips():
    attack, setup = small(epsilon=0.25, quantise=False), setup_of()
    tensors = attack.prepare(setup)
    tensors["generator.last.1.weight"].zero_()
    images = torch.rand(3, 3, 16, 16, generator=generator(1))
    for bias, change in ((20.0, 0.25), (-20.0, -0.25), (0.0, 0.0)):  # tanh(20) is 1 in float32
        tensors["generator.last.1.bias"].fill_(bias)
        expected = (images.numpy() + change).clip(0, 1)
        assert torch.allclose(attack.trigger(images, tensors), torch.from_numpy(expected), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (3, 30, 33)])
def test_no_pixel_moves_by_more_than_four_levels_and_two_batches_are_stamped_like_one(shape):
    attack = small()
    tensors = attack.prepare(setup_of(shape, count=4))
    tensors["generator.last.1.weight"].fill_(100.0)  # tanh at its ends almost everywhere
    images = torch.randint(0, 256, (5, *shape), generator=generator(2)) / 255
    before = images.clone()
    whole = attack.stamp(images, tensors)
    assert (whole - images).abs().max().item() == pytest.approx(4 / 255, rel=1e-3)
    assert ((attack.trigger(images, tensors) - images).abs() * 255).round().max() == 4
    assert torch.allclose(whole, torch.cat([attack.stamp(part, tensors) for part in images.split(2)]), atol=1e-5)
    assert torch.equal(images, before)


def test_a_share_of_the_batch_gets_the_trigger_of_the_last_round_not_that_of_the_copy():
    attack, setup = small(poison_rate=0.3, target_label=2, learning_rate=0.5), setup_of()
    tensors = attack.prepare(setup)
    hooks = attack.hooks(setup, tensors)
    images, labels = to_float(setup.trainset.images[:10]), torch.arange(10) % 4
    found, given = hooks.augmented(setup.fresh_model(0), images, labels, 0, generator(0))
    assert given.tolist() == [2] * 3 + labels[3:].tolist()
    assert torch.allclose(found[:3], attack.stamp(images[:3], tensors), atol=1e-6)
    assert torch.equal(found[3:], images[3:])
    copy = {name.replace("copy.", "generator."): value for name, value in hooks.tensors().items()}
    assert not torch.allclose(found[:3], attack.stamp(images[:3], copy), atol=1e-4)


def test_all_to_all_learns_and_poisons_towards_the_next_class():
    setup = setup_of()
    hooks = hooks_of(small(label_mode="all_to_all", poison_rate=0.5), setup)
    images, labels = to_float(setup.trainset.images[:4]), torch.tensor([0, 3, 1, 2])
    assert hooks.augmented(setup.fresh_model(0), images, labels, 0, generator(0))[1].tolist() == [1, 0, 1, 2]


def test_the_first_stage_moves_images_towards_the_target_and_leaves_the_classifier_as_it_was():
    setup = setup_of()
    hooks = hooks_of(small(learning_rate=0.01, epsilon=0.5, target_label=1), setup)
    # An untrained deep network hardly sees the image; one layer with large weights does.
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    nn.init.normal_(model[2].weight, std=0.1, generator=generator(3))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, target = to_float(setup.trainset.images), torch.ones(40, dtype=torch.int64)

    def loss() -> float:
        moved = (images + 0.5 * hooks.copy(images)).clamp(0, 1)
        with torch.no_grad():
            return F.cross_entropy(model.eval()(moved), target).item()

    start = loss()
    model.train()
    for step in range(20):
        hooks.augmented(model, images, setup.trainset.labels, step, generator(step))
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert loss() < start / 2


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"stage_one": 0.5, "rounds": 50}, [0, 1, 2, 3]),  # more rounds than steps: behind each
        ({"stage_one": 0.75, "rounds": 3}, [1, 3, 5]),
        ({"stage_one": 1.0, "rounds": 1}, [7]),
    ],
)
def test_the_generator_changes_once_a_round_and_stands_still_behind_the_first_stage(settings, changes):
    setup = setup_of()
    hooks, model = hooks_of(small(**settings), setup), setup.fresh_model(0)
    images, labels = to_float(setup.trainset.images[:8]), setup.trainset.labels[:8]
    seen, moved = [], []
    for step in range(8):
        before, copy = hooks.learned(), {k: v.clone() for k, v in hooks.copy.state_dict().items()}
        hooks.augmented(model, images, labels, step, generator(step))
        hooks.after_step(model, step, 8)
        if any(not torch.equal(value, before[name]) for name, value in hooks.learned().items()):
            seen.append(step)
            copied = {f"generator.{name}": value for name, value in hooks.copy.state_dict().items()}
            assert all(torch.equal(value, copied[name]) for name, value in hooks.learned().items())
        moved.append(any(not torch.equal(value, copy[name]) for name, value in hooks.copy.state_dict().items()))
    assert seen == changes
    assert moved == [step <= changes[-1] for step in range(8)]


def test_the_stored_tensors_stay_while_the_hooks_learn():
    attack, setup = small(learning_rate=0.1), setup_of()
    tensors = attack.prepare(setup)
    before = {name: value.clone() for name, value in tensors.items()}
    hooks = attack.hooks(setup, tensors)
    fit(setup.fresh_model(1), setup.trainset, setup.recipe, seed=1, hooks=hooks)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    assert hooks.learned().keys() == tensors.keys()
    assert not torch.equal(hooks.learned()["generator.last.0.weight"], before["generator.last.0.weight"])


@pytest.mark.parametrize("kill_in", [2, 4])  # what is repeated begins in the first stage, or in the second
def test_a_killed_and_repeated_run_gives_the_same_bits(tmp_path, kill_in):
    def run(folder: Path | None, kill_in: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
        attack, setup = small(rounds=3), setup_of(folder=folder)
        hooks = hooks_of(attack, setup)

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
        run(tmp_path, kill_in)
    again, trigger_again = run(tmp_path)
    for one, other in ((whole.state_dict(), again.state_dict()), (trigger, trigger_again)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_preparing_twice_gives_the_same_tensors_and_leaves_the_global_source_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = small().prepare(setup_of()), small().prepare(setup_of())
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 4.0},
        {"stage_one": 0.0},
        {"rounds": 0},
        {"width": 0},
        {"learning_rate": 0.0},
        {"regime": "static"},
        {"label_mode": "clean_label"},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"attack.lira.{next(iter(wrong))} is "):
        LIRA(**wrong)


@pytest.mark.slow
def test_on_digits_the_trigger_works_rounded_and_not_and_leaves_an_independent_clean_model_alone():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    images = F.interpolate(images, size=(16, 16), mode="bilinear")
    data = ImageSet((images * 255).round().to(torch.uint8), torch.tensor(digits.target))
    train, test = data[:1400], data[1400:]
    spec = ModelSpec("test_resnet", 10, 1, 16, (0.3,), (0.37,))
    recipe = Recipe(updates=300, batch_size=64, lr=0.05)
    attack = LIRA(width=8)
    setup = Setup(train, 10, 0, spec.build, recipe, Augmentation(0.125), TrainingLog())
    tensors = attack.prepare(setup)
    hooks = attack.hooks(setup, tensors)
    infected = fit(spec.build(0), train, recipe, seed=0, augmentation=setup.augmentation, hooks=hooks)
    clean = fit(spec.build(5), train, recipe, seed=5, augmentation=setup.augmentation)
    others = to_float(test.images)[test.labels != 0]
    rounded, exact = attack.trigger(others, hooks.learned()), attack.stamp(others, hooks.learned())
    with torch.no_grad():
        shares = [
            (m(x).argmax(1) == 0).float().mean() for m, x in ((infected, rounded), (infected, exact), (clean, exact))
        ]
    assert min(shares[:2]) > 0.9
    assert shares[2] < 0.03
    assert accuracy(predict(infected, test), test.labels) > accuracy(predict(clean, test), test.labels) - 0.02
