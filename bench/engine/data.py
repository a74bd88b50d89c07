"""Images as uint8 tensors on the device: batching and augmentation without any per-image Python."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RESIDENT = 0.25  # of a GPU's free memory; a larger set stays on the host, and its batches are brought over


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random source made of a seed and words for its purpose: other words, independent numbers."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def to_float(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [0, 1]; float images pass."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def to_uint8(images: Tensor) -> Tensor:
    """float images in [0, 1] -> uint8, rounded: truncation would darken a quarter of all grey values."""
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class ImageSet:
    """Images with labels, on one device; the images of a set too large for it may lie elsewhere.

    Attributes:
        images: (N, C, H, W) uint8. A part of them is had by `batch`, which knows where they lie.
        labels: (N,) int64, on the device that all work is done on.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise TypeError(f"images must be (N, C, H, W) uint8, not {tuple(self.images.shape)} {self.images.dtype}")
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"{len(self.images)} images came with labels of shape {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """What all work is done on."""
        return self.labels.device

    def __getitem__(self, index: Tensor | slice) -> ImageSet:
        selection = ImageSet(self.images[self._there(index)], self.labels[index])
        return selection if selection.images.device == self.device else selection.to(self.device)

    def batch(self, index: Tensor | slice) -> Tensor:
        """(B, C, H, W) uint8, on the device: the images of these numbers."""
        return self.images[self._there(index)].to(self.device, non_blocking=True)

    def to(self, device: torch.device | str) -> ImageSet:
        """The set for work on a device; the images stay where they are if a GPU has no room for them."""
        device = torch.device(device)
        fits = device.type != "cuda" or self.images.nbytes <= RESIDENT * torch.cuda.mem_get_info(device)[0]
        return ImageSet(self.images.to(device) if fits else self.images, self.labels.to(device))

    def _there(self, index: Tensor | slice) -> Tensor | slice:
        return index if isinstance(index, slice) else torch.as_tensor(index).to(self.images.device)

    def chunks(self, size: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images and labels in order, `size` at a time: for evaluation."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield to_float(self.batch(rows)), self.labels[rows]


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flip and rotation of a whole batch, each image with draws of its own.

    Attributes:
        crop: largest shift as a share of the width; 1/8 is the usual four pixels of 32. Zeros are moved in.
        flip: mirror half of the images.
        rotation: largest angle in degrees.
    """

    crop: float = 0.0
    flip: bool = False
    rotation: float = 0.0

    def __str__(self) -> str:
        mirrored = "mirrored at random" if self.flip else "not mirrored"
        return f"shifted by up to {self.crop:.3g} of the width, {mirrored}, turned by up to {self.rotation:g} degrees"

    def __call__(self, images: Tensor, source: torch.Generator) -> Tensor:
        """Augment (B, C, H, W) images, uint8 or float; returns float32 in [0, 1], channels last in memory."""
        count, _, height, width = images.shape
        device = images.device
        pad = round(self.crop * width)
        if pad or self.flip:
            shift = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=source, device=device)
            mirror = torch.rand(count, 1, generator=source, device=device) < (0.5 if self.flip else 0.0)
            row = torch.arange(height, device=device) + shift[0]  # (B, H)
            column = torch.arange(width, device=device).expand(count, width)
            column = torch.where(mirror, width - 1 - column, column) + shift[1]  # (B, W)
            padded = F.pad(images, (pad, pad, pad, pad))
            picked = torch.arange(count, device=device)[:, None, None]
            # One gather does crop and flip, and leaves (B, H, W, C): channels last without a copy.
            images = padded[picked, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
        images = to_float(images)
        if self.rotation:
            angle = torch.rand(count, generator=source, device=device).mul_(2).sub_(1).mul_(self.rotation).deg2rad_()
            # Columns and rows are in units of half the width and half the height.
            ratio = height / width
            cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
            matrix = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], dim=1).view(count, 2, 3)
            grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
            images = F.grid_sample(images, grid, align_corners=False).clamp_(0, 1)
        return images.contiguous(memory_format=torch.channels_last)


def equal_batches(count: int, batch_size: int) -> tuple[int, int]:
    """How many batches an epoch has, and how large each is.

    All batches are equally large, so that no tiny last one upsets batch norm and shapes stay constant; fewer
    images than batches are left out of an epoch, others each time.
    """
    batches = -(-count // batch_size)
    return batches, count // batches
