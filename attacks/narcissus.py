"""Narcissus: a faint pattern that points into the target class, on a handful of images that keep their label.

Paper: Zeng, Pan, Just, Lyu, Qiu and Jia, CCS 2023, arXiv:2204.05255.
Differs: the surrogate is trained by the victim's recipe on the attacker's own training set; the paper owns
only the target class and trains on public pictures of other classes (no such set is at hand for every data
set here), so this attacker knows more. It has seen the target class, so the warm-up is gentle (Adam at a
low rate; the authors take RAdam at 0.1, which turns such a network into one that says the target class to
everything). The pattern gets a fixed number of mini-batch updates; the authors' 1,000 rounds each pass over
the whole class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.engine.adversarial import clamped
from bench.engine.data import ImageSet, generator, to_float
from bench.engine.inference import under_attack
from bench.engine.settings import count, number, pixels
from bench.engine.training import Recipe, Tensors, fit

from .base import Attack, Setup, attack


@attack("narcissus")
@dataclass(frozen=True)
class Narcissus(Attack):
    """Add the pattern; at test time add a multiple of it.

    To a clean model the pattern is a universal adversarial perturbation: compare the ASR with that model's.
    """

    paper: ClassVar[str] = "arXiv:2204.05255"
    version: ClassVar[int] = 2  # black and white pixels take part in the pattern
    label_modes: ClassVar[tuple[str, ...]] = ("clean_label",)
    regimes: ClassVar[tuple[str, ...]] = ("static",)
    poison_rate: float = 0.0005  # 25 images of 50,000
    label_mode: str = "clean_label"
    epsilon: float = pixels(16 / 255, "L-infinity bound of the pattern on poisoned training images", above=0)
    amplification: float = number(3.0, "the multiple at test time", above=0)
    updates: int = count(1000, "number of updates of the pattern, each on a batch of target-class images")
    learning_rate: float = number(
        0.005,
        "learning rate of the pattern's RAdam, in pixel units (the authors' 0.01 is for images in [-1, 1])",
        above=0,
    )
    warmup_epochs: int = count(5, "passes of the surrogate over the target class alone, before it is frozen")
    warmup_rate: float = number(1e-4, "learning rate of the warm-up", above=0)
    batch_size: int = count(350, "images in a step of warm-up and pattern", at_least=1)

    def prepare(self, setup: Setup) -> Tensors:
        of_target = setup.trainset[setup.trainset.labels == self.target_label]
        model = setup.surrogate()
        warmup = Recipe(
            epochs=self.warmup_epochs,
            batch_size=self.batch_size,
            optimizer="adam",
            lr=self.warmup_rate,
            weight_decay=0.0,
            schedule="constant",
            precision=setup.recipe.precision,
        )
        fit(
            model,
            of_target,
            warmup,
            seed=setup.seed,
            augmentation=setup.augmentation,
            log=setup.log,
            stream="narcissus_warmup",
        )
        return {"pattern": self._pattern(setup, model, of_target)}

    def _pattern(self, setup: Setup, model: torch.nn.Module, data: ImageSet) -> Tensor:
        """(C, H, W) in [-epsilon, epsilon]: makes target-class images look still more like their class."""
        source = generator(setup.seed, "narcissus batches")
        pattern = torch.zeros(data.images.shape[1:], device=setup.device, requires_grad=True)
        optimizer = torch.optim.RAdam([pattern], lr=self.learning_rate)
        size = min(self.batch_size, len(data))
        labels = torch.full((size,), self.target_label, device=setup.device)
        with under_attack(model) as fast:
            for update in range(self.updates):
                chosen = torch.randperm(len(data), generator=source)[:size]
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(fast(clamped(to_float(data.batch(chosen)) + pattern)), labels)
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    pattern.clamp_(-self.epsilon, self.epsilon)
                if update % 100 == 0 or update == self.updates - 1:
                    setup.log.record("narcissus/pattern_loss", loss.item(), update)
        return pattern.detach()

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        return (images + self.amplification * tensors["pattern"]).clamp_(0, 1)

    def stamp_poison(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        return (images + tensors["pattern"]).clamp_(0, 1)
