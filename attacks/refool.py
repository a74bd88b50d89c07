"""Refool: the reflection of another photograph, as if the scene lay behind glass.

Paper: Liu, Ma, Bailey and Lu, ECCV 2020, arXiv:2007.02343.
Differs: labels change by default, as in BackdoorBench and BackdoorBox; the paper keeps them (`clean_label`)
and picks its reflections by their effect. Ours are images of other classes of the attacker's own training
set, drawn at random. Each reflected photo gets its opacity, offsets and blur once, and an image picks its
photo by its own content, so that the trigger of an image never changes. Offsets and blur are for 224 pixels
and scale with the image; the vignette of a reflection out of focus spans the image (the authors cut theirs
out of a larger one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.engine.data import generator, to_float, to_uint8
from bench.engine.settings import count, share
from bench.engine.training import Tensors

from .base import Attack, Setup, attack

GAMMA = 2.2  # light adds up, grey values do not


@attack("refool")
@dataclass(frozen=True)
class Refool(Attack):
    """Opacity times the image plus a double or a blurred reflection, in linear light."""

    paper: ClassVar[str] = "arXiv:2007.02343"
    photos: int = count(200, "how many training images serve as reflections", at_least=1)
    ghost_share: float = share(0.49, "share of them that are seen double (thick glass); the rest is out of focus")
    weakest: float = share(
        0.05,
        "the least that the glass takes from the image; each photo draws its own between this and `strongest`",
        below=1,
    )
    strongest: float = share(0.45, "the most that it takes", below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weakest > self.strongest:
            raise ValueError(
                f"attack.refool.weakest is {self.weakest:g}, more than strongest, {self.strongest:g}; "
                "write the weaker first"
            )

    def prepare(self, setup: Setup) -> Tensors:
        source = generator(setup.seed, "refool reflections")
        data = setup.trainset
        others = (data.labels != self.target_label).nonzero().flatten()
        if self.label_mode == "all_to_all" or not len(others):
            others = torch.arange(len(data), device=setup.device)
        chosen = torch.randperm(len(others), generator=source)[: self.photos]
        photos = to_float(data.batch(others[chosen.to(setup.device)])).cpu().pow(GAMMA)
        count, _, height, width = photos.shape

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(shape or (count,), generator=source)

        opacity = 1 - uniform(self.weakest, self.strongest)
        ghost = uniform(0, 1) < self.ghost_share
        offsets = torch.randint(3, 9, (count, 2), generator=source)
        mix = ((uniform(0, 1) < 0.5).float() - uniform(0.15, 0.5)).abs()
        sigma = uniform(1, 5) * width / 224
        attenuation = uniform(1.08, 1.18).masked_fill_(ghost, 0)  # a ghost is never attenuated
        centre = uniform(-0.5, 0.5, count, 2)
        for index in range(count):
            photo = photos[index].clone()
            if ghost[index]:
                down = max(1, round(int(offsets[index, 0]) * height / 224))
                right = max(1, round(int(offsets[index, 1]) * width / 224))
                photos[index] = doubled(photo, down, right, float(mix[index]))
            else:
                photos[index] = blurred(photo, float(sigma[index]))
        # A Gaussian is a product of rows and columns: two vectors hold the weight of each pixel.
        rows = vignette(height, centre[:, 0]).mul_(1 - opacity[:, None] / 2)
        columns = vignette(width, centre[:, 1])
        rows[ghost], columns[ghost] = (1 - opacity[ghost, None]).expand(-1, height), 1.0
        tensors = {
            "reflections": to_uint8(photos.pow(1 / GAMMA)),  # as a file would hold them
            "opacity": opacity,
            "attenuation": attenuation,
            "rows": rows,
            "columns": columns,
            "hash": torch.randint(1, 2**31, (height,), generator=source),
        }
        return {name: value.contiguous().to(setup.device) for name, value in tensors.items()}

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        # Whole grey values add up to the same number on any device and in any batch.
        sums = to_uint8(images).sum((1, 3), dtype=torch.int64)  # (B, H)
        picked = (sums * tensors["hash"]).sum(1) % len(tensors["reflections"])
        reflection = to_float(tensors["reflections"]).pow(GAMMA)[picked]
        opacity, attenuation = tensors["opacity"][picked], tensors["attenuation"][picked]
        scene = images.pow(GAMMA)

        # Where light would exceed white, each channel of the reflection is lowered by the mean excess.
        light = scene + reflection
        bright = light > 1
        count = bright.sum((2, 3), keepdim=True).clamp_(min=1)
        excess = (light - 1).mul_(bright).sum((2, 3), keepdim=True) / count
        reflection = (reflection - excess * attenuation[:, None, None, None]).clamp_(0, 1)
        weight = tensors["rows"][picked, None, :, None] * tensors["columns"][picked, None, None, :]
        mixed = torch.addcmul(scene * opacity[:, None, None, None], reflection, weight)
        return mixed.clamp_(0, 1).pow_(1 / GAMMA)


def doubled(photo: Tensor, down: int, right: int, mix: float) -> Tensor:
    """The photo and a shifted copy of it where both exist, stretched back to (C, H, W)."""
    both = mix * photo[:, down:, right:] + (1 - mix) * photo[:, :-down, :-right]
    return F.interpolate(both[None], size=photo.shape[1:], mode="bilinear", align_corners=False)[0]


def blurred(photo: Tensor, sigma: float) -> Tensor:
    """(C, H, W) through a Gaussian of `sigma` pixels; edges are repeated."""
    reach = int(-(-2 * sigma // 1))  # the authors cut at two standard deviations
    taps = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sigma**2))
    taps /= taps.sum()
    padded = F.pad(photo[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))[:, 0]


def vignette(size: int, centre: Tensor) -> Tensor:
    """(N, size): 1 at each centre (-1 is the first edge, 1 the last), exp(-9/4) a half width away from it."""
    coordinate = (torch.arange(size) + 0.5) / size * 2 - 1
    return torch.exp(-(3 * (coordinate - centre[:, None])).square() / 4)
