"""Adversarial Weight Masking (AWM): recover a universal perturbation, then shrink the weights that it speaks to.

Paper: Chai and Chen, NeurIPS 2022, arXiv:2207.04497.
Differs: every weight of convolutions and linear layers is masked, also of transformers and the head (the released
code masks convolutions only). The budget of the perturbation is its mean absolute value, so that it means the same
for every image size; 0.326 is the released 1000 of 3x32x32. A pass has a fixed number of updates, the released 15
on 500 images, whatever the size of the reserve, and draws batches without replacement (released: with). The shrinking
phase, of no step in the released defaults, is left out. As released, the rate of the masks is constant; the released
switch `--lr-decay`, off by default, multiplies it by 0.9 after each round (`lr_decay=0.9`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.engine.data import ImageSet, equal_batches, generator, to_float
from bench.engine.models import Classifier
from bench.engine.settings import count, number, pixels, share
from bench.engine.training import Diverged, Tensors
from defenses.base import Defense, DefenseResult, ReserveView, defense


@defense("awm")
@dataclass(frozen=True)
class AdversarialWeightMasking(Defense):
    """Alternate a universal perturbation that misleads with soft masks of single weights that resist it.

    The network stays in eval mode throughout. For one image a class the paper takes alpha 0.99 and budget 0.0326.
    """

    paper: ClassVar[str] = "arXiv:2207.04497"
    version: ClassVar[int] = 2  # a constant rate of the masks
    rounds: int = count(20, "alternations")
    updates: int = count(15, "steps of the perturbation, and as many of the masks, in a round", at_least=1)
    alpha: float = share(0.9, "weight of the clean loss; the perturbed loss has the rest")
    gamma: float = number(1e-8, "weight of the masks' L1 norm", at_least=0)
    budget: float = pixels(1000 / 3072, "largest mean absolute value of the perturbation, in pixel units")
    perturbation_lr: float = number(10.0, "learning rate of its plain gradient ascent", at_least=0)
    lr: float = number(0.01, "learning rate of Adam on the masks", at_least=0)
    lr_decay: float = share(1.0, "factor of that rate after each round; 1 keeps it constant", above=0)
    batch_size: int = count(128, "images a step", at_least=1)

    def defend(self, view: ReserveView) -> DefenseResult:
        model = view.model.eval().requires_grad_(False)
        weights = maskable(model)
        masks = {name: torch.ones_like(weight).requires_grad_(True) for name, weight in weights.items()}
        optimizer = torch.optim.Adam(masks.values(), lr=self.lr)
        stream = batches(view.reserve, self.batch_size, view.seed)
        for done in range(self.rounds):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * self.lr_decay**done
            masked = {name: (weights[name] * mask).detach() for name, mask in masks.items()}
            pattern = self.perturbation(model, masked, stream)
            total = torch.zeros((), device=view.device)
            for _ in range(self.updates):
                images, labels = next(stream)
                loss = self.loss(model, weights, masks, pattern, images, labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for mask in masks.values():
                        mask.clamp_(0, 1)
                total += loss.detach()
            if not math.isfinite(total.item()):
                raise Diverged(f"the loss became {total.item()} in round {done + 1}; try a lower defense.awm.lr")
            view.log.images += self.updates * len(labels)
            view.log.updates += self.updates
            view.log.record("awm/loss", total.item() / self.updates, done + 1)
            view.log.record("awm/perturbation", pattern.abs().mean().item(), done + 1)
            every = torch.cat([mask.detach().flatten() for mask in masks.values()])
            view.log.record("awm/mean_mask", every.mean().item(), done + 1)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(masks[name])
        return DefenseResult(model.requires_grad_(True))

    def perturbation(self, model: Classifier, masked: Tensors, stream: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """(1, C, H, W): one pattern that moves all images away from what the model says of them, within the budget."""
        pattern = torch.zeros(1)
        for step in range(self.updates):
            images, _ = next(stream)
            if step == 0:
                pattern = torch.zeros_like(images[:1])
            with torch.no_grad():
                says = functional_call(model, masked, (images,)).argmax(1)
            pattern.requires_grad_(True)
            loss = F.cross_entropy(functional_call(model, masked, (images + pattern,)), says)
            (gradient,) = torch.autograd.grad(loss, pattern)
            pattern = pattern.detach() + self.perturbation_lr * gradient
        return within(pattern, self.budget)

    def loss(
        self, model: Classifier, weights: Tensors, masks: Tensors, pattern: Tensor, images: Tensor, labels: Tensor
    ) -> Tensor:
        """Cross-entropy with and without the pattern, under the masks, and the masks' L1 norm."""
        masked = {name: weights[name] * mask for name, mask in masks.items()}
        clean = F.cross_entropy(functional_call(model, masked, (images,)), labels)
        perturbed = F.cross_entropy(functional_call(model, masked, ((images + pattern).clamp(0, 1),)), labels)
        size = torch.stack([mask.abs().sum() for mask in masks.values()]).sum()
        return self.alpha * clean + (1 - self.alpha) * perturbed + self.gamma * size


def within(pattern: Tensor, budget: float) -> Tensor:
    """The pattern, scaled down if its mean absolute value exceeds the budget."""
    return pattern * (budget / pattern.abs().mean().clamp(min=1e-12)).clamp(max=1)


def maskable(model: Classifier) -> Tensors:
    """The weights of all convolutions and linear layers by their names."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    return {f"{name}.weight": layer.weight for name, layer in layers.items()}


def batches(data: ImageSet, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Float images and labels without end, in a new random order each time they are through."""
    count, size = equal_batches(len(data), batch_size)
    device = data.device
    epoch = 0
    while True:
        order = torch.randperm(len(data), generator=generator(seed, "awm", epoch, device=device), device=device)
        for chosen in order[: count * size].split(size):
            images = to_float(data.batch(chosen)).contiguous(memory_format=torch.channels_last)
            yield images, data.labels[chosen]
        epoch += 1
