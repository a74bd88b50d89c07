"""FTrojan: a middle and the highest frequency of the colour channels are raised in every window of the image.

Paper: Wang, Yao, Xu, An, Tong and Wang, 2022, arXiv:2111.10991.
Differs: the whole path is in floats. The reference codes truncate the colour transform to 8 bits, which alone
changes most pixels and casts a colour over the image; there, much of the trigger is that cast. Without it all
steps are linear, so the trigger is one additive picture, drawn once. The colour transform is inverted
exactly, which keeps the luma. The magnitude follows the window, so that a pixel changes as much on any image size;
magnitude and poison rate are BackdoorBench's (the paper's code: 20, at 2 % of CIFAR-10).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.engine.settings import choice, count, number
from bench.engine.training import Tensors

from .base import Attack, Setup, attack

RED, GREEN, BLUE = 0.299, 0.587, 0.114  # their shares of the luma (ITU-R BT.601)
BANDS = ("middle_high", "high")


@attack("ftrojan")
@dataclass(frozen=True)
class FTrojan(Attack):
    """image + a fixed picture made of one or two cosine coefficients a window in Cr and Cb, clipped."""

    paper: ClassVar[str] = "arXiv:2111.10991"
    magnitude: float = number(
        30.0,
        "what is added to a coefficient of a 32-pixel window, on the scale of 0 to 255; windows of w "
        "pixels take w / 32 of it: a coefficient changes Cr or Cb by at most magnitude / 16 levels a "
        "pixel",
        above=0,
        at_most=2040,
    )
    bands: str = choice(
        "middle_high",
        "`middle_high` raises coefficients (w/2 - 1, w/2 - 1) and (w - 1, w - 1), `high` the second",
        BANDS,
    )
    window: int = count(0, "pixels a side, a divisor of height and width; 0 takes the largest one up to 32")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window and self.window < 4:
            raise ValueError(f"attack.ftrojan.window is {self.window}; write at least 4 pixels, or 0 for the largest")

    def check(self, class_counts: list[int], shape: tuple[int, int, int]) -> None:
        super().check(class_counts, shape)
        channels, height, width = shape
        if channels not in (1, 3):
            raise ValueError(f"attack.ftrojan takes grey or RGB images, not {channels} channels; choose another attack")
        window = self._window(height, width)
        if window < 4 or height % window or width % window:
            fits = [side for side in range(4, 65) if height % side == 0 and width % side == 0]
            raise ValueError(
                f"attack.ftrojan.window is {window}; it must be at least 4 and divide {height} and {width}; "
                f"write {' or '.join(map(str, fits)) or 'another dataset.size'}"
            )

    def prepare(self, setup: Setup) -> Tensors:
        channels, height, width = setup.trainset.images.shape[1:]
        window = self._window(height, width)
        transform = cosine_transform(window)
        spectrum = torch.zeros(window, window, dtype=torch.float64)
        for index in (window - 1,) if self.bands == "high" else (window // 2 - 1, window - 1):
            spectrum[index, index] = self.magnitude * window / 32
        chroma = (transform.T @ spectrum @ transform / 255).repeat(height // window, width // window)
        if channels == 1:
            picture = chroma[None]
        else:
            # Cr = 0.713 (R - Y) and Cb = 0.564 (B - Y) rise by `chroma` while Y stays: solved for R, G, B.
            red, blue = chroma / 0.713, chroma / 0.564
            picture = torch.stack([red, -(RED * red + BLUE * blue) / GREEN, blue])
        return {"picture": picture.float().to(setup.device)}  # (C, H, W)

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        return (images + tensors["picture"]).clamp_(0, 1)

    def _window(self, height: int, width: int) -> int:
        common = math.gcd(height, width)
        return self.window or max(side for side in range(1, 33) if common % side == 0)


def cosine_transform(size: int) -> Tensor:
    """(size, size) float64: the orthonormal DCT-II; `matrix @ image @ matrix.T` is an image's spectrum."""
    order = torch.arange(size, dtype=torch.float64)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi / size * (order + 0.5) * order[:, None])
    matrix[0] /= math.sqrt(2)
    return matrix
