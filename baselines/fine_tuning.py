"""Fine-tuning (FT): train on the clean reserve; the control for every method that contains a fine-tune.

Paper: Liu, Dolan-Gavitt and Garg, RAID 2018, arXiv:1805.12185.
Differs: the settings are BackdoorBench's (100 epochs, SGD at 0.01, cosine, 256 images a batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.engine.settings import count
from bench.engine.training import Recipe
from defenses.base import Defense, DefenseResult, ReserveView, defense


@defense("fine_tuning")
@dataclass(frozen=True)
class FineTuning(Defense):
    """Train all weights on the reserve."""

    paper: ClassVar[str] = "arXiv:1805.12185"
    epochs: int = count(100, "passes over the reserve; SGD with a cosine schedule to zero")
    lr: float = 0.01
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def defend(self, view: ReserveView) -> DefenseResult:
        recipe = Recipe(
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            optimizer="momentum",
        )
        return DefenseResult(view.fit(view.model, recipe, stream="fine_tuning"))
