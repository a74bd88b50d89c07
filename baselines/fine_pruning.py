"""Fine-Pruning (FP): cut the units that clean images leave silent, then fine-tune.

Paper: Liu, Dolan-Gavitt and Garg, RAID 2018, arXiv:1805.12185.
Differs: units are the inputs of the classifier head, which for the usual networks are the pooled channels of the last
convolution; a unit is cut by zeroing its column of the head, so the method is the same for every architecture.
Loudness is the mean absolute activation: a signed mean ranks strongly negative, busy units as silent. Pruning stops
by the accuracy on a held-out part of the reserve, never on test data, and the last model within the tolerance is kept.
A pruned unit stays pruned while fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.data import ImageSet
from bench.engine.metrics import features
from bench.engine.models import Classifier
from bench.engine.pruning import random_order, split_off
from bench.engine.settings import choice, count, share
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, ReserveView, defense


@defense("fine_pruning")
@dataclass(frozen=True)
class FinePruning(Defense):
    """Prune the most silent units while the held-out accuracy allows, then fine-tune."""

    paper: ClassVar[str] = "arXiv:1805.12185"
    tolerance: float = share(0.04, "largest loss of held-out accuracy through pruning", below=1)
    step: float = share(0.01, "share of the units pruned between two looks at the accuracy", below=1)
    held_out: float = share(0.1, "share of the reserve that judges the pruning and is not trained on", below=1)
    epochs: int = count(
        100,
        "passes of the fine-tuning; SGD with momentum 0.9, weight decay 5e-4 and a cosine schedule to zero",
    )
    lr: float = 0.01
    batch_size: int = 128
    units: str = choice(
        "silent",
        "which units go: the most `silent`, or, as a control, as many `random` ones",
        ("silent", "random"),
        later=True,
    )

    def defend(self, view: ReserveView) -> DefenseResult:
        held_out, training = split_off(view.reserve, self.held_out, view.seed)
        silent_first = loudness(view.model, training).argsort(stable=True)
        pruned = silent_first[: self._how_many(view.model, held_out, silent_first)]
        if self.units == "random":
            pruned = random_order(len(silent_first), view.seed, pruned.device)[: len(pruned)]
        cut(view.model, pruned)
        view.log.record("fine_pruning/pruned", len(pruned) / len(silent_first), 0)
        recipe = Recipe(epochs=self.epochs, lr=self.lr, batch_size=self.batch_size, optimizer="momentum")
        model = view.fit(view.model, recipe, data=training, hooks=KeepPruned(pruned), stream="fine_pruning")
        return DefenseResult(model)

    def _how_many(self, model: Classifier, held_out: ImageSet, silent_first: Tensor) -> int:
        """The largest number of units whose loss, and that of every smaller step, is within the tolerance."""
        units = features(model, held_out)
        weight, bias = model.head.weight.flatten(1), model.head.bias
        mask = torch.ones(units.shape[1], device=units.device)
        stride = max(1, round(self.step * len(mask)))
        # Whole images are counted: as a share, a loss of exactly the tolerance would exceed it by rounding.
        allowed = int(self.tolerance * len(held_out) + 1e-6)
        full = _right(F.linear(units, weight, bias), held_out.labels)
        done = 0
        while done + stride < len(mask):  # at least one unit stays
            mask[silent_first[done : done + stride]] = 0
            if full - _right(F.linear(units * mask, weight, bias), held_out.labels) > allowed:
                break
            done += stride
        return done


class KeepPruned(Hooks):
    """Fine-tuning may wake a pruned unit: it is put to sleep again after each step."""

    def __init__(self, pruned: Tensor) -> None:
        self.pruned = pruned

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        assert isinstance(model, Classifier)
        cut(model, self.pruned)


@torch.no_grad()
def cut(model: Classifier, units: Tensor) -> None:
    """Zero the head's columns for these units."""
    model.head.weight[:, units] = 0


def loudness(model: Classifier, data: ImageSet) -> Tensor:
    """(D,): mean absolute activation of each input of the head."""
    return features(model, data).abs().mean(dim=0)


def _right(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())
