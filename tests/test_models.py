import functools
import itertools
import sys

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from bench.engine.adversarial import pgd
from bench.engine.data import ImageSet, generator
from bench.engine.errors import UserError
from bench.engine.metrics import predict
from bench.engine.models import Classifier, ModelSpec, check_name
from bench.experiment.experiment import load_experiment

MEAN, STD = (0.2, 0.45, 0.7), (0.15, 0.25, 0.35)

# With the small stem at 32x32: weights in millions (10 classes, 3 channels), and what the family's feature extractor
# returns: maps as (C, H, W), tokens as (T, C), Swin's as (H, W, C).
FAMILIES = {
    "resnet18": (11.17, (512, 4, 4)),
    "resnetv2_18": (11.17, (512, 4, 4)),
    "vgg16_bn": (14.73, (512, 1, 1)),
    "densenet121": (6.96, (1024, 4, 4)),
    "mobilenetv3_small_100": (1.53, (576, 2, 2)),
    "efficientnet_b0": (4.02, (1280, 2, 2)),
    "convnext_atto": (3.38, (320, 4, 4)),
    "vit_tiny_patch16_224": (5.36, (65, 192)),
    "swin_tiny_patch4_window7_224": (27.5, (2, 2, 768)),
    "test_resnet": (0.37, (96, 4, 4)),
    "test_efficientnet": (0.10, (256, 2, 2)),
    "test_convnext": (0.21, (64, 4, 4)),
    "test_vit": (0.26, (65, 64)),
}
# The last stage as (C, H, W), where it is not what the extractor returns.
LAST_STAGE = {
    "efficientnet_b0": (320, 2, 2),  # before its last convolution
    "test_efficientnet": (64, 2, 2),
    "vit_tiny_patch16_224": (192, 8, 8),  # no class token
    "test_vit": (64, 8, 8),
    "swin_tiny_patch4_window7_224": (768, 2, 2),
}
# Creating timm's own 120 M weight head of a VGG takes seconds.
BOTH = [
    pytest.param(name, channels, marks=[pytest.mark.slow] if name == "vgg16_bn" and channels == 1 else [])
    for name in FAMILIES
    for channels in (1, 3)
]
LIGHT = ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "resnetv2_18", "mobilenetv3_small_100"]


def spec(name: str, channels: int = 3, size: int = 32, stem: str = "small", classes: int = 10) -> ModelSpec:
    return ModelSpec(name, classes, channels, size, MEAN[:channels], STD[:channels], stem)


@functools.cache
def built(name: str, channels: int = 3) -> Classifier:
    return spec(name, channels).build(0).eval()


def images(channels: int = 3, size: int = 32, count: int = 2) -> Tensor:
    return torch.rand(count, channels, size, size, generator=generator(0, channels, size))


def head_by_hand(model: Classifier, features: Tensor) -> Tensor:
    weight = model.head.weight.detach().double().flatten(1)
    return features.double() @ weight.T + model.head.bias.detach().double()


@torch.no_grad()
@pytest.mark.parametrize(("name", "channels"), BOTH)
def test_every_family_gives_logits_for_grey_and_colour(name, channels):
    logits = built(name, channels)(images(channels))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


@torch.no_grad()
@pytest.mark.parametrize(("name", "channels"), BOTH)
def test_the_head_applied_to_the_features_is_the_logits(name, channels):
    model = built(name, channels)
    features = model.features(images(channels))
    assert features.ndim == 2
    torch.testing.assert_close(head_by_hand(model, features), model(images(channels)).double(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "channels"), BOTH)
def test_normalising_inside_equals_normalising_outside_each_channel_by_its_own(name, channels):
    model, pictures = built(name, channels), images(channels)
    outside = np.stack([(pictures[:, c].numpy() - MEAN[c]) / STD[c] for c in range(channels)], axis=1)
    torch.testing.assert_close(model(pictures), model.net(torch.from_numpy(outside).float()), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "channels"), BOTH)
def test_stages_are_maps_with_channels_first_that_do_not_grow(name, channels):
    maps = built(name, channels).stages(images(channels))
    assert len(maps) >= 4
    assert all(stage.ndim == 4 and len(stage) == 2 and stage.shape[2] == stage.shape[3] for stage in maps)
    sides = [stage.shape[-1] for stage in maps]
    assert sides == sorted(sides, reverse=True)
    assert tuple(maps[-1].shape[1:]) == LAST_STAGE.get(name, FAMILIES[name][1])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_small_stem_keeps_maps_of_the_documented_size(name):
    million, shape = FAMILIES[name]
    model = built(name)
    assert tuple(model.net.forward_features(images()).shape[1:]) == shape
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(million, abs=0.04)


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "stem", "side"),
    [(32, "small", 4), (32, "half", 2), (32, "stock", 1), (64, "small", 4), (16, "small", 2)],
)
@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18"])
def test_the_last_map_of_a_residual_network_is_as_large_as_its_strides_say(name, size, stem, side):
    # Three stages halve; a stock stem halves twice, without its pooling once, and the small one not (up to 48 pixels).
    model = spec(name, 3, size, stem).build(0).eval()
    assert model.net.forward_features(images(3, size)).shape == (2, 512, side, side)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize(("channels", "size"), [(1, 16), (1, 28), (3, 64)])
def test_the_small_stem_takes_other_image_sizes(name, channels, size):
    assert spec(name, channels, size).build(0).eval()(images(channels, size)).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("stem", ["half", "stock"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("size", [8, 28, 64])
def test_the_check_refuses_exactly_what_cannot_run(name, size, stem):
    try:
        spec(name, 1, size, stem).build(0).eval()(images(1, size))
        runs = True
    except (RuntimeError, AssertionError):
        runs = False
    try:
        spec(name, 1, size, stem).check()
        passes = True
    except ValueError:
        passes = False
    assert passes == runs


def test_a_network_with_two_heads_is_refused():
    with pytest.raises(ValueError, match="no single linear layer as its head"):
        spec("deit_tiny_distilled_patch16_224", 3, 32).check()


def test_the_stock_stem_is_as_timm_has_it():
    with torch.device("meta"):
        swin = spec("swin_tiny_patch4_window7_224", 3, 224, "stock").build(0)
        vit = spec("vit_tiny_patch16_224", 3, 224, "stock").build(0)
        resnet = spec("resnet18", 3, 224, "stock").build(0)
    assert tuple(resnet.net.conv1.weight.shape) == (64, 3, 7, 7)
    assert tuple(vit.net.patch_embed.proj.weight.shape) == (192, 3, 16, 16)
    assert tuple(swin.net.patch_embed.proj.weight.shape) == (96, 3, 4, 4)


@torch.no_grad()
@pytest.mark.parametrize(("size", "stem"), [(16, "small"), (28, "half"), (64, "small")])
def test_swin_fits_its_windows_to_the_image(size, stem):
    model = spec("swin_tiny_patch4_window7_224", 3, size, stem).build(0).eval()
    assert model(images(3, size)).shape == (2, 10)


@torch.no_grad()
@pytest.mark.parametrize(("stem", "side"), [("small", 8), ("half", 4)])
@pytest.mark.parametrize("size", [32, 64])
def test_a_transformer_cuts_every_image_size_into_as_many_patches(size, stem, side):
    maps = spec("test_vit", 3, size, stem).build(0).eval().stages(images(3, size))
    assert {tuple(stage.shape[-2:]) for stage in maps} == {(side, side)}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("vgg16_bn", "resnet18")])
def test_every_weight_takes_part_in_the_logits(name):
    # A layer that surgery left behind would be carried along, counted, pruned and never trained.
    model = spec(name).build(1).train()
    model(images(count=4)).square().sum().backward()
    assert [key for key, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("name", LIGHT)
def test_a_seed_gives_the_same_weights_and_another_seed_others(name):
    first, again, other = (spec(name).build(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    drawn = [key for key, value in first.items() if value.ndim >= 2 and key.startswith("net.") and value.std() > 0]
    assert len(drawn) > 5
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


@pytest.mark.parametrize("name", LIGHT)
def test_building_and_checking_leave_the_global_random_state_alone(name):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    spec(name).build(0)
    spec(name).check()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_global_random_state_does_not_reach_the_weights():
    torch.manual_seed(1)
    first = spec("test_resnet").build(0).state_dict()
    torch.manual_seed(2)
    assert all(torch.equal(value, first[key]) for key, value in spec("test_resnet").build(0).state_dict().items())


def test_a_stored_state_brings_back_the_network_with_its_normalisation():
    first, other = (
        spec("test_efficientnet").build(0).eval(),
        ModelSpec("test_efficientnet", 10, 3, 32, (0.0,) * 3, (1.0,) * 3),
    )
    second = other.build(1).eval()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(first(images()), second(images()))


def test_features_leave_no_hook_behind_and_keep_gradients():
    model, pictures = built("test_resnet"), images().requires_grad_(True)
    model.features(pictures).sum().backward()
    assert pictures.grad is not None
    assert not model.head._forward_pre_hooks


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_is_the_layer_that_makes_the_classes(name):
    head = built(name).head
    assert isinstance(head, nn.Linear | nn.Conv2d)
    assert head.weight.shape[0] == 10
    assert any(module is head for module in built(name).modules())


@pytest.mark.parametrize("classes", [2, 43, 200])
def test_the_number_of_classes_is_that_of_the_data_set(classes):
    assert spec("resnetv2_18", classes=classes).build(0).eval()(images()).shape == (2, classes)
    assert spec("test_vit", classes=classes).build(0).eval()(images()).shape == (2, classes)


def test_notes_say_how_the_network_was_fitted():
    assert built("resnet18").notes == ("conv1 3x3 stride 1 in place of 7x7", "maxpool removed")
    assert built("vit_tiny_patch16_224").notes == ("img_size=32", "patch_size=4")
    assert spec("resnet18", stem="stock").build(0).notes == ()


def test_an_unknown_architecture_is_answered_with_near_ones():
    for ask in (check_name, lambda name: spec(name).build(0), lambda name: spec(name).check()):
        with pytest.raises(LookupError, match=r"timm has no architecture named 'resnet1'\. Did you mean '.*resnet1"):
            ask("resnet1")


def test_an_unknown_stem_is_answered_with_the_three():
    with pytest.raises(ValueError, match=r"model\.stem is 'tiny'; write one of small, half, stock"):
        spec("test_resnet", stem="tiny").build(0)


@pytest.mark.parametrize(("name", "size"), [("vgg16_bn", 16), ("vgg16_bn", 28)])
def test_images_that_would_shrink_to_nothing_are_refused_before_any_compute(name, size):
    # Five poolings halve 31 pixels to less than one.
    with pytest.raises(ValueError, match=rf"{name}.*cannot take {size}x{size} images.*dataset\.size") as caught:
        spec(name, 3, size).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_can_take_32_pixels_pass_the_check(name):
    spec(name).check()


@pytest.mark.parametrize("name", ["mixer_s32_224", "test_coatnet"])
def test_an_architecture_that_cannot_be_fitted_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=f"{name}.*cannot take 32x32 images"):
        spec(name).check()


# Norm layers with scale and shift, their channels, and whether they store statistics: counted by hand from the
# papers' widths (ResNet-18: 64 in the stem, 4 layers of 64, 5 each of 128, 256 and 512 with the shortcut's).
NORMS = {
    "resnet18": (20, 64 + 4 * 64 + 5 * (128 + 256 + 512), True),
    "resnetv2_18": (17, 64 * 4 + 64 + 128 * 3 + 128 + 256 * 3 + 256 + 512 * 3 + 512, True),
    "vgg16_bn": (13, 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512, True),
    "efficientnet_b0": (49, 21008, True),
    "convnext_tiny": (23, 96 + (3 + 1) * 96 + (3 + 1) * 192 + (9 + 1) * 384 + 3 * 768 + 768, False),
    "vit_tiny_patch16_224": (25, 25 * 192, False),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_norm_layers_of_known_networks_are_as_many_as_their_papers_say(name):
    layers, units, statistics = NORMS[name]
    if name == "vgg16_bn":
        norms = built(name).norms()
    else:
        with torch.device("meta"):
            norms = spec(name).build(0).norms()
    assert len(norms) == layers
    assert sum(len(norm.layer.weight) for norm in norms) == units
    assert {norm.has_statistics for norm in norms} == {statistics}


@pytest.mark.parametrize(
    ("name", "channels"),
    [(name, channels) for name in [*LIGHT, "resnet18", "densenet121"] for channels in (1, 3)] + [("vgg16_bn", 3)],
)
def test_norm_layers_come_by_name_and_each_once(name, channels):
    model = built(name, channels)
    norms = model.norms()
    assert len({norm.name for norm in norms}) == len(norms) > 5
    for norm in norms:
        assert model.get_submodule(norm.name) is norm.layer
        assert norm.layer.weight.shape == norm.layer.bias.shape == (len(norm.layer.weight),)
        if norm.convolution is not None:
            assert norm.convolution.out_channels == len(norm.layer.weight)
    every = [
        key for key, m in model.named_modules() if "Norm" in type(m).__name__ and getattr(m, "weight", None) is not None
    ]
    assert {norm.name for norm in norms} == set(every)


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "mobilenetv3_small_100", "test_resnet"])
def test_where_each_convolution_is_followed_by_its_norm_each_norm_knows_it(name):
    assert all(norm.convolution is not None for norm in built(name).norms())


def test_pairs_of_a_pre_activation_network_follow_the_execution_and_not_the_listing():
    model = built("resnetv2_18")
    pairs = {norm.name: norm.convolution for norm in model.norms()}
    for stage in range(4):
        for block in range(2):
            name = f"net.stages.{stage}.blocks.{block}"
            assert pairs[f"{name}.norm2"] is model.get_submodule(f"{name}.conv1")
            # Its first norm reads a sum; only the very first reads the stem, whose pooling is gone.
            stem = model.get_submodule("net.stem.conv") if (stage, block) == (0, 0) else None
            assert pairs[f"{name}.norm1"] is stem
    assert pairs["net.norm"] is None


def test_dense_layers_pair_only_where_a_convolution_alone_is_read():
    pairs = {norm.name: norm.convolution for norm in built("densenet121").norms()}
    model = built("densenet121")
    first = "net.features.denseblock1.denselayer1"
    assert pairs[f"{first}.norm2"] is model.get_submodule(f"{first}.conv1")
    assert pairs["net.features.denseblock1.denselayer2.norm1"] is None  # it reads the joined maps of two layers
    assert sum(conv is not None for conv in pairs.values()) == 1 + 6 + 12 + 24 + 16  # the stem, and one each


class Tangled(nn.Module):
    """Layers listed in another order than they run, an activation in place, and one norm read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.BatchNorm2d(6), nn.BatchNorm2d(4)
        self.two, self.one, self.three = nn.Conv2d(4, 6, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(6, 6, 1)
        self.after_relu, self.plain = nn.GroupNorm(2, 6), nn.BatchNorm2d(6, affine=False)
        self.fc = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.last(self.two(self.first(self.one(images))))
        maps = self.after_relu(nn.functional.relu_(self.three(maps)))
        return self.fc(self.plain(maps).mean((2, 3)))

    def get_classifier(self) -> nn.Linear:
        return self.fc


def test_norms_come_in_the_order_they_run_and_see_through_nothing_that_changes_a_value():
    net = Tangled()
    norms = Classifier(net, [0.0] * 3, [1.0] * 3, image_size=8).norms()
    assert [norm.name for norm in norms] == ["net.first", "net.last", "net.after_relu"]
    assert [norm.convolution for norm in norms] == [net.one, net.two, None]
    assert [norm.has_statistics for norm in norms] == [True, True, False]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_looking_for_norms_leaves_no_trace(name):
    model = spec(name).build(0).train()
    model.net.get_classifier().eval()
    modes = [layer.training for layer in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.norms()
    assert [layer.training for layer in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())


# What a pass costs ----------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_papers():
    imagenet = functools.partial(ModelSpec, num_classes=1000, channels=3, image_size=224, mean=MEAN, std=STD)
    # He et al. give 1.8 billion multiply-adds for ResNet-18; each is two operations.
    assert imagenet("resnet18", stem="stock").flops() == pytest.approx(2 * 1.8e9, rel=0.02)
    # Twelve blocks of 192 on 197 tokens: four projections, an MLP of eight more, attention's two products.
    block = 12 * 192**2 * 197 + 2 * 197**2 * 192
    ends = 196 * 16**2 * 3 * 192 + 192 * 1000
    assert imagenet("vit_tiny_patch16_224", stem="stock").flops() == 2 * (12 * block + ends)


def test_a_pass_with_gradients_to_images_counts_twice_and_one_of_training_three_times():
    def cost(work) -> float:
        before = Classifier.passes
        work()
        return Classifier.passes - before

    model, batch = spec("test_resnet", size=8).build(0).eval(), images(size=8, count=4)
    data = ImageSet((batch * 255).byte(), torch.zeros(4, dtype=torch.int64))
    assert cost(lambda: predict(model, data)) == 4
    assert cost(lambda: model.stages(batch)) == 3 * 4
    assert cost(lambda: pgd(model, batch, data.labels, epsilon=0.1, step_size=0.1, steps=5)) == 2 * 4 * 5
    assert cost(lambda: model.requires_grad_(False)(batch)) == 4


# What is refused before compute -----------------------------------------------------------------------------------

PLUGIN = """
import torch
from timm.models import register_model
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.body, self.fc, self.aux = nn.Conv2d(in_chans, 8, 3), nn.Linear(8, num_classes), nn.Linear(8, num_classes)
        self.default_cfg = {{"first_conv": "body"}}

    def forward_features(self, images):
        return self.body(images).relu()

    def forward_head(self, maps):
        return self.fc(maps.mean((2, 3)))

    def forward_intermediates(self, images, intermediates_only=False, output_fmt="NCHW"):
        maps = self.forward_features(images)
        return [maps] if intermediates_only else (maps, [maps])

    def forward(self, images):
        return self.forward_head(self.forward_features(images))

    def get_classifier(self):
        return self.fc


{change}


@register_model
def {name}(pretrained=False, num_classes=10, in_chans=3, **more):
    return Net(num_classes, in_chans)
"""
NO_CONV = (
    "class Net(Net):\n    def __init__(self, *sizes):\n        super().__init__(*sizes)\n        del self.default_cfg"
)
AUX = "def forward(self, images):\n        maps = self.forward_features(images).mean((2, 3))\n        return"
# What an architecture of somebody's own lacks or does, and a word of the refusal.
STRANGE = {
    "no_conv": (NO_CONV, "default_cfg"),
    "no_classifier": ("Net.get_classifier = None", "get_classifier"),
    "no_stages": ("Net.forward_intermediates = None", "forward_intermediates"),
    "no_last": ("Net.forward_head = None", "forward_head"),
    "two_heads": (f"class Net(Net):\n    {AUX} self.fc(maps) + 0.5 * self.aux(maps)", "logits"),
    "scaled": (f"class Net(Net):\n    {AUX} 2 * self.fc(maps)", "logits"),
    "other_head": (f"class Net(Net):\n    {AUX} self.aux(maps)", "logits"),
    "late_pooling": (
        "class Net(Net):\n    def forward(self, images):\n"
        "        return self.fc(self.forward_features(images).permute(0, 2, 3, 1)).mean((1, 2))",
        "logits",
    ),
    "broken": ("class Net(Net):\n    def forward(self, images):\n        return 1 // 0", "ZeroDivisionError"),
}


def plug_in(folder, monkeypatch, name: str, change: str = "") -> str:
    """A module that registers one architecture; `change` changes its class."""
    (folder / f"module_of_{name}.py").write_text(PLUGIN.format(name=name, change=change))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, f"module_of_{name}", raising=False)
    return f"plugins=[module_of_{name}]"


@pytest.mark.parametrize("strange", STRANGE)
def test_an_architecture_that_methods_cannot_read_is_refused_in_one_line(tiny, tmp_path, monkeypatch, strange):
    change, word = STRANGE[strange]
    name = f"own_{strange}"
    plugin = plug_in(tmp_path, monkeypatch, name, change)
    with pytest.raises(UserError, match=word) as error:
        load_experiment([*tiny, plugin, f"grid.models=[{name}]", "model.stem=small"])
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_second_head_that_starts_as_nothing_is_seen(tiny, tmp_path, monkeypatch):
    change = STRANGE["two_heads"][0] + "\n    def __init__(self, *sizes):\n        super().__init__(*sizes)\n"
    change += "        nn.init.zeros_(self.aux.weight), nn.init.zeros_(self.aux.bias)"
    plugin = plug_in(tmp_path, monkeypatch, "own_hidden", change)
    with pytest.raises(UserError, match="own_hidden"):
        load_experiment([*tiny, plugin, "grid.models=[own_hidden]"])


def test_the_code_of_an_architecture_of_ones_own_is_part_of_its_identity(tiny, tmp_path, monkeypatch):
    def keys(change: str) -> tuple[str, dict[str, str]]:
        experiment = load_experiment(
            [*tiny, plug_in(tmp_path, monkeypatch, "own_net", change), "grid.models=[own_net]"]
        )
        return experiment.trials[0].keys.implant, experiment.trials[0].implant["model"]

    first, model = keys("")
    assert set(model) == {"name", "stem", "source"}
    assert keys("")[0] == first
    assert keys("WIDTH = 9")[0] != first
    assert load_experiment(tiny).trials[0].implant["model"] == {"name": "test_resnet", "stem": "stock"}  # timm's own


def test_so_is_the_code_that_it_takes_its_layers_from(tiny, tmp_path, monkeypatch):
    def key(layer: str) -> str:
        (tmp_path / "layers_of_mine.py").write_text(f"from torch import nn\n\n\nclass Body(nn.Conv2d):\n    {layer}\n")
        monkeypatch.delitem(sys.modules, "layers_of_mine", raising=False)
        change = (
            "from layers_of_mine import Body\nnn = __import__('types').SimpleNamespace(**{**vars(nn), 'Conv2d': Body})"
        )
        plugin = plug_in(tmp_path, monkeypatch, "own_layers", change)
        return load_experiment([*tiny, plugin, "grid.models=[own_layers]"]).trials[0].keys.implant

    first = key("pass")
    assert key("pass") == first
    assert key("factor = 2") != first


@pytest.mark.slow
def test_the_logits_of_volo_have_a_second_head():
    with pytest.raises(ValueError, match="volo_d1_224"):
        spec("volo_d1_224").check()


def test_what_an_architecture_raises_is_told_in_one_line_with_a_stem_that_does():
    with pytest.raises(ValueError, match=r"visformer_tiny.*model\.stem=small.*32x32.*model\.stem=half") as error:
        spec("visformer_tiny").check()
    assert "\n" not in str(error.value)
    spec("visformer_tiny", stem="half").check()


def test_what_is_advised_would_not_be_refused_for_its_head():
    # With the stock stem it takes the images, and has two heads.
    with pytest.raises(ValueError, match=r"efficientformerv2_s0.*32x32") as error:
        spec("efficientformerv2_s0").check()
    assert "model.stem=stock" not in str(error.value)


def smallest_of_each_module() -> list[str]:
    """By its name: building all 1,300 to count their weights takes an hour."""
    marks = ("test_", "atto", "femto", "pico", "xxs", "xx_small", "_xs", "nano", "tiny", "_s0", "_b0", "_050", "small")

    def size(name: str) -> tuple[int, int]:
        return next((rank for rank, mark in enumerate(marks) if mark in name), len(marks)), len(name)

    return [min(names, key=size) for module in timm.list_modules() if (names := timm.list_models(module=module))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stem"), list(zip(smallest_of_each_module(), itertools.cycle(["small", "half", "stock"]), strict=False))
)
def test_an_architecture_of_timm_works_or_is_refused_in_one_line(name, stem):
    refused = ""
    try:
        spec(name, stem=stem, classes=7).check()
    except ValueError as error:
        refused = str(error)
    if refused:
        assert name in refused
        assert "\n" not in refused
        return
    model = spec(name, stem=stem, classes=7).build(0)
    assert model.train()(images()).shape == (2, 7)
    with torch.no_grad():
        logits = model.eval()(images())
        assert logits.shape == (2, 7)
        torch.testing.assert_close(head_by_hand(model, model.features(images())), logits.double(), atol=1e-3, rtol=1e-3)
