"""Adversarial fine-tuning (AFT), the one-shot form of Progressive Backdoor Erasing.

Paper: Mu et al., Progressive Backdoor Erasing, CVPR 2023, arXiv:2202.06312.
Differs: the schedule counts updates, not epochs, because what erases is the number of adversarial steps and a small
reserve has few in an epoch; the defaults are 10 adversarial of 30 epochs on 2,500 images, at 1e-2 with a cosine to
zero. `aft_code` makes the updates of the released script, which fine-tunes on the whole clean training set (3 of 20
epochs on 50,000 images), at its constant 1e-3, on whatever reserve there is. Adversarial images are clamped to [0, 1];
the released code leaves them outside. Images are augmented as is usual for the data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.engine.adversarial import pgd, under_attack
from bench.engine.data import ImageSet
from bench.engine.models import Classifier
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, ReserveView, TrainsetView, defense


@dataclass(frozen=True)
class AdversarialRepair(Defense):
    """Base of AFT, PBE and PUD: SGD, and the attack on the model under repair that makes its training images.

    Attributes:
        epsilon: radius of the attack, L-infinity in pixel units, in [0, 1]; 0 trains on clean images only.
        step_size: of the attack, as a share of epsilon.
        attack_steps: gradient steps of the attack.
        random_start: start anywhere in the ball; False starts at the image itself.
        attack_labels: the classes to leave: `given`, or `predicted` by the model. Training takes the given ones.
        attack_batch_norm: `eval`, or `train`, in which batch norm also learns from each iterate of the attack.
        lr, batch_size, momentum, weight_decay: of SGD.
    """

    epsilon: float = 6 / 255
    step_size: float = 0.2
    attack_steps: int = 7
    random_start: bool = False
    attack_labels: str = "given"
    attack_batch_norm: str = "eval"
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise ValueError(
                f"defense.{self.name}.epsilon is {self.epsilon:g}; pixels are in [0, 1]. For 6 levels write 0.0235."
            )
        if self.step_size <= 0:
            raise ValueError(f"defense.{self.name}.step_size is {self.step_size:g}; it is a share of epsilon, e.g. 0.2")
        self._at_least("attack_steps", 0)
        self._at_least("batch_size", 1)
        self._one_of("attack_labels", "given", "predicted")
        self._one_of("attack_batch_norm", "eval", "train")

    def _one_of(self, key: str, *allowed: str) -> None:
        if getattr(self, key) not in allowed:
            raise ValueError(f"defense.{self.name}.{key} is {getattr(self, key)!r}; write {' or '.join(allowed)}")

    def _at_least(self, key: str, least: int) -> None:
        if getattr(self, key) < least:
            raise ValueError(f"defense.{self.name}.{key} is {getattr(self, key)}; write {least} or more")

    def recipe(self, updates: int, schedule: str = "constant") -> Recipe:
        """SGD with classical momentum for a number of updates."""
        return Recipe(
            updates=updates,
            schedule=schedule,
            lr=self.lr,
            batch_size=self.batch_size,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            optimizer="momentum",
        )

    def train(
        self,
        view: TrainsetView | ReserveView,
        images: ImageSet,
        recipe: Recipe,
        hooks: Hooks,
        stream: str,
        optimizer: torch.optim.Optimizer | None = None,
        augment: bool = True,
    ) -> Classifier:
        """One part of the defense: train the view's model on some of its images."""
        return view.fit(
            view.model, recipe, data=images, augment=augment, hooks=hooks, stream=stream, optimizer=optimizer
        )


class AdversarialStart(Hooks):
    """Replaces the first batches by adversarial examples of the model as it is at that moment.

    Args:
        settings: of the attack.
        updates: how many batches are adversarial, all of each.
        epsilon, step_size: in place of the settings' own.
    """

    def __init__(
        self,
        settings: AdversarialRepair,
        updates: int,
        *,
        epsilon: float | None = None,
        step_size: float | None = None,
    ) -> None:
        self.settings = settings
        self.updates = updates
        self.epsilon = settings.epsilon if epsilon is None else epsilon
        self.step_size = settings.step_size if step_size is None else step_size

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if step >= self.updates or self.epsilon == 0:
            return images, labels
        left = labels
        if self.settings.attack_labels == "predicted":
            with under_attack(model), torch.no_grad():
                left = model(images).argmax(dim=1)
        adversarial = pgd(
            model,
            images,
            left,
            epsilon=self.epsilon,
            step_size=self.step_size * self.epsilon,
            steps=self.settings.attack_steps,
            random_start=source if self.settings.random_start else None,
            eval_mode=self.settings.attack_batch_norm == "eval",
        )
        return adversarial, labels


@defense("aft")
@dataclass(frozen=True)
class AdversarialFineTuning(AdversarialRepair):
    """Fine-tune on untargeted adversarial examples of the reserve first, on the clean reserve then.

    Attributes:
        updates: optimizer steps in all.
        adversarial_updates: how many of them, from the first, see adversarial images only.
        schedule: of the rate: `cosine` to zero, or `constant`.
    """

    paper: ClassVar[str] = "arXiv:2202.06312"
    updates: int = 600
    adversarial_updates: int = 200
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("updates", 1)
        if not 0 <= self.adversarial_updates <= self.updates:
            raise ValueError(
                f"defense.{self.name}.adversarial_updates is {self.adversarial_updates}; "
                f"write 0 to {self.updates} (updates)"
            )
        self._one_of("schedule", "cosine", "constant")

    def defend(self, view: ReserveView) -> DefenseResult:
        recipe, hooks = self.recipe(self.updates, self.schedule), AdversarialStart(self, self.adversarial_updates)
        # Named as the plain fine-tune, so that without an adversarial step the two are the same, bit for bit.
        return DefenseResult(self.train(view, view.reserve, recipe, hooks, "fine_tuning"))


@defense("aft_code")
@dataclass(frozen=True)
class ReleasedAFT(AdversarialFineTuning):
    """AFT with the updates and the rate of the released script: 3 and 17 epochs of 391 batches."""

    updates: int = 20 * 391
    adversarial_updates: int = 3 * 391
    schedule: str = "constant"
    lr: float = 0.001
