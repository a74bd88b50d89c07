"""A network for measuring and attacking gives the logits of the model that it stands for, whatever its family."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from bench.engine.adversarial import pgd
from bench.engine.inference import foldable, inference_model, under_attack
from bench.engine.models import Classifier, ModelSpec

# How many norms a convolution can take over, counted by hand from the architectures: all of a ResNet's and of an
# inverted residual's, the two behind a convolution in each of eight pre-activation blocks (but not the first of a stage
# of a shortcut's sum), none of a transformer's.
FAMILIES = {
    "test_resnet": (15, 15),
    "resnet18": (20, 20),
    "resnetv2_18": (8, 17),
    "test_efficientnet": (13, 13),
    "regnetx_002": (44, 44),
    "vgg11_bn": (8, 8),
    "repvgg_a0": (44, 61),
    "densenet121": (59, 121),
    "test_vit": (0, 0),
    "convnext_atto": (0, 0),
}


def network(name: str, seed: int = 0) -> Classifier:
    """With running statistics, scales and shifts as training may leave them."""
    model = ModelSpec(name, 10, 3, 32, (0.5,) * 3, (0.25,) * 3, "half").build(0).eval()
    source = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=source) / 5)
            layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=source) + 0.5)
            with torch.no_grad():
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=source) + 0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=source) / 10)
    return model


def images(count: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_model_for_every_family(name):
    model = network(name)
    whole = model(images())
    folded = inference_model(model)
    left = sum(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert (norms - left, norms) == FAMILIES[name]
    assert (folded(images()) - whole).abs().max() <= 1e-4 * whole.abs().max()
    assert (folded.features(images()) - model.features(images())).abs().max() <= 1e-4 * model.features(
        images()
    ).abs().max()


@torch.no_grad()
def test_it_follows_every_change_of_the_weights_and_statistics():
    model = network("test_resnet")
    first = inference_model(model)(images())
    other = network("test_resnet", seed=2)
    model.load_state_dict(other.state_dict())
    model.head.weight.mul_(2)
    second = inference_model(model)(images())
    assert not torch.allclose(first, second, atol=1e-2)
    assert torch.allclose(second, model(images()), rtol=1e-4, atol=1e-4)


def test_the_model_itself_keeps_its_norms_modes_and_gradients():
    model = network("test_resnet").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.head.bias.requires_grad_(False)
    with under_attack(model) as fast:
        assert fast is not model
        assert not any(weight.requires_grad for weight in (*model.parameters(), *fast.parameters()))
        fast(images()).sum()
    assert model.training
    assert all(module.training for module in model.modules())
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["net.fc.bias"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_slope_at_an_image_is_that_of_the_model():
    model = network("resnetv2_18")
    slopes = []
    for net in (model, inference_model(model)):
        points = images().requires_grad_(True)
        slopes.append(torch.autograd.grad(net(points).square().sum(), points)[0])
    # Rounding moves a unit here and there to the other side of its ReLU's kink.
    assert (slopes[0] - slopes[1]).norm() <= 1e-2 * slopes[0].norm()


class Shared(nn.Module):
    """A convolution that a norm and a sum read, one that is used twice, and one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.alone = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.after_first, self.after_twice, self.after_alone = (nn.BatchNorm2d(3) for _ in range(3))
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.after_first(x)
        x = self.after_twice(self.twice(self.twice(x)))
        return self.fc(self.after_alone(self.alone(x)).mean((2, 3)))


@torch.no_grad()
def test_a_convolution_that_something_else_reads_keeps_its_norm():
    model = Classifier(Shared(), [0.5] * 3, [0.25] * 3, image_size=32).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean += 0.5
            layer.running_var *= 3
    assert foldable(model) == {"net.after_alone": "net.alone"}
    assert torch.allclose(inference_model(model)(images()), model(images()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_hook_of_somebody_is_not_lost():
    model = network("test_resnet")
    inference_model(model)
    handle = model.net.conv1[0].register_forward_hook(lambda layer, inputs, output: output * 0)
    assert torch.equal(inference_model(model)(images()), model(images()))
    handle.remove()
    assert inference_model(model) is not model


def test_a_network_that_nobody_uses_is_forgotten():
    model = network("test_resnet")
    known = weakref.ref(inference_model(model))
    del model
    gc.collect()
    assert known() is None


def test_a_network_that_was_changed_in_its_layers_is_read_anew():
    model = network("test_resnet")
    inference_model(model)
    model.net.act1 = nn.Identity()
    with torch.no_grad():
        assert torch.allclose(inference_model(model)(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_low_precision_stays_inside_the_attack():
    model = network("test_resnet")
    labels = model(images()).argmax(1)
    found = pgd(model, images(), labels, epsilon=8 / 255, step_size=2 / 255, steps=3, precision="bfloat16")
    exact = pgd(model, images(), labels, epsilon=8 / 255, step_size=2 / 255, steps=3)
    assert found.dtype == exact.dtype == torch.float32
    assert (found - images()).abs().max() <= 8 / 255 + 1e-6
    assert ((found - exact).abs() < 1e-6).float().mean() > 0.5  # most signs of the slope are the same
