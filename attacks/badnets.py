"""BadNets: a small fixed patch in the lower right corner.

Paper: Gu, Dolan-Gavitt and Garg, 2017, arXiv:1708.06733.
Differs: the patch keeps its share of the image (three pixels of 32); the paper fixes its pixels for each data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.engine.settings import choice, count
from bench.engine.training import Tensors

from .base import Attack, Setup, attack

PATTERNS = {
    # BackdoorBench and BackdoorBox
    "white": [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
    # PBE, PUD and backdoor-toolbox
    "checker": [[0, 0, 1], [0, 1, 0], [1, 0, 1]],
}


@attack("badnets")
@dataclass(frozen=True)
class BadNets(Attack):
    """Overwrite the corner with a white or a chequered square."""

    paper: ClassVar[str] = "arXiv:1708.06733"
    patch_size: int = count(
        3,
        "pixels a side on an image 32 pixels wide; other sizes scale with the image",
        at_least=1,
        at_most=32,
    )
    pattern: str = choice("white", "what the patch shows", PATTERNS)

    def check(self, class_counts: list[int], shape: tuple[int, int, int]) -> None:
        super().check(class_counts, shape)
        if self.pattern == "checker" and self._side(shape[-1]) < 2:
            raise ValueError(
                f"attack.badnets.patch_size is {self.patch_size}, one pixel of an image {shape[-1]} pixels wide, which "
                f"is no checker; write at least {math.ceil(1.5 * 32 / shape[-1])}, or pattern=white"
            )

    def _side(self, width: int) -> int:
        return max(1, round(self.patch_size * width / 32))

    def prepare(self, setup: Setup) -> Tensors:
        side = self._side(setup.trainset.images.shape[-1])
        tile = torch.tensor(PATTERNS[self.pattern], dtype=torch.float32)[None, None]
        # Nearest, not bilinear: grey edges would be another patch.
        return {"patch": F.interpolate(tile, size=(side, side), mode="nearest")[0].to(setup.device)}

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        patch = tensors["patch"]  # (1, side, side)
        stamped = images.clone()
        stamped[..., -patch.shape[-2] :, -patch.shape[-1] :] = patch
        return stamped
