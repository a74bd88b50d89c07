"""WaNet: a fixed smooth warp of less than a pixel is the trigger; jittered warps keep their true label.

Paper: Nguyen and Tran, ICLR 2021, arXiv:2102.10369.
Differs: offsets are divided by the width for columns and by the height for rows, so that they are the same in
pixels on images that are not square. The static regime (not in the paper) draws each cover's jitter once.
`cover_rate` is a share of all images, not a multiple of the poisoned ones: lower both together. Images are augmented
as is usual for the data set, without the authors' rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.engine.data import generator
from bench.engine.settings import count, number, plain, share
from bench.engine.training import Tensors

from .base import Ramping, Setup, attack


@attack("wanet")
@dataclass(frozen=True)
class WaNet(Ramping):
    """Sample the image along a slightly bent grid."""

    paper: ClassVar[str] = "arXiv:2102.10369"
    has_wrong_trigger: ClassVar[bool] = True
    before_augmentation: ClassVar[bool] = True
    regime: str = "per_batch"
    cover_rate: float = share(
        0.2,
        "share of images whose grid is jittered anew and that keep their label (the paper's noise mode, twice the "
        "poison rate); 0 turns it off, and the network then reacts to any warp",
    )
    strength: float = number(0.5, "about twice the mean offset of a pixel along each axis, in pixels", at_least=0)
    control_points: int = count(4, "points of the random field, a side; the rest is interpolated", at_least=2)
    grid_rescale: float = number(
        1.0, "factor on the whole grid, whose coordinates are in [-1, 1]; 1 leaves the image its size", above=0
    )
    scale_with_size: bool = plain(
        False,
        "multiply the strength by height / 32. Off, as in the paper: offsets are the same in pixels "
        "for every image size, a relatively weaker warp on larger images",
    )

    def prepare(self, setup: Setup) -> Tensors:
        height, width = setup.trainset.images.shape[-2:]
        source = generator(setup.seed, "wanet field")
        coarse = torch.rand(1, 2, self.control_points, self.control_points, generator=source).mul_(2).sub_(1)
        coarse /= coarse.abs().mean()
        field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0]
        strength = self.strength * (height / 32 if self.scale_with_size else 1.0)
        rows = torch.linspace(-1, 1, height)[:, None] + strength * field[1] / height
        columns = torch.linspace(-1, 1, width) + strength * field[0] / width
        # (column, row) is the order of `grid_sample`: the other one would transpose the image.
        grid = torch.stack([columns, rows], dim=-1)  # (H, W, 2)
        return {"grid": (grid * self.grid_rescale).clamp_(-1, 1).to(setup.device)}

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        return _sampled(images, tensors["grid"].expand(len(images), -1, -1, -1))

    def stamp_cover(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        height, width = images.shape[-2:]
        jitter = torch.rand(len(images), height, width, 2, generator=source, device=images.device)
        jitter.mul_(2).sub_(1)
        jitter[..., 0].div_(width)
        jitter[..., 1].div_(height)
        return _sampled(images, jitter.add_(tensors["grid"]).clamp_(-1, 1))


def _sampled(images: Tensor, grid: Tensor) -> Tensor:
    # Corners aligned, as in `linspace`: otherwise the straight grid would already blur the image.
    warped = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return warped.clamp_(0, 1)
