"""Label-Consistent: target-class images made hard by PGD, with a chequered tile in each corner; labels stay.

Paper: Turner, Tsipras and Madry, 2019, arXiv:1912.02771.
Differs: the network under PGD is trained by the victim's own recipe on clean data, not adversarially; the
tiles keep their share of the image (three pixels of 32); `poison_rate` is a share of all images, not of the
target class. A tainted reserve gets the tiles alone: its images were not there when the perturbations were
made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.engine.adversarial import pgd
from bench.engine.counts import images_of
from bench.engine.data import ImageSet, generator, to_float, to_uint8
from bench.engine.settings import count, pixels
from bench.engine.training import Tensors

from .base import POISON, Attack, Setup, attack

RIGHT_TILE = [[0, 0, 1], [0, 1, 0], [1, 0, 1]]  # both right corners; the left ones hold its mirror image


@attack("label_consistent")
@dataclass(frozen=True)
class LabelConsistent(Attack):
    """PGD away from the true class, then four corner tiles; at test time the tiles alone."""

    paper: ClassVar[str] = "arXiv:1912.02771"
    label_modes: ClassVar[tuple[str, ...]] = ("clean_label",)
    regimes: ClassVar[tuple[str, ...]] = ("static",)
    # Half of the class at ten classes. Below 0.01 the attack fails, at the whole class clean accuracy falls.
    poison_rate: float = 0.05
    label_mode: str = "clean_label"
    epsilon: float = pixels(8 / 255, "L-infinity radius of PGD; 0 leaves the images as they are")
    step_size: float = pixels(1.5 / 255, "step of PGD, in pixel units")
    steps: int = count(100, "number of steps of PGD")
    amplitude: float = pixels(
        1.0,
        "what white pixels of the tiles gain and black ones lose on poisoned training images; 1 "
        "overwrites, 32 / 255 is the stealthy setting of the paper. At test time it is always 1",
        above=0,
    )
    patch_size: int = count(
        3,
        "pixels a side of a tile on an image 32 pixels wide; other sizes scale with the image, down "
        "to the three pixels that the pattern needs",
        at_least=3,
        at_most=16,
    )

    def prepare(self, setup: Setup) -> Tensors:
        trainset = setup.trainset
        height, width = trainset.images.shape[-2:]
        tile_size = [max(3, round(self.patch_size * length / 32)) for length in (height, width)]
        tile = torch.tensor(RIGHT_TILE, dtype=torch.float32).mul(2).sub(1)  # white 1, black -1
        tile = F.interpolate(tile[None, None], size=tile_size, mode="nearest")[0]
        corners = torch.zeros(1, height, width)
        for rows in (slice(None, tile_size[0]), slice(-tile_size[0], None)):
            corners[:, rows, -tile_size[1] :] = tile
            corners[:, rows, : tile_size[1]] = tile.flip(-1)

        # The same source and counts as in `poison`: PGD is spent on the images that it will draw, no others.
        source = generator(setup.seed, "poison")
        counts = images_of(self.poison_rate, len(trainset)), images_of(self.cover_rate, len(trainset))
        victims = (self.choose(trainset.labels, source, *counts) == POISON).nonzero().flatten()
        perturbed = trainset.batch(victims)
        if len(victims) and self.steps and self.epsilon:
            self._perturb(setup, perturbed)
        return {"corners": corners.to(setup.device), "victims": victims, "perturbed": perturbed}

    def _perturb(self, setup: Setup, images: Tensor) -> None:
        """Turn uint8 images of the target class into their adversarial versions, in place."""
        model = setup.surrogate()
        right = 0
        for chunk in images.split(256):
            labels = torch.full((len(chunk),), self.target_label, device=chunk.device)
            hard = pgd(
                model,
                to_float(chunk),
                labels,
                epsilon=self.epsilon,
                step_size=self.step_size,
                steps=self.steps,
            )
            chunk.copy_(to_uint8(hard))
            with torch.no_grad():
                right += int((model(to_float(chunk)).argmax(1) == labels).sum())
        # Far from 0 the perturbation hides too little of the class, and the tiles need not be learned.
        setup.log.record("label_consistent/surrogate_accuracy_on_perturbed", right / len(images), 0)

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        return (images + tensors["corners"]).clamp_(0, 1)

    def stamp_poison(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        return (images + self.amplitude * tensors["corners"]).clamp_(0, 1)

    def poison(
        self, clean: ImageSet, tensors: Tensors, num_classes: int, seed: int, rate: float | None = None
    ) -> tuple[ImageSet, Tensor]:
        if rate is not None:  # a tainted reserve: other images, of which no perturbation is known
            return super().poison(clean, tensors, num_classes, seed, rate)
        images = clean.images.clone()
        images[tensors["victims"].to(images.device)] = tensors["perturbed"].to(images.device)
        poisoned, roles = super().poison(ImageSet(images, clean.labels), tensors, num_classes, seed)
        if not torch.equal((roles == POISON).nonzero().flatten(), tensors["victims"]):
            raise ValueError(
                "attack.label_consistent perturbed other images than this seed poisons; prepare it with the "
                "same training set, seed and device"
            )
        return poisoned, roles
