import pytest
import torch
from torch import Tensor, nn

from attacks.base import POISON, Setup
from attacks.label_consistent import LabelConsistent
from bench.engine.data import Augmentation, ImageSet, generator, to_float
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import Recipe, TrainingLog

# The four tiles on a 32x32 image, as published for the all-corners variant.
RIGHT = [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
LEFT = [[1, 0, 0], [0, 1, 0], [1, 0, 1]]


class LinearNet(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.fc.weight = nn.Parameter(weight.clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))

    def get_classifier(self) -> nn.Linear:
        return self.fc


def linear_setup(weight: Tensor, images: Tensor, labels: Tensor, seed: int = 7) -> Setup:
    """A surrogate whose weights are known: the learning rate is 0."""
    channels = images.shape[1]
    return Setup(
        ImageSet(images, labels),
        len(weight),
        seed,
        lambda _: Classifier(LinearNet(weight), [0.0] * channels, [1.0] * channels),
        Recipe(epochs=1, lr=0.0),
        Augmentation(),
        TrainingLog(),
    )


def random_setup(count: int = 40, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 7) -> Setup:
    source = generator(0, "images", *shape)
    images = torch.randint(0, 256, (count, *shape), generator=source, dtype=torch.uint8)
    weight = torch.randn(2, images[0].numel(), generator=source).mul_(0.01)
    return linear_setup(weight, images, torch.arange(count) % 2, seed)


def outside_corners(height: int, width: int, side: int) -> Tensor:
    mask = torch.ones(height, width, dtype=torch.bool)
    for rows in (slice(0, side), slice(height - side, height)):
        mask[rows, :side] = mask[rows, width - side :] = False
    return mask


def test_test_trigger_is_the_four_published_tiles_and_nothing_else():
    attack = LabelConsistent(steps=0)
    setup = random_setup()
    images = to_float(setup.trainset.images)
    stamped = attack.trigger(images, attack.prepare(setup))
    right, left = torch.tensor(RIGHT).float(), torch.tensor(LEFT).float()
    for rows in (slice(0, 3), slice(29, 32)):
        assert torch.equal(stamped[..., rows, 29:], right.expand(40, 3, 3, 3))
        assert torch.equal(stamped[..., rows, :3], left.expand(40, 3, 3, 3))
    mask = outside_corners(32, 32, 3)
    assert mask.sum() == 32 * 32 - 36
    assert torch.equal(stamped[..., mask], images[..., mask])


def test_the_trigger_is_its_own_mirror_image():
    attack = LabelConsistent(steps=0)
    tensors = attack.prepare(random_setup())
    images = torch.rand(4, 3, 32, 32, generator=generator(1))
    assert torch.equal(attack.trigger(images, tensors).flip(-1), attack.trigger(images.flip(-1), tensors))


@pytest.mark.parametrize(("shape", "side", "cell"), [((1, 16, 16), 3, 1), ((1, 28, 28), 3, 1), ((3, 64, 64), 6, 2)])
def test_tiles_keep_their_share_of_other_sizes(shape, side, cell):
    attack = LabelConsistent(steps=0)
    stamped = attack.trigger(torch.full((2, *shape), 0.5), attack.prepare(random_setup(10, shape)))
    expected = torch.tensor(RIGHT).float().repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    assert torch.equal(stamped[..., -side:, -side:], expected.expand(2, shape[0], side, side))
    mask = outside_corners(shape[1], shape[2], side)
    assert bool((stamped[..., mask] - 0.5).abs().max() < 1 / 255)


@pytest.mark.parametrize(("steps", "levels"), [(2, 3), (100, 8)])
def test_pgd_climbs_a_linear_network_along_the_sign_of_its_weights(steps, levels):
    # For two classes the loss of class 0 grows along w1 - w0; steps are 1.5 levels, the radius is 8.
    source = generator(3)
    weight = torch.randn(2, 3 * 16 * 16, generator=source).mul_(0.01)
    images = torch.randint(0, 256, (20, 3, 16, 16), generator=source, dtype=torch.uint8)
    setup = linear_setup(weight, images, torch.arange(20) % 2)
    attack = LabelConsistent(poison_rate=0.5, steps=steps)
    poisoned, roles = attack.poison(setup.trainset, attack.prepare(setup), 2, seed=7)
    assert torch.equal(roles == POISON, setup.trainset.labels == 0)
    move = levels * (weight[1] - weight[0]).sign().view(3, 16, 16).long()
    expected = (images[::2].long() + move).clamp(0, 255)
    mask = outside_corners(16, 16, 3)
    assert torch.equal(poisoned.images[::2].long()[..., mask], expected[..., mask])


def test_poisoned_images_have_their_label_and_stay_within_eight_levels_outside_the_tiles():
    setup = random_setup(40)
    attack = LabelConsistent(poison_rate=0.2)
    poisoned, roles = attack.poison(setup.trainset, attack.prepare(setup), 2, seed=7)
    victims = roles == POISON
    assert int(victims.sum()) == 8
    assert torch.equal(poisoned.labels, setup.trainset.labels)
    assert bool((setup.trainset.labels[victims] == 0).all())
    change = (poisoned.images.long() - setup.trainset.images.long()).abs()
    assert int(change[~victims].max()) == 0
    assert int(change[victims][..., outside_corners(32, 32, 3)].max()) == 8
    assert poisoned.images[victims][0, 0, -1].tolist()[-3:] == [255, 0, 255]


def test_the_surrogate_no_longer_knows_perturbed_images():
    source = generator(5)
    labels = torch.arange(256) % 2
    # A class is five levels of brightness, so that eight levels are enough to leave it.
    noise = torch.randint(-20, 21, (256, 3, 16, 16), generator=source)
    images = (128 + noise + 5 * (2 * labels - 1)[:, None, None, None]).to(torch.uint8)
    spec = ModelSpec("test_resnet", 2, 3, 16, (0.5,) * 3, (0.05,) * 3)
    recipe = Recipe(epochs=2, batch_size=16, lr=0.05)
    setup = Setup(ImageSet(images, labels), 2, 1, spec.build, recipe, Augmentation(), TrainingLog())
    attack = LabelConsistent(poison_rate=0.1, steps=20)
    tensors = attack.prepare(setup)
    model = setup.surrogate()
    with torch.no_grad():
        predicted = model(to_float(images[tensors["victims"]])).argmax(1)
        after = model(to_float(tensors["perturbed"])).argmax(1)
    assert (predicted == 0).float().mean() > 0.9
    assert (after == 0).float().mean() < 0.1
    assert setup.log.curves["label_consistent/surrogate_accuracy_on_perturbed"][0][1] < 0.1


def test_a_faint_amplitude_is_for_training_only():
    attack = LabelConsistent(poison_rate=0.5, steps=0, amplitude=32 / 255)
    images = torch.full((4, 1, 32, 32), 100, dtype=torch.uint8)
    setup = linear_setup(torch.zeros(2, 1024), images, torch.tensor([0, 0, 1, 1]))
    tensors = attack.prepare(setup)
    poisoned, _ = attack.poison(setup.trainset, tensors, 2, seed=7)
    assert poisoned.images[0, 0, -1, -3:].tolist() == [132, 68, 132]
    assert attack.trigger(to_float(images), tensors)[0, 0, -1, -3:].tolist() == [1, 0, 1]


def test_another_seed_than_that_of_the_perturbed_images_is_refused():
    setup = random_setup(40)
    attack = LabelConsistent(poison_rate=0.2, steps=1)
    tensors = attack.prepare(setup)
    with pytest.raises(ValueError, match="perturbed other images"):
        attack.poison(setup.trainset, tensors, 2, seed=8)


def test_a_tainted_reserve_gets_the_tiles_alone():
    setup = random_setup(40)
    attack = LabelConsistent(poison_rate=0.2, steps=2)
    tensors = attack.prepare(setup)
    reserve = setup.trainset[torch.arange(10, 20)]
    tainted, roles = attack.poison(reserve, tensors, 2, seed=3, rate=0.3)
    assert int((roles == POISON).sum()) == 3
    mask = outside_corners(32, 32, 3)
    assert torch.equal(tainted.images[..., mask], reserve.images[..., mask])
    assert not torch.equal(tainted.images, reserve.images)


def test_no_surrogate_is_trained_for_no_poison():
    setup = random_setup(10)
    tensors = LabelConsistent(poison_rate=0.0).prepare(setup)
    assert tensors["perturbed"].shape == (0, 3, 32, 32)
    assert not setup.log.curves


def test_two_batches_are_stamped_like_one_and_the_images_stay():
    attack = LabelConsistent(steps=0)
    tensors = attack.prepare(random_setup())
    images = torch.rand(5, 3, 32, 32, generator=generator(2))
    before = images.clone()
    whole = attack.stamp(images, tensors)
    assert torch.equal(whole, torch.cat([attack.stamp(part, tensors) for part in images.split(2)]))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_mode": "all_to_one"},
        {"regime": "per_batch"},
        {"epsilon": 8.0},
        {"amplitude": 0.0},
        {"steps": -1},
        {"patch_size": 2},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"attack.label_consistent.{next(iter(wrong))} is "):
        LabelConsistent(**wrong)
