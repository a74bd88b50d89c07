"""BppAttack: fewer levels of each colour are the trigger; noise of that kind from another image is not.

Paper: Wang, Zhai and Ma, 2022, arXiv:2205.13383.
Differs: a tenth of the images is poisoned, a tenth negative (BackdoorBench; the paper's code has a fifth of
each). A negative sample takes its residual from another image that is made negative with it, not from a list
over the whole training set. Dithering clips to [0, 1]; it runs along a slanted front, with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.engine.settings import count, plain, share
from bench.engine.training import Tensors

from .base import Ramping, attack


@attack("bpp")
@dataclass(frozen=True)
class Bpp(Ramping):
    """Round every pixel of every channel to one of a few equally spaced levels."""

    paper: ClassVar[str] = "arXiv:2205.13383"
    has_wrong_trigger: ClassVar[bool] = True
    before_augmentation: ClassVar[bool] = True
    regime: str = "per_batch"
    cover_rate: float = share(
        0.1, "share of negative samples: they carry another image's rounding error and keep their label"
    )
    levels: int = count(
        8,
        "values that a pixel can take, from 2 to 128; 8 is the code's default, 32 its CIFAR-10 command",
        at_least=2,
        at_most=128,
    )
    dither: bool = plain(False, "spread each pixel's rounding error over its neighbours (Floyd and Steinberg)")

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        if self.dither:
            return dithered(images, self.levels)
        return images.mul(self.levels - 1).round_().div_(self.levels - 1)

    def stamp_cover(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        residual = self.stamp(images, tensors) - images
        if len(images) > 1:
            # One random cycle through all: no image gets its own residual, which would be the trigger.
            order = torch.randperm(len(images), generator=source, device=images.device)
            other = torch.empty_like(residual)
            other[order] = residual[order.roll(1)]
        else:
            other = residual.flip(-1, -2)  # there is no other image; upside down it is noise to this one as well
        return other.add_(images).clamp_(0, 1)


def dithered(images: Tensor, levels: int) -> Tensor:
    """Floyd-Steinberg dithering of (B, C, H, W) images in [0, 1] to equally spaced levels.

    A pixel waits for its left neighbour and for three above it, so all pixels (i, j) of one 2i + j are done
    at once: width + 2 height steps in place of width x height.
    """
    height, width = images.shape[-2:]
    row = torch.arange(height, device=images.device)
    front = 2 * row[:, None] + torch.arange(width, device=images.device)  # (H, W)
    # waiting[f] holds the pixels of front f; three fronts and one row more take what leaves the image.
    waiting = images.new_zeros(width + 2 * height + 1, height + 1, *images.shape[:2])
    inside = torch.zeros(waiting.shape[:2], dtype=images.dtype, device=images.device)
    inside[front, row[:, None]] = 1
    waiting[front, row[:, None]] = images.permute(2, 3, 0, 1)
    for now in range(width + 2 * (height - 1)):
        rounded = waiting[now].mul(levels - 1).round_().div_(levels - 1).clamp_(0, 1)
        error = (waiting[now] - rounded).mul_(inside[now, :, None, None])[:height]
        waiting[now] = rounded
        waiting[now + 1, :height].add_(error, alpha=7 / 16)  # to the right
        waiting[now + 1, 1:].add_(error, alpha=3 / 16)  # down and left
        waiting[now + 2, 1:].add_(error, alpha=5 / 16)  # down
        waiting[now + 3, 1:].add_(error, alpha=1 / 16)  # down and right
    return waiting[front, row[:, None]].permute(2, 3, 0, 1).contiguous()
