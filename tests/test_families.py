"""Every defense meets every family: it returns a finite model of the same architecture, or says why it cannot."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import Recipe, TrainingLog
from defenses.base import (
    THREAT_MODELS,
    DefenderView,
    Defense,
    NotApplicable,
    ReserveView,
    TrainsetView,
    defense,
    offered,
)

# A setting whose name holds one of these counts work; one is the least of it.
WORK = ("epochs", "updates", "iterations", "steps", "rounds", "batches", "passes")
# What the rule above cannot know.
SMALLEST: dict[str, dict[str, Any]] = {
    "abl": {"isolation_ratio": 0.2},  # of so few images, one percent is none
    "neural_cleanse": {"threshold": 0.0},  # some class is always flagged, and unlearnt
    "strip": {"overlays": 2},
}

FAMILIES = [
    "test_resnet",
    "resnetv2_18",
    "vgg11_bn",
    "densenet121",
    "mobilenetv3_small_050",
    "test_efficientnet",
    "test_convnext",
    "test_vit",
]
FAST = ("test_resnet", "test_vit")  # one with batch norm, one with layer norm
CASES = [
    pytest.param(name, family, channels, marks=[] if family in FAST and channels == 3 else [pytest.mark.slow])
    for family in FAMILIES
    for channels in (1, 3)
    for name in sorted(defense)
    if family in FAST or channels == 3  # of a large network, one number of channels
]


def smallest(name: str) -> Defense:
    """A defense with the least work that it can be given; a new one needs no entry as long as its settings say what
    they count."""
    default = defense[name]()
    counted: dict[str, Any] = {}
    for field in fields(default):
        value = getattr(default, field.name)
        if any(word in field.name for word in WORK):
            # Zero is how some settings say "not this phase"; one would switch it on.
            if type(value) is int:
                counted[field.name] = min(1, value)
            elif isinstance(value, list) and all(type(item) is int for item in value):
                counted[field.name] = [min(1, item) for item in value]
    if getattr(default, "batch_size", 0):
        counted["batch_size"] = 16
    return replace(default, **{**counted, **SMALLEST.get(name, {})})


@cache
def built(family: str, channels: int) -> Classifier:
    return spec(family, channels).build(0).eval()


def spec(family: str, channels: int) -> ModelSpec:
    return ModelSpec(family, 4, channels, 32, (0.5,) * channels, (0.25,) * channels)


def view_for(cls: type[Defense], family: str, channels: int) -> DefenderView:
    """The least view that the defense asks for, made by hand, on 32 random images of four classes."""
    images = torch.randint(0, 256, (32, channels, 32, 32), generator=generator(0, "images"), dtype=torch.uint8)
    data, how = ImageSet(images, torch.arange(32) % 4), Augmentation(crop=1 / 8, flip=True)
    own: dict[str, Any] = {
        "model": copy.deepcopy(built(family, channels)),
        "num_classes": 4,
        "seed": 0,
        "device": torch.device("cpu"),
        "log": TrainingLog(),
    }
    kind = next(found for setting in THREAT_MODELS if (found := offered(cls, setting)) is not None)
    if kind is DefenderView:
        return DefenderView(**own)
    if kind is ReserveView:
        return ReserveView(**own, reserve=data, augmentation=how)
    return TrainsetView(
        **own,
        trainset=data,
        augmentation=how,
        fresh_model=partial(ModelSpec.build, spec(family, channels)),
        recipe=Recipe(epochs=1, batch_size=16, lr=0.01),
    )


@pytest.mark.parametrize(("name", "family", "channels"), CASES)
def test_a_defense_returns_a_finite_model_of_the_same_architecture_or_says_why_not(name, family, channels):
    infected = built(family, channels)
    given = view_for(defense[name], family, channels)
    state = torch.get_rng_state()
    reason = None
    try:
        verdict = smallest(name).defend(given)
    except NotApplicable as error:
        reason = str(error)
    if reason is not None:
        assert len(reason.split()) > 3
        return
    assert torch.equal(torch.get_rng_state(), state)
    weights = verdict.model.state_dict()
    assert {key: value.shape for key, value in weights.items()} == {
        key: value.shape for key, value in infected.state_dict().items()
    }
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert not verdict.model.training
    images = torch.rand(3, channels, 32, 32, generator=generator(0, "look"))
    reloaded = copy.deepcopy(infected)
    reloaded.load_state_dict(weights)
    with torch.no_grad():
        found = verdict.model(images)
        assert torch.isfinite(found).all()
        # Weights are all that is kept: a hook left behind, or a layer put in, would show here.
        torch.testing.assert_close(found, reloaded(images))
    for value in (verdict.suspicion, verdict.flagged):
        assert value is None or value.shape == (32,)


@pytest.mark.parametrize("name", sorted(defense))
def test_a_defense_takes_the_precision_of_gpus(name):
    view = replace(view_for(defense[name], "test_resnet", 3), log=TrainingLog(precision="bfloat16"))
    weights = smallest(name).defend(view).model.state_dict()
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}  # and keeps float32 weights


def test_the_smallest_settings_shrink_what_is_counted_and_leave_the_rest():
    fine_pruning = smallest("fine_pruning")
    assert fine_pruning == replace(defense["fine_pruning"](), epochs=1, batch_size=16)
    aft = smallest("aft")
    assert (aft.updates, aft.adversarial_updates, aft.attack_steps) == (1, 1, 1)
    assert smallest("neural_cleanse").steps == 1
