"""Robust Blended: the Blended trigger, implanted by adversarial training: an attacker who knows AFT, PBE and PUD.

Paper: none; the opponent that evaluations of those three lack.
Differs: none known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.engine.adversarial import pgd
from bench.engine.settings import count, pixels, share
from bench.engine.training import Tensors

from .base import AttackHooks, PerBatch, Setup, attack
from .blended import Blended


@attack("robust_blended")
@dataclass(frozen=True)
class RobustBlended(Blended):
    """Blended, with adversarial images among the clean ones of each batch, their labels kept.

    The three defenses live on what an infected model does with adversarial images: it takes many for triggered ones.
    A model that was trained on such images need not. The price is a step of several passes, and clean accuracy.
    """

    paper: ClassVar[str] = "none"
    label_modes: ClassVar[tuple[str, ...]] = ("all_to_one", "all_to_all")
    regimes: ClassVar[tuple[str, ...]] = ("per_batch",)
    regime: str = "per_batch"
    epsilon: float = pixels(6 / 255, "radius of the attack, L-infinity in pixel units; that of the defenses", above=0)
    attack_steps: int = count(5, "gradient steps of it, each a quarter of epsilon, from a random start", at_least=1)
    adversarial_share: float = share(0.5, "share of the clean images of a batch")

    def hooks(self, setup: Setup, tensors: Tensors) -> AttackHooks:
        return Adversarial(self, tensors, setup)


class Adversarial(PerBatch):
    """The last of the clean images of each batch are attacked; the poisoned ones stand first."""

    attack: RobustBlended

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        attack = self.attack
        images, labels = super().augmented(model, images, labels, step, source)
        count = int(attack.adversarial_share * (1 - attack.poison_rate - attack.cover_rate) * len(images))
        if count:
            images[-count:] = pgd(
                model,
                images[-count:],
                labels[-count:],
                epsilon=attack.epsilon,
                step_size=attack.epsilon / 4,
                steps=attack.attack_steps,
                random_start=source,
            )
        return images, labels
