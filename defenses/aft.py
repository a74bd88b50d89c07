"""Adversarial fine-tuning (AFT), the one-shot form of Progressive Backdoor Erasing.

Paper: Mu et al., Progressive Backdoor Erasing, CVPR 2023, arXiv:2202.06312.
Differs: the schedule counts updates, not epochs, because what erases is the number of adversarial steps and a small
reserve has few in an epoch; the defaults are 10 adversarial of 30 epochs on 2,500 images. The released script
fine-tunes on the whole clean training set (3 of 20 epochs, rate 1e-3 constant). Adversarial images are clamped to
[0, 1]; the released code leaves them outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.engine.adversarial import pgd
from bench.engine.training import Hooks, Recipe, fit
from defenses.base import Defense, ReserveView, Verdict, defense


@defense("aft")
@dataclass(frozen=True)
class AdversarialFineTuning(Defense):
    """Fine-tune on untargeted adversarial examples of the reserve first, on the clean reserve then.

    Attributes:
        updates: optimizer steps in all.
        adversarial_updates: how many of them, from the first, see adversarial images only.
        epsilon: radius of the attack, L-infinity in pixel units.
        step_size: of the attack, as a share of epsilon.
        attack_steps: gradient steps of the attack, which starts at the image itself.
        lr, batch_size, momentum, weight_decay: of SGD with a cosine schedule to zero.
    """

    paper: ClassVar[str] = "arXiv:2202.06312"
    updates: int = 600
    adversarial_updates: int = 200
    epsilon: float = 6 / 255
    step_size: float = 0.2
    attack_steps: int = 7
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if not 0 <= self.adversarial_updates <= self.updates:
            raise ValueError(
                f"defense.aft.adversarial_updates is {self.adversarial_updates}; write 0 to {self.updates} (updates)"
            )
        if not 0 <= self.epsilon <= 1:
            raise ValueError(
                f"defense.aft.epsilon is {self.epsilon:g}; pixels are in [0, 1]. For 6 levels write 0.0235."
            )

    def defend(self, view: ReserveView) -> Verdict:
        recipe = Recipe(
            updates=self.updates,
            lr=self.lr,
            batch_size=self.batch_size,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            optimizer="sgd_plain",
        )
        model = fit(
            view.model,
            view.reserve,
            recipe,
            seed=view.seed,
            augmentation=view.augmentation,
            hooks=AdversarialStart(self),
            journal=view.progress,
            # Named as the plain fine-tune, so that without an adversarial step the two are the same, bit for bit.
            part="fine_tuning",
        )
        return Verdict(model)


class AdversarialStart(Hooks):
    """Replaces the first batches by adversarial examples of the model as it is at that moment."""

    def __init__(self, settings: AdversarialFineTuning) -> None:
        self.settings = settings

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        aft = self.settings
        if step >= aft.adversarial_updates or aft.epsilon == 0:
            return images, labels
        found = pgd(
            model,
            images,
            labels,
            epsilon=aft.epsilon,
            step_size=aft.step_size * aft.epsilon,
            steps=aft.attack_steps,
        )
        return found, labels
