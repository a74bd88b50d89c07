"""Blended: a whole picture mixed into the image at low opacity.

Paper: Chen, Liu, Li, Lu and Song, 2017, arXiv:1712.05526.
Differs: the papers blend in a cartoon that is not free to ship; ours is a seeded noise picture (the paper's second
pattern) or a picture of smooth coloured shapes drawn by the code below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.engine.data import generator
from bench.engine.settings import choice, number, share
from bench.engine.training import Tensors

from .base import Attack, Setup, attack


@attack("blended")
@dataclass(frozen=True)
class Blended(Attack):
    """(1 - alpha) image + alpha picture."""

    paper: ClassVar[str] = "arXiv:1712.05526"
    alpha: float = share(0.2, "opacity at test time; 0.2 in BackdoorBench, 0.1 in PBE and PUD")
    alpha_train: float = number(-1.0, "opacity in training; negative takes `alpha`", at_most=1)
    picture: str = choice(
        "noise",
        "`noise` (each pixel uniform) or `shapes` (smooth coloured blobs)",
        ("noise", "shapes"),
    )

    def prepare(self, setup: Setup) -> Tensors:
        shape = setup.trainset.images.shape[1:]
        source = generator(setup.seed, "blended picture")
        if self.picture == "noise":
            picture = torch.rand(shape, generator=source)
        else:
            coarse = torch.rand(1, shape[0], 4, 4, generator=source)
            smooth = F.interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=False)[0]
            picture = ((smooth - 0.5) * 4 + 0.5).clamp(0, 1)  # hard colours with soft edges
        return {"picture": picture.to(setup.device)}

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        return torch.lerp(images, tensors["picture"].expand_as(images), self.alpha)

    def stamp_poison(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        alpha = self.alpha if self.alpha_train < 0 else self.alpha_train
        return torch.lerp(images, tensors["picture"].expand_as(images), alpha)
