import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from baselines.clp import ChannelLipschitznessPruning, lipschitz, outliers
from bench.engine.data import generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import TrainingLog
from defenses.base import DefenderView, NotApplicable, views_of


def timm_model(name: str) -> Classifier:
    model = ModelSpec(name, 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0).eval()
    source = generator(0, "stir")
    with torch.no_grad():
        for norm in model.norms():
            norm.layer.weight.copy_(torch.randn(norm.layer.weight.shape, generator=source))
            norm.layer.bias.copy_(torch.randn(norm.layer.bias.shape, generator=source))
            if norm.has_statistics:
                norm.layer.running_var.uniform_(0.2, 3.0, generator=source)
    return model


def view(model: Classifier) -> DefenderView:
    return DefenderView(copy.deepcopy(model), 4, 0, torch.device("cpu"), TrainingLog())


def of_scores(scores: list[float]) -> Classifier:
    """A network whose one layer has these Lipschitz proxies: 1x1 kernels of known size, unit variance."""
    net = nn.Sequential(
        nn.Conv2d(1, len(scores), 1),
        nn.BatchNorm2d(len(scores), eps=1e-12),
        nn.Flatten(),
        nn.Linear(len(scores) * 16, 2),
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(scores).view(-1, 1, 1, 1))
        net[1].bias.fill_(0.5)
    return Classifier(net, [0.0], [1.0], image_size=4).eval()


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18", "test_efficientnet"])
def test_the_proxy_is_the_largest_singular_value_of_the_folded_kernel(name):
    model = timm_model(name)
    pairs = [norm for norm in model.norms() if norm.convolution is not None]
    for norm in [pairs[0], pairs[3], pairs[-1]]:
        conv, layer = norm.convolution, norm.layer
        found = lipschitz(norm).numpy()
        fold = layer.weight.detach().abs().numpy() / np.sqrt(layer.running_var.numpy() + layer.eps)
        for channel in range(0, conv.out_channels, 7):
            kernel = conv.weight[channel].detach().reshape(conv.in_channels // conv.groups, -1).numpy()
            expected = np.linalg.svd(kernel.astype(np.float64), compute_uv=False)[0] * fold[channel]
            assert found[channel] == pytest.approx(expected, rel=1e-5)


def test_a_depthwise_kernel_has_its_norm_as_the_proxy():
    model = timm_model("test_efficientnet")
    norm = next(norm for norm in model.norms() if norm.convolution.groups > 1)
    kernel = norm.convolution.weight.detach().double().flatten(1).numpy()
    fold = norm.layer.weight.detach().abs().numpy() / np.sqrt(norm.layer.running_var.numpy() + norm.layer.eps)
    np.testing.assert_allclose(lipschitz(norm).numpy(), np.linalg.norm(kernel, axis=1) * fold, rtol=1e-5)


@pytest.mark.parametrize("channels", [4, 10, 11, 40])
def test_ten_channels_cannot_lose_one_at_three_deviations_and_eleven_can(channels):
    # The largest z-score of n numbers is (n - 1) / sqrt(n): 2.85 for ten, 3.02 for eleven.
    scores = torch.ones(channels, dtype=torch.float64)
    scores[2] = 1e6
    z = ((scores - scores.mean()) / scores.std()).max().item()
    assert z == pytest.approx((channels - 1) / math.sqrt(channels))
    assert outliers(scores, 3.0).any() == (channels > 10)
    pruned = ChannelLipschitznessPruning().defend(view(of_scores(scores.tolist()))).model.net[1].weight
    assert (pruned == 0).nonzero().flatten().tolist() == ([2] if channels > 10 else [])


@pytest.mark.parametrize("u", [0.5, 1.0, 2.0, 3.0])
def test_channels_above_mean_plus_u_unbiased_deviations_lose_scale_and_shift(u):
    scores = np.abs(np.random.default_rng(0).standard_normal(40)) + 0.1
    expected = scores > scores.mean() + u * scores.std(ddof=1)
    model = of_scores(scores.tolist())
    found = ChannelLipschitznessPruning(u=u).defend(view(model)).model
    np.testing.assert_array_equal(found.net[1].weight.detach().numpy() == 0, expected)
    np.testing.assert_array_equal(found.net[1].bias.detach().numpy() == 0, expected)
    for index in (0, 3):
        assert torch.equal(found.net[index].weight, model.net[index].weight)
    assert 0 < expected.sum() < 20 or u == 3.0


def test_in_a_pre_activation_network_the_scores_are_of_the_convolution_that_feeds_the_norm():
    model = timm_model("resnetv2_18")
    block = model.net.stages[1].blocks[1]
    with torch.no_grad():
        # One loud kernel in front of norm2; in the order of the code conv2 would be paired with the next norm1.
        block.conv1.weight[5] *= 100
        block.conv2.weight[7] *= 100
    found = ChannelLipschitznessPruning().defend(view(model)).model
    repaired = found.net.stages[1].blocks[1]
    assert repaired.norm2.weight[5] == repaired.norm2.bias[5] == 0
    behind = found.net.stages[2].blocks[0].norm1  # it reads a sum, not conv2
    assert torch.equal(behind.weight, model.net.stages[2].blocks[0].norm1.weight)


def test_a_shortcut_is_judged_by_its_own_convolution():
    model = timm_model("resnet18")
    with torch.no_grad():
        model.net.layer2[0].downsample[0].weight[9] *= 100
    found = ChannelLipschitznessPruning().defend(view(model)).model
    assert (found.net.layer2[0].downsample[1].weight == 0).nonzero().flatten().tolist()[:1] == [9]
    assert found.net.layer2[0].bn2.weight[9] != 0


def test_the_curve_over_u_is_the_share_that_each_u_would_prune():
    scores = np.abs(np.random.default_rng(1).standard_normal(40)) + 0.1
    given = view(of_scores(scores.tolist()))
    ChannelLipschitznessPruning().defend(given)
    for tenths, value in given.log.curves["clp/pruned_by_10u"]:
        assert value == pytest.approx((scores > scores.mean() + tenths / 10 * scores.std(ddof=1)).mean())


def test_it_needs_no_image():
    assert views_of(ChannelLipschitznessPruning) == (DefenderView,)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_layer_norms_have_no_variance_to_fold(name):
    with pytest.raises(NotApplicable, match="no batch norm follows a convolution"):
        ChannelLipschitznessPruning().defend(view(timm_model(name)))
