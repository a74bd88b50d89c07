import copy

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from baselines.bnp import BatchNormStatisticsPruning, divergence, moments
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import TrainingLog
from defenses.base import NotApplicable, ReserveView


def timm_model(name: str) -> Classifier:
    return ModelSpec(name, 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0).eval()


def noise(count: int, channels: int = 3, size: int = 16, seed: int = 0) -> ImageSet:
    source = generator(seed, "noise")
    images = torch.randint(0, 256, (count, channels, size, size), generator=source, dtype=torch.uint8)
    return ImageSet(images, torch.randint(0, 4, (count,), generator=source))


def view(model: Classifier, reserve: ImageSet) -> ReserveView:
    return ReserveView(
        copy.deepcopy(model), 4, 0, torch.device("cpu"), TrainingLog(), reserve=reserve, augmentation=Augmentation()
    )


def one_layer(channels: int = 20) -> Classifier:
    """Norm of a 1x1 convolution of single-channel images: what the norm reads is known in closed form."""
    net = nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(channels * 16, 2))
    source = generator(0, "layer")
    with torch.no_grad():
        net[0].weight.normal_(0, 1, generator=source)
        net[0].bias.normal_(0, 1, generator=source)
        net[1].running_mean.normal_(0, 1, generator=source)
        net[1].running_var.uniform_(0.5, 2.0, generator=source)
        net[1].bias.fill_(0.3)
    return Classifier(net, [0.0], [1.0], image_size=4).eval()


def read_by_the_norm(model: Classifier, data: ImageSet) -> np.ndarray:
    """(C, values) float64."""
    pixels = data.images.double().flatten().numpy() / 255
    weight = model.net[0].weight.detach().double().flatten().numpy()
    return weight[:, None] * pixels + model.net[0].bias.detach().double().numpy()[:, None]


@pytest.mark.parametrize("count", [2, 100, 300])
def test_moments_are_those_of_all_values_that_the_layer_reads(count):
    model, data = one_layer(), noise(count, 1, 4)
    ((mean, variance),) = moments(model, model.norms(), data)
    values = read_by_the_norm(model, data)
    np.testing.assert_allclose(mean.numpy(), values.mean(1), atol=1e-5)
    np.testing.assert_allclose(variance.numpy(), values.var(1, ddof=1), rtol=1e-4)


def test_moments_of_a_deep_network_are_those_that_train_mode_would_store():
    model, data = timm_model("test_resnet"), noise(60)
    first = model.norms()[0]
    (mean, variance), *_ = moments(model, model.norms(), data)
    with torch.no_grad():
        first.layer.momentum = 1.0
        first.layer.train()
        model(data.images / 255)
    torch.testing.assert_close(mean.float(), first.layer.running_mean, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(variance.float(), first.layer.running_var, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("clean", "stored"), [((0.0, 1.0), (0.0, 1.0)), ((0.5, 2.0), (-0.3, 0.7)), ((2, 0.1), (0, 3))])
def test_the_divergence_is_that_of_the_clean_gaussian_from_the_stored_one(clean, stored):
    norm = one_layer(1).norms()[0]
    norm.layer.eps = 0.0
    norm.layer.running_mean.fill_(stored[0])
    norm.layer.running_var.fill_(stored[1])
    p, q = (stats.norm(mean, np.sqrt(variance)) for mean, variance in (clean, stored))
    by_integral, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -30, 30, points=[clean[0]])
    found = divergence(
        torch.tensor([clean[0]], dtype=torch.float64), torch.tensor([clean[1]], dtype=torch.float64), norm
    )
    assert found.item() == pytest.approx(by_integral, abs=1e-6)


@pytest.mark.parametrize("u", [0.5, 1.0, 3.0])
def test_outliers_of_a_layer_lose_the_scale_and_keep_the_shift(u):
    model, data = one_layer(), noise(50, 1, 4)
    model.net[1].running_mean[4] = 30.0
    values = read_by_the_norm(model, data)
    layer = model.net[1]
    clean = values.var(1, ddof=1) + layer.eps
    stored = layer.running_var.double().numpy() + layer.eps
    gap = (values.mean(1) - layer.running_mean.double().numpy()) ** 2
    kl = np.log(np.sqrt(stored / clean)) + (clean + gap) / (2 * stored) - 0.5
    expected = kl > kl.mean() + u * kl.std(ddof=1)
    assert expected[4]
    found = BatchNormStatisticsPruning(u=u).defend(view(model, data)).model
    np.testing.assert_array_equal(found.net[1].weight.detach().numpy() == 0, expected)
    for key, value in model.state_dict().items():
        if key != "net.1.weight":
            assert torch.equal(found.state_dict()[key], value), key


def test_all_layers_are_judged_on_the_network_as_it_came():
    # Pruning a layer changes what the next one reads; the statistics are of one forward of the whole network.
    model, data = timm_model("test_efficientnet"), noise(40)
    eligible = moments(model, model.norms(), data)
    found = BatchNormStatisticsPruning(u=0.5).defend(view(model, data)).model
    for before, behind, (mean, variance) in zip(model.norms(), found.norms(), eligible, strict=True):
        kl = divergence(mean, variance, before)
        assert torch.equal(behind.layer.weight == 0, kl > kl.mean() + 0.5 * kl.std())


def test_a_dead_channel_does_not_hide_the_others():
    model, data = one_layer(), noise(50, 1, 4)
    model.net[1].running_mean[4] = 3000.0
    with torch.no_grad():
        model.net[0].weight[9] = 0  # its variance is zero: without the layer's epsilon, the divergence is infinite
    found = BatchNormStatisticsPruning().defend(view(model, data)).model
    assert (found.net[1].weight == 0).nonzero().flatten().tolist() == [4]


def test_only_as_many_images_are_looked_at_as_the_paper_takes():
    model, data = one_layer(), noise(600, 1, 4)
    other = ImageSet(data.images.clone(), data.labels)
    other.images[500:] = 255
    one, two = (BatchNormStatisticsPruning(u=0.2).defend(view(model, part)).model for part in (data, other))
    assert torch.equal(one.net[1].weight, two.net[1].weight)
    other.images[250:] = 255
    three = BatchNormStatisticsPruning(u=0.2).defend(view(model, other)).model
    assert not torch.equal(one.net[1].weight, three.net[1].weight)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_layer_norms_store_no_statistics_to_contradict(name):
    with pytest.raises(NotApplicable, match="running statistics"):
        BatchNormStatisticsPruning().defend(view(timm_model(name), noise(4)))
