"""Adaptive-Patch: one of four faint patches in training, opaque ones at test; cover images keep their label.

Paper: Qi, Xie, Li, Mahloujifar and Mittal, 2023, arXiv:2205.13613.
Differs: three of the paper's patches are artwork that is not free to ship; ours are seeded patterns of equal
size and opacity. The 5x5 patch stands above the corner's chequers and not where they are, so that the patches
shown together at test are all whole. Patches keep their share of the image on other sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.engine.data import generator
from bench.engine.settings import choice
from bench.engine.training import Tensors

from .base import Attack, Setup, attack

# On an image of 32x32: pixels a side, opacity in training, (row, column) of each copy's upper left pixel.
PATCHES = {
    "blocks": (5, 0.5, ((24, 27),)),
    "logo": (13, 0.2, ((1, 18),)),
    "checker": (3, 0.5, ((0, 0), (0, 29), (29, 0), (29, 29))),
    "square": (8, 0.3, ((21, 21),)),
}
# What is shown at test, at full opacity; the blocks then stand in both lower corners.
TEST_TRIGGERS = {"corners": ("blocks", "blocks_left", "checker"), "logo_square": ("logo", "square")}


@attack("adaptive_patch")
@dataclass(frozen=True)
class AdaptivePatch(Attack):
    """Each poisoned or cover image gets exactly one patch, a quarter of them each.

    150 poisoned images of 50,000 are few, and covers work against them: ASR varies much from seed to seed.
    """

    paper: ClassVar[str] = "arXiv:2205.13613"
    label_modes: ClassVar[tuple[str, ...]] = ("all_to_one", "all_to_all")
    regimes: ClassVar[tuple[str, ...]] = ("static",)
    poison_rate: float = 0.003
    cover_rate: float = 0.006
    test_triggers: str = choice(
        "corners",
        "`corners` (5x5 blocks in both lower corners and chequers in all; the paper's choice for "
        "CIFAR-10) or `logo_square` (the 13x13 and the 8x8 patch; for GTSRB)",
        TEST_TRIGGERS,
    )

    def prepare(self, setup: Setup) -> Tensors:
        shape = setup.trainset.images.shape[1:]
        source = generator(setup.seed, "adaptive_patch patterns")
        tiles = {
            "blocks": torch.rand(shape[0], 5, 5, generator=source).round(),
            "logo": F.interpolate(
                torch.rand(1, shape[0], 3, 3, generator=source).round(), size=(13, 13), mode="bilinear"
            )[0],
            "checker": torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]]).expand(shape[0], 3, 3),
            "square": torch.rand(shape[0], 8, 8, generator=source),
        }
        placed = {name: place(tiles[name], *PATCHES[name], shape) for name in PATCHES}
        mirrored = ((24, 0),)
        placed["blocks_left"] = place(tiles["blocks"], 5, 0.5, mirrored, shape)
        picture, mask = torch.zeros(shape), torch.zeros(1, *shape[1:])
        for name in TEST_TRIGGERS[self.test_triggers]:
            shown = placed[name][1] > 0
            picture, mask = torch.where(shown, placed[name][0], picture), torch.where(shown, 1.0, mask)
        tensors = {
            "patches": torch.stack([placed[name][0] for name in PATCHES]),  # (4, C, H, W)
            "opacities": torch.stack([placed[name][1] for name in PATCHES]),  # (4, 1, H, W)
            "test_picture": picture,
            "test_mask": mask,
        }
        return {name: value.to(setup.device) for name, value in tensors.items()}

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        return torch.lerp(images, tensors["test_picture"].expand_as(images), tensors["test_mask"])

    def stamp_poison(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        # Counted off, not drawn: of 150 images each patch gets 37 or 38. The first one is drawn.
        order = torch.randperm(len(images), generator=source, device=images.device)
        start = torch.randint(4, (1,), generator=source, device=images.device)
        which = (order + start) % 4
        return torch.lerp(images, tensors["patches"][which], tensors["opacities"][which])


def place(
    tile: Tensor, side: int, opacity: float, corners: tuple[tuple[int, int], ...], shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """A tile drawn for 32 pixels, on an image of any size: its (C, H, W) picture and (1, H, W) opacity."""
    height, width = shape[1:]
    picture, mask = torch.zeros(shape), torch.zeros(1, height, width)
    rows, columns = (max(1, round(side * pixels / 32)) for pixels in (height, width))
    # Nearest, not bilinear: grey edges would be another patch.
    scaled = F.interpolate(tile[None], size=(rows, columns), mode="nearest")[0]
    for row, column in corners:
        top = min(round(row * height / 32), height - rows)
        left = min(round(column * width / 32), width - columns)
        picture[:, top : top + rows, left : left + columns] = scaled
        mask[:, top : top + rows, left : left + columns] = opacity
    return picture, mask
