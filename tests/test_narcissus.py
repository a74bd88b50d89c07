import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import POISON, Setup
from attacks.narcissus import Narcissus
from bench.engine.data import Augmentation, ImageSet, generator, to_float
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import Recipe, TrainingLog


class LinearNet(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.fc.weight = nn.Parameter(weight.clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))

    def get_classifier(self) -> nn.Linear:
        return self.fc


def linear_setup(weight: Tensor, shape: tuple[int, int, int]) -> Setup:
    """A surrogate whose weights are known: the learning rate is 0."""
    images = torch.randint(100, 156, (20, *shape), generator=generator(0, *shape), dtype=torch.uint8)
    return Setup(
        ImageSet(images, torch.arange(20) % 2),
        2,
        7,
        lambda _: Classifier(LinearNet(weight), [0.0] * shape[0], [1.0] * shape[0]),
        Recipe(epochs=1, lr=0.0),
        Augmentation(),
        TrainingLog(),
    )


def small_setup() -> Setup:
    source = generator(1, "images")
    labels = torch.arange(128) % 4
    noise = torch.randint(0, 60, (128, 3, 16, 16), generator=source)
    patterns = torch.randint(0, 196, (4, 3, 4, 4), generator=source)
    large = patterns.repeat_interleave(4, 2).repeat_interleave(4, 3)  # blocks of colours, others for each class
    images = (large[labels] + noise).to(torch.uint8)
    spec = ModelSpec("test_resnet", 4, 3, 16, (0.5,) * 3, (0.25,) * 3)
    recipe = Recipe(epochs=2, batch_size=8, lr=0.05)
    return Setup(ImageSet(images, labels), 4, 1, spec.build, recipe, Augmentation(), TrainingLog())


@pytest.mark.parametrize(("target", "sign"), [(0, -1), (1, 1)])
def test_the_optimum_against_a_linear_network_is_the_bound_times_the_sign_of_its_weights(target, sign):
    weight = torch.randn(2, 256, generator=generator(4))
    setup = linear_setup(weight.mul(0.05), (1, 16, 16))
    attack = Narcissus(target_label=target, warmup_epochs=0, updates=150)
    pattern = attack.prepare(setup)["pattern"]
    direction = sign * (weight[1] - weight[0]).view(1, 16, 16)
    strong = direction.abs() > 0.5  # the two-class loss falls along the difference of the weights
    assert torch.allclose(pattern[strong], 16 / 255 * direction.sign()[strong], atol=1e-6)
    assert float(pattern.abs().max()) <= 16 / 255 + 1e-7


def test_pixels_at_a_bound_in_every_image_take_part_too():
    weight = torch.randn(2, 256, generator=generator(4))
    setup = linear_setup(weight.mul(0.05), (1, 16, 16))
    setup.trainset.images[:, :, :8], setup.trainset.images[:, :, 8:] = 0, 255
    pattern = Narcissus(target_label=1, warmup_epochs=0, updates=150).prepare(setup)["pattern"]
    direction = (weight[1] - weight[0]).view(1, 16, 16)
    inwards = torch.ones(1, 16, 16)
    inwards[:, 8:] = -1
    free = (direction.abs() > 0.5) & (direction.sign() == inwards)  # outwards the image is clamped
    assert free.sum() > 50
    assert torch.allclose(pattern[free], 16 / 255 * direction.sign()[free], atol=1e-6)


def test_training_images_change_by_up_to_16_levels_and_test_images_by_up_to_48():
    attack = Narcissus(poison_rate=0.5)
    pattern = torch.tensor([16 / 255, -16 / 255, 5 / 255, 0.0]).view(1, 2, 2)
    images = torch.tensor([[100, 100, 100, 100], [250, 5, 254, 0]], dtype=torch.uint8).view(2, 1, 2, 2)
    clean = ImageSet(images, torch.tensor([0, 0]))
    poisoned, roles = attack.poison(clean, {"pattern": pattern}, 2, seed=1, rate=1.0)
    assert roles.tolist() == [POISON, POISON]
    assert poisoned.images.flatten(1).tolist() == [[116, 84, 105, 100], [255, 0, 255, 0]]
    triggered = attack.trigger(to_float(images), {"pattern": pattern}).mul(255).round().long()
    assert triggered.flatten(1).tolist() == [[148, 52, 115, 100], [255, 0, 255, 0]]


def test_the_usual_rate_poisons_25_of_50000_images_all_of_the_target_class_with_their_labels():
    clean = ImageSet(torch.full((50_000, 1, 2, 2), 99, dtype=torch.uint8), torch.arange(50_000) % 10)
    attack = Narcissus(target_label=2)
    tensors = {"pattern": torch.full((1, 2, 2), 16 / 255)}
    poisoned, roles = attack.poison(clean, tensors, 10, seed=3)
    victims = roles == POISON
    assert int(victims.sum()) == 25
    assert clean.labels[victims].tolist() == [2] * 25
    assert torch.equal(poisoned.labels, clean.labels)
    assert torch.equal((poisoned.images != clean.images).flatten(1).any(1), victims)


def test_the_pattern_more_than_halves_the_loss_of_target_class_images_on_a_trained_surrogate():
    setup = small_setup()
    attack = Narcissus(updates=40, warmup_epochs=0, learning_rate=0.02)
    tensors = attack.prepare(setup)
    own = to_float(setup.trainset.images[setup.trainset.labels == 0])
    model, labels = setup.surrogate(), torch.zeros(32, dtype=torch.int64)
    with torch.no_grad():
        before = F.cross_entropy(model(own), labels)
        after = F.cross_entropy(model(attack.stamp_poison(own, tensors, generator(0))), labels)
    assert after < 0.4 * before
    assert float(tensors["pattern"].abs().max()) <= 16 / 255 + 1e-7


def test_the_warm_up_sees_the_target_class_alone_for_the_set_number_of_epochs():
    setup = small_setup()
    Narcissus(updates=0, warmup_epochs=3).prepare(setup)
    assert len(setup.log.curves["narcissus_warmup/loss"]) == 3
    # Two epochs over all 128 images, then three over the 32 of the target class.
    assert setup.log.images == 2 * 128 + 3 * 32


def test_preparing_twice_gives_the_same_pattern():
    setup = small_setup()
    attack = Narcissus(updates=3, warmup_epochs=1)
    first = attack.prepare(setup)["pattern"]
    assert torch.equal(first, attack.prepare(setup)["pattern"])
    assert not first.requires_grad
    assert float(first.abs().max()) > 0


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64)])
def test_other_shapes_are_stamped_in_parts_as_in_one(shape):
    weight = torch.randn(2, shape[0] * shape[1] * shape[2], generator=generator(4)).mul(0.01)
    attack = Narcissus(updates=2, warmup_epochs=0)
    tensors = attack.prepare(linear_setup(weight, shape))
    images = torch.rand(5, *shape, generator=generator(5))
    before = images.clone()
    whole = attack.stamp(images, tensors)
    assert torch.equal(whole, torch.cat([attack.stamp(part, tensors) for part in images.split(2)]))
    assert torch.equal(images, before)
    assert attack.trigger(images, tensors).shape == images.shape


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_mode": "all_to_one"},
        {"regime": "per_batch"},
        {"epsilon": 16.0},
        {"amplification": 0.0},
        {"updates": -1},
        {"batch_size": 0},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"attack.narcissus.{next(iter(wrong))} is "):
        Narcissus(**wrong)
