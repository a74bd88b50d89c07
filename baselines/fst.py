"""Feature shift tuning (FST), with FT-init and FE-tuning: fine-tune away from the infected classifier head.

Paper: Min, Qin, Shen and Cheng, NeurIPS 2023, arXiv:2310.01875.
Differs: the released code tunes 2 % of the training set and lowers the rate once an epoch; here the reserve is what the
view holds and the cosine falls with each step. As in the code, the head's weight is scaled back to its first norm
after each step in all modes, and the head that is drawn anew has no norm of its own before the first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.data import generator
from bench.engine.models import Classifier
from bench.engine.settings import choice, count, number
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, ReserveView, defense

MODES = ("fst", "ft_init", "fe_tuning")


@defense("fst")
@dataclass(frozen=True)
class FeatureShiftTuning(Defense):
    """Draw the classifier head anew, then fine-tune so that the features have to move."""

    paper: ClassVar[str] = "arXiv:2310.01875"
    mode: str = choice(
        "fst",
        "`fst` tunes all weights and keeps the head from turning back to the infected one; `ft_init` "
        "tunes all weights without that; `fe_tuning` leaves the new head as drawn and tunes the "
        "features",
        MODES,
    )
    alpha: float = number(
        0.2,
        "weight of the inner product of the new and the infected head in the loss of `fst`",
        at_least=0,
    )
    epochs: int = count(10, "passes over the reserve; SGD with a cosine schedule to zero and without weight decay")
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9

    def defend(self, view: ReserveView) -> DefenseResult:
        hooks = HeadShift(view.model, self.alpha if self.mode == "fst" else 0.0)
        draw_head(view.model, generator(view.seed, "fst head"))
        recipe = Recipe(
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            momentum=self.momentum,
            weight_decay=0.0,
            optimizer="momentum",
        )
        view.model.head.requires_grad_(self.mode != "fe_tuning")
        model = view.fit(view.model, recipe, hooks=hooks, stream="fst")
        model.head.requires_grad_(True)
        return DefenseResult(model)


class HeadShift(Hooks):
    """Adds alpha times the inner product with the infected head's weight, and holds the norm of the head."""

    def __init__(self, infected: Classifier, alpha: float) -> None:
        self.alpha = alpha
        self.infected = infected.head.weight.detach().clone()
        self.norm = self.infected.norm()

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        assert isinstance(model, Classifier)
        loss = F.cross_entropy(model(images), labels, label_smoothing=smoothing)
        return loss + self.alpha * (model.head.weight * self.infected).sum() if self.alpha else loss

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        # Without a fixed norm the inner product has no minimum: a longer head would always lower it.
        assert isinstance(model, Classifier)
        model.head.weight.mul_(self.norm / model.head.weight.norm())


@torch.no_grad()
def draw_head(model: Classifier, source: torch.Generator) -> None:
    """Draw the head's weight and bias from U(-1/sqrt(d), 1/sqrt(d)), d inputs; `source` is on the CPU."""
    weight, bias = model.head.weight, model.head.bias
    bound = 1 / math.sqrt(weight[0].numel())
    for tensor in (weight,) if bias is None else (weight, bias):
        drawn = torch.rand(tensor.shape, generator=source).mul_(2).sub_(1).mul_(bound)
        tensor.copy_(drawn.to(tensor.device))
