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

from bench.engine.adversarial import pgd
from bench.engine.data import ImageSet
from bench.engine.inference import under_attack
from bench.engine.models import Classifier
from bench.engine.settings import choice, count, number, pixels, plain
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, ReserveView, TrainsetView, defense


@dataclass(frozen=True)
class AdversarialRepair(Defense):
    """Base of AFT, PBE and PUD: SGD, and the attack on the model under repair that makes its training images."""

    epsilon: float = pixels(6 / 255, "radius of the attack, L-infinity in pixel units; 0 trains on clean images only")
    step_size: float = number(0.2, "step of the attack, as a share of epsilon", above=0)
    attack_steps: int = count(7, "gradient steps of the attack")
    random_start: bool = plain(False, "start anywhere in the ball; False starts at the image itself")
    attack_labels: str = choice(
        "given",
        "the classes to leave: `given`, or `predicted` by the model. Training takes the given ones",
        ("given", "predicted"),
    )
    attack_batch_norm: str = choice(
        "eval",
        "`eval`, or `train`, in which batch norm also learns from each iterate of the attack",
        ("eval", "train"),
    )
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4

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
        """Train the view's model on some of its images; attacks on it are made in the precision of the training."""
        if isinstance(hooks, AdversarialStart):
            hooks.precision = view.log.precision
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
        self.precision = "float32"

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if step >= self.updates or self.epsilon == 0:
            return images, labels
        left = labels
        if self.settings.attack_labels == "predicted":
            with under_attack(model) as fast, torch.no_grad():
                left = fast(images).argmax(dim=1)
        adversarial = pgd(
            model,
            images,
            left,
            epsilon=self.epsilon,
            step_size=self.step_size * self.epsilon,
            steps=self.settings.attack_steps,
            random_start=source if self.settings.random_start else None,
            eval_mode=self.settings.attack_batch_norm == "eval",
            precision=self.precision,
        )
        return adversarial, labels


@defense("aft")
@dataclass(frozen=True)
class AdversarialFineTuning(AdversarialRepair):
    """Fine-tune on untargeted adversarial examples of the reserve first, on the clean reserve then."""

    paper: ClassVar[str] = "arXiv:2202.06312"
    version: ClassVar[int] = 2  # attacks in the precision of the training
    updates: int = count(600, "optimizer steps in all", at_least=1)
    adversarial_updates: int = count(200, "how many of them, from the first, see adversarial images only")
    schedule: str = choice("cosine", "course of the learning rate: `cosine` goes to zero", ("cosine", "constant"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adversarial_updates > self.updates:
            raise ValueError(
                f"defense.{self.name}.adversarial_updates is {self.adversarial_updates}; "
                f"write 0 to {self.updates} (updates)"
            )

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
