"""SAU: unlearn the adversarial examples that fool the infected model and the model under repair in the same way.

Paper: Wei et al., Shared Adversarial Unlearning, NeurIPS 2023, arXiv:2307.10562.
Differs: an adversarial example that both networks already send to one wrong class is left alone for the rest of its
attack; its gradient is zero, so the result is that of the released code, for fewer passes. As released, examples may
leave [0, 1], batch norm is frozen, images go in without augmentation, and the rate is constant. The rounds are 100
everywhere, where the released code has 20 on Tiny-ImageNet (`defense.sau.epochs`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.inference import under_attack
from bench.engine.models import Classifier
from bench.engine.settings import count, number, pixels
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, ReserveView, defense


@defense("sau")
@dataclass(frozen=True)
class SharedAdversarialUnlearning(Defense):
    """Train on clean images, and away from the class to which the infected model sends each adversarial example."""

    paper: ClassVar[str] = "arXiv:2307.10562"
    clean_weight: float = number(1.0, "weight of the cross-entropy on clean images (the paper's lambda 1)", at_least=0)
    adversarial_weight: float = number(0.0, "weight of the cross-entropy on adversarial images (lambda 2)", at_least=0)
    shared_weight: float = number(1.0, "weight of the shared adversarial risk (lambda 3)", at_least=0)
    epsilon: float = pixels(
        0.2,
        "radius of the attack, L-infinity in pixel units; it starts at the corner, epsilon in each pixel",
    )
    step_size: float = number(0.2, "step of the attack, in pixel units", at_least=0)
    attack_steps: int = count(5, "gradient steps of the attack")
    attack_adversarial: float = number(0.01, "how much the attack seeks to fool both networks (beta 1)", at_least=0)
    attack_shared: float = number(1.0, "how much it seeks to make them agree (beta 2)", at_least=0)
    epochs: int = count(100, "passes over the reserve; Adam at a constant rate")
    lr: float = 1e-4
    batch_size: int = 256

    def defend(self, view: ReserveView) -> DefenseResult:
        recipe = Recipe(
            epochs=self.epochs,
            optimizer="adam",
            lr=self.lr,
            batch_size=self.batch_size,
            weight_decay=0.0,
            schedule="constant",
            precision="float32",
        )
        reference = copy.deepcopy(view.model).eval().requires_grad_(False)
        hooks = SharedUnlearning(self, reference)
        return DefenseResult(view.fit(view.model, recipe, augment=False, hooks=hooks, stream="sau"))


class SharedUnlearning(Hooks):
    """The attack on each batch, and the losses on what it finds."""

    def __init__(self, settings: SharedAdversarialUnlearning, reference: Classifier) -> None:
        self.settings, self.reference = settings, reference
        self.adversarial: Tensor

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        model.eval()  # `fit` has set train mode; batch norm stays as it is
        if self.settings.adversarial_weight or self.settings.shared_weight:
            self.adversarial = images + shared_perturbation(model, self.reference, images, labels, self.settings)
        return images, labels

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        sau = self.settings
        total = sau.clean_weight * F.cross_entropy(model(images), labels)
        if not (sau.adversarial_weight or sau.shared_weight):
            return total
        logits = model(self.adversarial)
        if sau.adversarial_weight:
            total = total + sau.adversarial_weight * F.cross_entropy(logits, labels)
        with torch.no_grad():
            calm, lured = self.reference(images).argmax(1), self.reference(self.adversarial).argmax(1)
        fooled = (lured != labels) & (lured != calm)
        return total + sau.shared_weight * shared_risk(logits, lured, fooled)


def shared_perturbation(
    model: nn.Module, reference: nn.Module, images: Tensor, labels: Tensor, settings: SharedAdversarialUnlearning
) -> Tensor:
    """(B, C, H, W): for each image a change within epsilon that both networks mistake for the same class.

    Both networks are in eval mode, so that an image's change depends on that image alone.
    """
    delta = torch.full_like(images, settings.epsilon)
    with under_attack(model) as own, under_attack(reference) as other, torch.enable_grad():
        with torch.no_grad():
            predicted_before, reference_before = own(images).argmax(1), other(images).argmax(1)
        left = torch.arange(len(images), device=images.device)  # not yet mistaken for the same class
        for _ in range(settings.attack_steps):
            moving = delta[left].requires_grad_(True)
            seen = images[left] + moving
            logits, reference_logits = own(seen), other(seen)
            predicted, reference_predicted = logits.argmax(1), reference_logits.argmax(1)
            fooled, reference_fooled = (
                predicted != predicted_before[left],
                reference_predicted != reference_before[left],
            )
            shared = fooled & reference_fooled & (predicted == reference_predicted)
            one = F.cross_entropy(logits, labels[left], reduction="none") * ~fooled
            two = F.cross_entropy(reference_logits, labels[left], reduction="none") * ~reference_fooled
            apart = divergence(logits, reference_logits) * ~shared
            loss = (settings.attack_shared * apart - settings.attack_adversarial * (one + two) / 2).sum()
            (slope,) = torch.autograd.grad(loss, moving)
            stepped = moving.detach() - settings.step_size * slope.sign()
            delta[left] = stepped.clamp(-settings.epsilon, settings.epsilon)
            left = left[~shared]
            if not len(left):
                break
    return delta


def divergence(one: Tensor, two: Tensor) -> Tensor:
    """(B,): Jensen-Shannon divergence of two batches of logits, in nats: 0 to log 2."""
    p, q = (logits.softmax(1).clamp(min=1e-8) for logits in (one, two))
    middle = (p + q) / 2
    return ((p * p.log() + q * q.log()) / 2 - middle * middle.log()).sum(1)


def shared_risk(logits: Tensor, lured: Tensor, fooled: Tensor) -> Tensor:
    """Minus the log-probability of not following the infected model, over the images that fool it; mean over all.

    Args:
        logits: (B, classes) of the model under repair.
        lured: (B,) the class to which the infected model sends each image.
        fooled: (B,) bool, where that is a mistake.
    """
    probabilities = logits.softmax(1)
    at = lured[:, None]
    at_label = probabilities.gather(1, at).squeeze(1)
    elsewhere = probabilities.scatter(1, at, 0.0).sum(1)
    # One term twice: the first is exact where the probability is near 1, the second where it is near 0. Behind the
    # clamps, which let go of an image at a probability of 0.001, neither has a slope.
    risk = -((1e-6 + elsewhere.clamp(max=0.999)).log() + (1 + 1e-6 - at_label.clamp(min=0.001)).log()) / 2
    return (risk * fooled).sum() / len(logits)
