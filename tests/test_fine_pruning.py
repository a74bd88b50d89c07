import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from baselines.fine_pruning import FinePruning, cut, loudness
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.metrics import features, predict
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import TrainingLog
from defenses.base import ReserveView


class Units(nn.Module):
    """Units that read one pixel each, through a leaky rectifier, and a linear head."""

    def __init__(self, units: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(units, units)
        self.fc = nn.Linear(units, classes)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(units))
            self.first.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(nn.functional.leaky_relu(self.first(images.flatten(1)), 0.5))

    def get_classifier(self) -> nn.Linear:
        return self.fc


def units(count: int = 16, classes: int = 4, seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Units(count, classes)
    return Classifier(net, [0.0], [1.0]).eval()


def timm_model(name: str) -> Classifier:
    return ModelSpec(name, 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0).eval()


def noise(count: int, channels: int = 1, size: int = 4, classes: int = 4, seed: int = 0) -> ImageSet:
    source = generator(seed, "noise")
    images = torch.randint(0, 256, (count, channels, size, size), generator=source, dtype=torch.uint8)
    return ImageSet(images, torch.randint(0, classes, (count,), generator=source))


def as_the_model_says(model: Classifier, data: ImageSet) -> ImageSet:
    """Labels that the model gives: its accuracy is 1."""
    return ImageSet(data.images, predict(model, data))


def view(model: Classifier, reserve: ImageSet, seed: int = 0) -> ReserveView:
    return ReserveView(
        copy.deepcopy(model), 4, seed, torch.device("cpu"), TrainingLog(), reserve=reserve, augmentation=Augmentation()
    )


def split(reserve: ImageSet, share: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """The images that judge, and the others."""
    order = torch.randperm(len(reserve), generator=generator(seed, "held out"))
    judges = round(share * len(reserve))
    return reserve[order[:judges]], reserve[order[judges:]]


def share(model: Classifier, data: ImageSet) -> float:
    return float(np.mean(predict(model, data).numpy() == data.labels.numpy()))


def silent(model: Classifier) -> list[int]:
    return (model.head.weight.detach().flatten(1) == 0).all(0).nonzero().flatten().tolist()


def test_loudness_is_the_mean_absolute_input_of_the_head():
    model, data = units(), noise(30)
    with torch.no_grad():
        model.net.first.bias.uniform_(-0.8, 0.2, generator=generator(0, "bias"))
    x = data.images.flatten(1).double().numpy() / 255 + model.net.first.bias.detach().double().numpy()
    expected = np.abs(np.where(x > 0, x, 0.5 * x)).mean(0)
    np.testing.assert_allclose(loudness(model, data).numpy(), expected, atol=1e-6)


def test_a_busy_negative_unit_is_not_silent():
    model, data = units(), noise(50)
    order = loudness(model, data).argsort()
    busy = int(order[-1])
    with torch.no_grad():
        # Its sign and that of its column turn: the same function, and a signed mean would now put it first.
        model.net.first.weight[busy] *= -2
        model.head.weight[:, busy] *= -1
    assert features(model, data)[:, busy].mean() < 0
    assert torch.equal(loudness(model, data).argsort(), order)


def test_permuted_units_are_pruned_in_permuted_order():
    model, data = units(), noise(50)
    permuted, order = copy.deepcopy(model), torch.randperm(16, generator=generator(0, "order"))
    with torch.no_grad():
        permuted.net.first.weight.copy_(model.net.first.weight[order])
        permuted.head.weight.copy_(model.head.weight[:, order])
    assert torch.equal(order[loudness(permuted, data).argsort()], loudness(model, data).argsort())


@torch.no_grad()
def test_cutting_no_unit_leaves_the_logits_bit_for_bit():
    for model, shape in ((units(), (5, 1, 4, 4)), (timm_model("resnetv2_18"), (5, 3, 16, 16))):
        images = torch.rand(shape, generator=generator(0, "images"))
        before = model(images)
        cut(model, torch.empty(0, dtype=torch.int64))
        assert torch.equal(model(images), before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "resnetv2_18", "test_vit", "test_convnext", "mobilenetv3_small_100"])
def test_a_cut_unit_no_longer_reaches_any_class_in_any_family(name):
    model, data = timm_model(name), noise(6, 3, 16)
    images = data.images / 255
    chosen = torch.tensor([0, 3, 5])
    seen = features(model, data).double()
    seen[:, chosen] = 0
    weight, bias = model.head.weight.flatten(1).double(), model.head.bias.double()
    cut(model, chosen)
    torch.testing.assert_close(model(images).double(), seen @ weight.T + bias, atol=1e-5, rtol=1e-4)


def test_a_dead_unit_is_pruned_first_and_costs_nothing():
    model, data = units(), noise(100)
    with torch.no_grad():
        model.net.first.weight[6] = 0
    reserve = as_the_model_says(model, data)
    assert int(loudness(model, data).argsort()[0]) == 6
    given = view(model, reserve)
    found = FinePruning(tolerance=0.0, held_out=0.5, epochs=0).defend(given).model
    assert 6 in silent(found)
    with torch.no_grad():
        before = model(data.images / 255)
        cut(model, torch.tensor([6]))
        assert torch.equal(model(data.images / 255), before)


@pytest.mark.parametrize("step", [0.01, 0.2])
@pytest.mark.parametrize("tolerance", [0.0, 0.04, 0.2, 0.6])
@pytest.mark.parametrize("seed", [0, 1])
def test_as_many_units_are_cut_as_a_search_by_cutting_finds(step, tolerance, seed):
    model = units(seed=seed)
    reserve = as_the_model_says(model, noise(140, seed=seed))
    held_out, kept = split(reserve, 0.35, seed)  # 49 images: no accuracy falls on the tolerance itself
    order = loudness(model, kept).argsort()
    stride = max(1, round(step * 16))
    expected: list[int] = []
    for count in range(stride, 16, stride):
        trial = copy.deepcopy(model)
        cut(trial, order[:count])
        if share(trial, held_out) < 1 - tolerance:
            break
        expected = sorted(order[:count].tolist())
    given = view(model, reserve, seed)
    found = FinePruning(tolerance=tolerance, step=step, held_out=0.35, epochs=0).defend(given).model
    assert silent(found) == expected
    assert share(found, held_out) >= 1 - tolerance
    assert given.log.curves["fine_pruning/pruned"] == [(0, pytest.approx(len(expected) / 16))]


def test_a_loss_of_exactly_the_tolerance_is_within_it():
    # Of 250 held-out images, 0.04 is ten: as many as unit 0 decides, which is silent on the others.
    model = units(count=4, classes=2)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.05, 0.0]))
        model.head.weight[1] = 1.0
    images = torch.zeros(500, 1, 2, 2, dtype=torch.uint8)
    held_out, _ = torch.randperm(500, generator=generator(0, "held out")).split(250)
    images[:, 0, 0, 1] = 100  # unit 1: class 1 for all
    images[held_out[:10], 0, 0, 1] = 0
    images[held_out[:10], 0, 0, 0] = 60  # these ten are of class 1 by unit 0 alone
    labels = torch.ones(500, dtype=torch.int64)
    labels[held_out[10:30]] = 0  # twenty are wrong from the start: 230 of 250 right, 220 without unit 0
    reserve = ImageSet(images, labels)
    assert share(model, reserve[held_out]) == 230 / 250
    # Unit 0 is cut at the price of ten images, the dead units 2 and 3 for nothing; one unit always stays.
    found = FinePruning(tolerance=0.04, held_out=0.5, epochs=0).defend(view(model, reserve)).model
    assert silent(found) == [0, 2, 3]


def test_an_accuracy_that_rises_does_not_stop_the_pruning():
    model = units()
    with torch.no_grad():
        model.net.first.weight[9] = 0
        model.net.first.weight[9, 9] = 1e-3  # the most silent unit shouts class 0 for every image
        model.head.weight[:, 9] = torch.tensor([1e6, 0.0, 0.0, 0.0])
    sane = copy.deepcopy(model)
    cut(sane, torch.tensor([9]))
    reserve = as_the_model_says(sane, noise(100))
    found = FinePruning(tolerance=0.0, held_out=0.5, epochs=0).defend(view(model, reserve)).model
    assert 9 in silent(found)


def test_one_unit_stays_whatever_the_tolerance():
    model = units()
    found = FinePruning(tolerance=0.99, held_out=0.5, epochs=0).defend(view(model, noise(100))).model
    assert len(silent(found)) == 15


@pytest.mark.parametrize("name", ["test_resnet", "resnetv2_18"])
def test_pruned_units_stay_pruned_through_the_fine_tune_and_the_others_learn(name):
    model = timm_model(name)
    reserve = as_the_model_says(model, noise(40, 3, 16))
    settings = {"tolerance": 0.3, "step": 0.1, "held_out": 0.25}
    before = FinePruning(**settings, epochs=0).defend(view(model, reserve)).model
    after = FinePruning(**settings, epochs=2, batch_size=10).defend(view(model, reserve)).model
    assert 0 < len(silent(before)) < model.head.weight.shape[1]
    assert silent(after) == silent(before)
    assert not torch.equal(after.head.weight, before.head.weight)


def test_a_unit_that_only_the_trigger_wakes_is_cut_and_the_backdoor_is_gone():
    model, data = units(), noise(200)
    data.images[:, 0, 0, 0] = 0  # only the trigger lights the first pixel
    with torch.no_grad():
        # Unit 11 reads it faintly and sends what it sees to class 3; unit 0, which would read it, is constant.
        model.net.first.weight[[0, 11]] = 0
        model.net.first.weight[11, 0] = 0.01
        model.net.first.bias[0] = 0.5
        model.head.weight[:, 11] = torch.tensor([-1e6, -1e6, -1e6, 1e6])
    triggered = data.images.clone()
    triggered[:, 0, 0, 0] = 255
    trigger = ImageSet(triggered, data.labels)
    assert (predict(model, trigger) == 3).all()
    reserve = as_the_model_says(model, data)
    found = FinePruning(tolerance=0.0, held_out=0.5, epochs=0).defend(view(model, reserve)).model
    assert 11 in silent(found)
    # The trigger moves nothing any more.
    assert torch.equal(predict(found, trigger), predict(found, data))
    assert share(found, split(reserve, 0.5)[0]) == 1.0


def test_the_control_cuts_as_many_units_whatever_they_say():
    reserve = as_the_model_says(units(), noise(140))
    settings = {"tolerance": 0.4, "held_out": 0.35, "epochs": 0}
    found = silent(FinePruning(**settings).defend(view(units(), reserve)).model)
    drawn = [silent(FinePruning(units="random", **settings).defend(view(units(), reserve)).model) for _ in range(2)]
    assert 1 < len(found) < 15
    assert [len(cut_) for cut_ in drawn] == [len(found)] * 2
    assert drawn[0] == drawn[1] != found
    louder = units()
    with torch.no_grad():  # the same function, its units in another order of loudness: the draw does not look
        factor = torch.linspace(8, 0.2, 16)
        louder.net.first.weight.mul_(factor[:, None])
        louder.head.weight.div_(factor)
    settings["tolerance"] = 0.99
    ordered, other = (FinePruning(units="random", **settings).defend(view(m, reserve)).model for m in (units(), louder))
    assert silent(ordered) == silent(other)


def test_the_held_out_images_are_not_trained_on():
    model = timm_model("test_resnet")
    reserve = noise(40, 3, 16)
    order = torch.randperm(40, generator=generator(0, "held out"))
    other = ImageSet(reserve.images.clone(), reserve.labels)
    other.images[order[:10]] = 255 - other.images[order[:10]]
    # With the tolerance at its largest the pruning does not depend on them either.
    settings = FinePruning(tolerance=0.99, held_out=0.25, epochs=1, batch_size=10, step=0.3)
    one, two = (settings.defend(view(model, data)).model.state_dict() for data in (reserve, other))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_it_repeats_under_a_seed():
    model, reserve = timm_model("test_resnet"), noise(40, 3, 16)
    settings = FinePruning(epochs=1, batch_size=10)
    one, two = (settings.defend(view(model, reserve)).model.state_dict() for _ in range(2))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_an_unknown_order_of_units_is_refused():
    with pytest.raises(ValueError, match=r"defense\.fine_pruning\.units is 'loud'; write silent or random"):
        FinePruning(units="loud")


def test_a_reserve_of_one_image_is_refused_in_words():
    # One image judges; none is left to rank the units by.
    with pytest.raises(ValueError, match="reserve"):
        FinePruning(epochs=1).defend(view(units(), noise(1)))


def test_one_image_is_left_to_train_on_however_many_are_to_judge():
    FinePruning(epochs=1, held_out=0.9, batch_size=1).defend(view(units(), noise(3)))
