"""Adaptive-Blend: half of a faint picture in training, all of it at test; cover images keep their label.

Paper: Qi, Xie, Li, Mahloujifar and Mittal, 2023, arXiv:2205.13613.
Differs: the paper blends in a cartoon that is not free to ship; ours is a seeded picture of smooth coloured
shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.engine.data import generator
from bench.engine.settings import count, number, share
from bench.engine.training import Tensors

from .base import Attack, Setup, attack


@attack("adaptive_blend")
@dataclass(frozen=True)
class AdaptiveBlend(Attack):
    """image + alpha mask (picture - image); the mask is drawn for each training image, and full at test.

    150 poisoned images of 50,000 are few, and covers work against them: ASR varies much from seed to seed.
    """

    paper: ClassVar[str] = "arXiv:2205.13613"
    label_modes: ClassVar[tuple[str, ...]] = ("all_to_one", "all_to_all")
    regimes: ClassVar[tuple[str, ...]] = ("static",)
    poison_rate: float = 0.003
    cover_rate: float = 0.003
    alpha: float = share(0.2, "opacity at test time", above=0)
    alpha_train: float = number(0.15, "opacity in training; negative takes `alpha`", at_most=1)
    pieces_per_side: int = count(4, "the mask is made of this number of pieces, squared", at_least=1)
    mask_rate: float = share(0.5, "share of the pieces that a training image lacks", below=1)

    def check(self, class_counts: list[int], shape: tuple[int, int, int]) -> None:
        super().check(class_counts, shape)
        if self.pieces_per_side > min(shape[1:]):
            raise ValueError(
                f"attack.adaptive_blend.pieces_per_side is {self.pieces_per_side}, more than pixels; "
                f"write at most {min(shape[1:])}"
            )

    def prepare(self, setup: Setup) -> Tensors:
        channels, height, width = setup.trainset.images.shape[1:]
        coarse = torch.rand(1, channels, 4, 4, generator=generator(setup.seed, "adaptive_blend picture"))
        smooth = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0]
        # As in a cartoon: full colours, soft edges.
        return {"picture": ((smooth - 0.5) * 4 + 0.5).clamp(0, 1).to(setup.device)}

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        return torch.lerp(images, tensors["picture"].expand_as(images), self.alpha)

    def stamp_poison(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        alpha = self.alpha if self.alpha_train < 0 else self.alpha_train
        mask = self.masks(len(images), images.shape[-2], images.shape[-1], source)
        return torch.lerp(images, tensors["picture"].expand_as(images), mask.mul_(alpha))

    def masks(self, count: int, height: int, width: int, source: torch.Generator) -> Tensor:
        """(B, 1, H, W) of 0 and 1: the same number of pieces is missing in each, others each time."""
        side, device = self.pieces_per_side, source.device
        shuffled = torch.rand(count, side * side, generator=source, device=device).argsort(dim=1)
        shown = (shuffled >= round(self.mask_rate * side * side)).float().view(count, 1, side, side)
        row = torch.arange(height, device=device) * side // height
        column = torch.arange(width, device=device) * side // width
        return shown[:, :, row[:, None], column]
