"""Anti-Backdoor Learning (ABL): isolate what is learnt too fast, train on the rest, unlearn the isolated.

Paper: Li et al., NeurIPS 2021, arXiv:2110.11571.
Differs: the phases follow the recipe of the benchmark, so that a network gets its usual optimizer, rate, batch size and
weight decay and ABL no more epochs than it: isolation lasts 20 % and training on the rest 60 % of the recipe's epochs
(20 and 60 of the paper's 100; the released `backdoor_isolation.py` isolates after 10), isolation at a constant rate and
in a new order each epoch (released: always the same order). Unlearning counts updates, because it sees 1 % of the
images only: 40 is the number of `quick_unlearning_demo.py`, five passes over 500 CIFAR-10 images in batches of 64, here
in batches of the recipe's size. (`backdoor_unlearning.py` takes 16: four passes in batches of 128.) The rate of
unlearning, 5e-4 where training is at 0.1 in both scripts, is stated as a share of the recipe's. The loss of a batch is
held at gamma by the flooding loss; local gradient ascent, sign(loss - gamma) * loss, has the same gradient.
As released: isolation and unlearning see the images without augmentation, training on the rest with it (without the
released 3-pixel cutout); the threshold applies to the mean of a batch; batch norm keeps learning in all phases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.data import ImageSet
from bench.engine.models import Classifier
from bench.engine.settings import count, number, share
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, TrainsetView, defense


@defense("abl")
@dataclass(frozen=True)
class AntiBackdoorLearning(Defense):
    """Train a network anew on a poisoned training set, in three phases."""

    paper: ClassVar[str] = "arXiv:2110.11571"
    version: ClassVar[int] = 2  # isolation without augmentation
    gamma: float = number(
        0.5,
        "the loss at which isolation holds each batch; isolation sees the images without augmentation",
        at_least=0,
    )
    isolation_ratio: float = share(
        0.01,
        "share of the training images isolated, those of lowest loss",
        above=0,
        below=1,
    )
    isolation: float = share(0.2, "length of the first phase as a share of the recipe", above=0)
    tuning: float = share(0.6, "length of the second phase, on the other images, as a share of the recipe")
    unlearning_updates: int = count(40, "steps of gradient ascent on the isolated images, without augmentation")
    unlearning_lr: float = number(0.005, "rate of the ascent as a share of the recipe's rate", at_least=0)

    def defend(self, view: TrainsetView) -> DefenseResult:
        # Rounded up by a hair: 0.01 * 2900 is 28.999... in floating point.
        count = int(self.isolation_ratio * len(view.trainset) + 1e-6)
        if not count:
            raise ValueError(
                f"abl isolates {self.isolation_ratio:g} of {len(view.trainset)} images, which is none; "
                "raise defense.abl.isolation_ratio"
            )
        model = view.fresh_model(view.seed)
        steady = replace(share_of(view.recipe, self.isolation), schedule="constant", warmup=0.0, label_smoothing=0.0)
        # Augmentation moves and cuts the trigger: clean images then reach a low loss first, and are isolated instead.
        view.fit(model, steady, augment=False, hooks=Flooding(self.gamma), stream="abl_isolation")
        losses = losses_of(model, view.trainset)
        isolated = torch.zeros(len(losses), dtype=torch.bool, device=losses.device)
        isolated[losses.argsort(stable=True)[:count]] = True
        if self.tuning:
            view.fit(model, share_of(view.recipe, self.tuning), data=view.trainset[~isolated], stream="abl_tuning")
        if self.unlearning_updates:
            ascent = replace(steady, epochs=0, updates=self.unlearning_updates, lr=self.unlearning_lr * view.recipe.lr)
            view.fit(
                model, ascent, data=view.trainset[isolated], augment=False, hooks=Ascent(), stream="abl_unlearning"
            )
        return DefenseResult(model, suspicion=-losses, flagged=isolated)


class Flooding(Hooks):
    """Holds the loss of a batch at gamma: below it, the gradient turns round."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        return (F.cross_entropy(model(images), labels) - self.gamma).abs() + self.gamma


class Ascent(Hooks):
    """Climbs the cross-entropy."""

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        return -F.cross_entropy(model(images), labels)


def share_of(recipe: Recipe, share: float) -> Recipe:
    """The same recipe for a share of its length, at least one step of what it counts."""
    if recipe.updates:
        return replace(recipe, updates=max(1, round(share * recipe.updates)))
    return replace(recipe, epochs=max(1, round(share * recipe.epochs)))


@torch.no_grad()
def losses_of(model: Classifier, data: ImageSet) -> Tensor:
    """(N,): the cross-entropy of each image with its given label, in eval mode and without augmentation."""
    model.eval()
    return torch.cat([F.cross_entropy(model(images), labels, reduction="none") for images, labels in data.chunks()])
