import pytest
import torch
from torch import Tensor, nn

from attacks.base import Setup
from attacks.trojan_nn import TrojanNN
from bench.engine.data import Augmentation, ImageSet, generator, to_float
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import Recipe, TrainingLog


class TwoLayers(nn.Module):
    """Its head reads four plain sums of pixels, with the strengths 3, 9, 1 and 6."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden.shape[1], 4, bias=False)
        self.hidden.weight = nn.Parameter(hidden.clone())
        self.fc = nn.Linear(4, 2, bias=False)
        self.fc.weight = nn.Parameter(torch.tensor([[1.0, -5.0, 0.5, 6.0], [-2.0, 4.0, 0.5, 0.0]]))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.hidden(images.flatten(1)))

    def get_classifier(self) -> nn.Linear:
        return self.fc


def two_layer_setup(shape: tuple[int, int, int], hidden: Tensor | None = None) -> Setup:
    """A surrogate whose weights are known: the learning rate is 0."""
    source = generator(0, "images", *shape)
    images = torch.randint(0, 256, (20, *shape), generator=source, dtype=torch.uint8)
    weight = torch.randn(4, images[0].numel(), generator=source) if hidden is None else hidden
    return Setup(
        ImageSet(images, torch.arange(20) % 2),
        2,
        7,
        lambda _: Classifier(TwoLayers(weight), [0.0] * shape[0], [1.0] * shape[0]),
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


@pytest.mark.parametrize(
    ("shape", "first", "last"), [((3, 32, 32), 21, 28), ((1, 28, 28), 18, 24), ((3, 64, 64), 42, 57)]
)
def test_the_square_is_pasted_near_the_lower_right_corner_and_changes_nothing_else(shape, first, last):
    attack = TrojanNN(steps=0, quantise=False)
    tensors = attack.prepare(two_layer_setup(shape))
    images = torch.rand(3, *shape, generator=generator(2))
    stamped = attack.trigger(images, tensors)
    rows, columns = (stamped != images).any(0).any(0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (first, last, first, last)
    side = last - first + 1
    square = stamped[..., first : last + 1, first : last + 1]
    assert torch.equal(square, tensors["patch"].expand(3, shape[0], side, side))


def test_the_neurons_are_those_with_the_largest_sum_of_absolute_weights():
    setup = two_layer_setup((1, 16, 16))
    assert TrojanNN(neurons=2, steps=0).prepare(setup)["neurons"].tolist() == [1, 3]
    assert TrojanNN(neurons=99, steps=0).prepare(setup)["neurons"].tolist() == [1, 3, 0, 2]


def test_the_optimum_for_a_linear_neuron_is_white_where_its_weight_is_positive_and_black_elsewhere():
    setup = two_layer_setup((1, 16, 16))
    tensors = TrojanNN(neurons=1, steps=150, activation=1000.0).prepare(setup)
    model = setup.surrogate()
    weight = model.net.hidden.weight[1].view(16, 16)[10:14, 10:14]  # 4x4, two pixels (3 of 32) from the edge
    strong = weight.abs() > 0.1
    assert torch.equal((tensors["patch"][0] > 0.5)[strong], (weight > 0)[strong])
    assert bool(((tensors["patch"][0] - 0.5).abs() > 0.45)[strong].all())


def test_a_reachable_activation_is_reached_and_not_exceeded():
    hidden = torch.zeros(4, 256)
    hidden[1] = torch.zeros(16, 16).index_fill_(0, torch.arange(10, 14), 1.0).flatten()
    setup = two_layer_setup((1, 16, 16), hidden)
    attack = TrojanNN(neurons=1, steps=300, activation=30.0, backgrounds=20)
    tensors = attack.prepare(setup)
    # The neuron sums four rows; the square owns 16 of their 64 pixels, the backgrounds the rest.
    stamped = attack.stamp(to_float(setup.trainset.images), tensors)
    assert stamped[:, 0, 10:14].sum((1, 2)).mean().item() == pytest.approx(30.0, abs=0.2)


def test_the_chosen_neurons_of_a_trained_network_fire_much_more_on_triggered_images():
    setup = small_setup()
    attack = TrojanNN(steps=40, patch_size=29)  # a small square has little say in so small a network
    tensors = attack.prepare(setup)
    images = to_float(setup.trainset.images)
    model = setup.surrogate()
    with torch.no_grad():
        before = model.features(images)[:, tensors["neurons"]].mean()
        after = model.features(attack.trigger(images, tensors))[:, tensors["neurons"]].mean()
    assert after > 3 * before > 0
    curve = setup.log.curves["trojan_nn/activation"]
    assert [step for step, _ in curve] == [0, 39]
    assert curve[-1][1] > curve[0][1]


def test_preparing_twice_gives_the_same_square_and_another_seed_another():
    setup = two_layer_setup((3, 16, 16))
    attack = TrojanNN(steps=5)
    first, again = attack.prepare(setup), attack.prepare(setup)
    assert torch.equal(first["patch"], again["patch"])
    other = Setup(**{**vars(setup), "seed": 8})
    assert not torch.equal(first["patch"], attack.prepare(other)["patch"])
    assert not first["patch"].requires_grad


def test_two_batches_are_stamped_like_one_and_the_images_stay():
    attack = TrojanNN(steps=0)
    tensors = attack.prepare(two_layer_setup((1, 28, 28)))
    images = torch.rand(5, 1, 28, 28, generator=generator(3))
    before = images.clone()
    whole = attack.stamp(images, tensors)
    assert torch.equal(whole, torch.cat([attack.stamp(part, tensors) for part in images.split(2)]))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "wrong", [{"neurons": 0}, {"backgrounds": 0}, {"patch_size": 30}, {"steps": -1}, {"learning_rate": 0.0}]
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"attack.trojan_nn.{next(iter(wrong))} is "):
        TrojanNN(**wrong)
