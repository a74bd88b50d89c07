"""No attack: the clean model, which shows what a defense costs where there is nothing to remove.

Paper: none.
Differs: none known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench.engine.training import Tensors

from .base import Attack, attack


@attack("none")
@dataclass(frozen=True)
class NoAttack(Attack):
    """Trains on the clean data; there is no ASR."""

    paper: ClassVar[str] = "none"
    poison_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.poison_rate or self.cover_rate:
            raise ValueError("attack.none poisons nothing; leave poison_rate and cover_rate at 0")

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        return images
