"""Adversarial Neuron Pruning (ANP): cut the channels that fail first when all are perturbed against the network.

Paper: Wu and Wang, NeurIPS 2021, arXiv:2110.14430.
Differs: the threshold is the largest that a held-out part of the reserve allows; the released code prints a sweep on
the test set and leaves the choice open (`prune_by=threshold` is the fixed rule, at 0.2). Batches are drawn without
replacement. Units are the channels of every norm layer; in a network of layer norms, which the paper does not treat,
a unit scales one coordinate of all tokens, and epsilon is halved until random noise of that size leaves most of the
held-out accuracy: relative noise of 0.4 on each of them would leave no function to defend. With batch norm epsilon is
the paper's in every network, also where depth-wise convolutions make it thousands of units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.data import ImageSet, generator
from bench.engine.metrics import accuracy, predict
from bench.engine.models import Norm
from bench.engine.pruning import Masked, MaskPruning, split_off
from bench.engine.settings import count, number, plain, share
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, NotApplicable, ReserveView, defense


@defense("anp")
@dataclass(frozen=True)
class AdversarialNeuronPruning(MaskPruning, Defense):
    """Learn a mask of all norm channels under adversarial noise on their scales and shifts, then prune the lowest."""

    paper: ClassVar[str] = "arXiv:2110.14430"
    epsilon: float = share(0.4, "radius of the noise, relative to scale and shift")
    alpha: float = share(0.2, "weight of the clean loss; the perturbed loss has the rest")
    steps: int = count(
        1, "number of steps of the ascent, epsilon / steps each, from a random start in the ball", at_least=1
    )
    project: bool = plain(False, "keep the noise in the ball; the paper's code lets it reach twice epsilon")
    updates: int = count(2000, "optimizer steps on the masks; SGD at a constant rate")
    lr: float = number(0.2, "learning rate of the masks", at_least=0)
    momentum: float = 0.9
    batch_size: int = 128
    noise_tolerance: float = share(
        0.05,
        "largest loss of held-out accuracy through random noise; epsilon is halved until it holds, "
        "only where no norm layer has running statistics. 1 keeps epsilon",
    )

    def defend(self, view: ReserveView) -> DefenseResult:
        norms = view.model.norms()
        if not norms:
            raise NotApplicable("the network has no norm layer with a scale and a shift")
        judges, training = split_off(view.reserve, self.held_out, view.seed)
        masked = Masked(view.model, norms)
        epsilon = self._calibrated(masked, norms, judges, view.seed)
        view.log.record("anp/epsilon", epsilon, 0)
        recipe = Recipe(
            epochs=0,
            updates=self.updates,
            batch_size=self.batch_size,
            optimizer="momentum",
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=0.0,
            schedule="constant",
        )
        view.fit(masked, recipe, data=training, hooks=Perturbed(self, epsilon), stream="anp")
        self.prune_lowest(view.model, norms, masked.mask.detach(), judges, seed=view.seed, log=view.log, name="anp")
        return DefenseResult(view.model)

    @torch.no_grad()
    def _calibrated(self, masked: Masked, norms: Sequence[Norm], judges: ImageSet, seed: int) -> float:
        """Epsilon, halved until random noise costs at most the tolerance; as given where statistics are stored."""
        if any(norm.has_statistics for norm in norms):
            return self.epsilon
        device = judges.labels.device
        draws = torch.rand(4, 2, len(masked.mask), generator=generator(seed, "anp noise", device=device), device=device)
        draws = draws.mul_(2).sub_(1)
        whole, epsilon = accuracy(predict(masked, judges), judges.labels), self.epsilon
        for _ in range(10):
            right = [
                (masked(images, *noise).argmax(1) == labels).double().sum()
                for noise in draws * epsilon
                for images, labels in judges.chunks()
            ]
            if whole - torch.stack(right).sum().item() / (len(draws) * len(judges)) <= self.noise_tolerance:
                break
            epsilon /= 2
        return epsilon


class Perturbed(Hooks):
    """The min-max problem: noise that raises the loss, and a mask that lowers it with and without the noise."""

    def __init__(self, settings: AdversarialNeuronPruning, epsilon: float) -> None:
        self.settings = settings
        self.epsilon = epsilon
        self.noise: tuple[Tensor, Tensor] | None = None

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(model, Masked)
        self.noise = self.ascend(model, images, labels, source) if self.epsilon else None
        return images, labels

    def ascend(self, model: Masked, images: Tensor, labels: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """(U,) noise on the scales and on the shifts, by ascent of the cross-entropy from a random start."""
        start = torch.rand(2, len(model.mask), generator=source, device=images.device)
        noise = start.mul_(2).sub_(1).mul_(self.epsilon)
        model.mask.requires_grad_(False)
        for _ in range(self.settings.steps):
            noise.requires_grad_(True)
            loss = F.cross_entropy(model(images, *noise), labels)
            (gradient,) = torch.autograd.grad(loss, noise)
            noise = noise.detach() + self.epsilon / self.settings.steps * gradient.sign()
            if self.settings.project:
                noise.clamp_(-self.epsilon, self.epsilon)
        model.mask.requires_grad_(True)
        return noise[0], noise[1]

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        clean = F.cross_entropy(model(images), labels)
        if self.noise is None:
            return clean
        perturbed = F.cross_entropy(model(images, *self.noise), labels)
        return self.settings.alpha * clean + (1 - self.settings.alpha) * perturbed

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        assert isinstance(model, Masked)
        model.clamp()
