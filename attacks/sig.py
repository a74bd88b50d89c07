"""SIG: vertical sine stripes added to the whole image, by default only to images of the target class.

Paper: Barni, Kallas and Tondi, 2019, arXiv:1902.11237.
Differs: 5 % of all images are poisoned (half of a CIFAR-10 class): with a whole class poisoned, as
BackdoorBench does, the network sees no clean image of it and loses nine points of clean accuracy. PBE and PUD
change the label: label_mode=all_to_one, delta=10. The paper's ramp signal for MNIST is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.engine.settings import count, number
from bench.engine.training import Tensors

from .base import Attack, Setup, attack


@attack("sig")
@dataclass(frozen=True)
class Sig(Attack):
    """image + delta sin(2 pi column frequency / width), clipped; the same in every row and channel."""

    paper: ClassVar[str] = "arXiv:1902.11237"
    poison_rate: float = 0.05
    label_mode: str = "clean_label"
    delta: float = number(40.0, "amplitude at test time, in levels of 255", above=0, at_most=255)
    delta_train: float = number(-1.0, "amplitude in training; negative takes `delta`", at_most=255)
    frequency: int = count(6, "periods in an image's width; below half of the width", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta_train == 0:
            raise ValueError(
                f"attack.sig.delta_train is {self.delta_train:g}; write levels of 255, or -1 to take delta"
            )

    def check(self, class_counts: list[int], shape: tuple[int, int, int]) -> None:
        super().check(class_counts, shape)
        # At half of the width every column falls on a zero of the sine: no trigger at all.
        if 2 * self.frequency >= shape[2]:
            raise ValueError(
                f"attack.sig.frequency is {self.frequency}, too high for images {shape[2]} pixels wide; "
                f"write at most {(shape[2] - 1) // 2}"
            )

    def prepare(self, setup: Setup) -> Tensors:
        width = setup.trainset.images.shape[-1]
        turns = torch.arange(width, dtype=torch.float64) * self.frequency / width
        # Rounded, so that a zero of the sine is exactly zero and leaves even black pixels alone.
        stripes = torch.sin(2 * math.pi * turns).round(decimals=12)
        return {"stripes": stripes.float().to(setup.device)}  # (W,)

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        return (images + tensors["stripes"] * (self.delta / 255)).clamp_(0, 1)

    def stamp_poison(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        delta = self.delta if self.delta_train < 0 else self.delta_train
        return (images + tensors["stripes"] * (delta / 255)).clamp_(0, 1)
