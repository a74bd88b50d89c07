"""FT-SAM: fine-tune with sharpness-aware minimisation, which shrinks the large weights that a backdoor leans on.

Paper: Zhu et al., ICCV 2023, arXiv:2304.11823.
Differs: the cosine schedule falls once over all epochs; the released code steps it with each batch, so that its rate
rises and falls many times. rho is 2 for every data set, as the released code runs: the 8 that its settings name for
GTSRB (without label smoothing) and Tiny-ImageNet is overridden by the defaults of its command line. Epochs are 100
everywhere, where it has 50 on GTSRB (`defense.ft_sam.epochs`).
As released, smoothing shares `label_smoothing` among the other classes, so that 0.1 leaves the true class 0.9. (torch
shares it among all classes, which leaves the true class of ten 0.91.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.engine.settings import count, number
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, ReserveView, defense


@defense("ft_sam")
@dataclass(frozen=True)
class FineTuningSAM(Defense):
    """Fine-tune all weights by the gradient at the worst point near them."""

    paper: ClassVar[str] = "arXiv:2304.11823"
    version: ClassVar[int] = 2  # smoothing among the other classes alone
    rho: float = number(
        2.0,
        "how far that point is, as the length of the change relative to each weight; 0 is plain fine- tuning",
        at_least=0,
    )
    label_smoothing: float = number(
        0.1,
        "what the classes other than the true one share of an image's label",
        at_least=0,
        below=0.5,
    )
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
            # torch gives the true class its part of what is shared, so more has to be shared.
            label_smoothing=self.label_smoothing * view.num_classes / (view.num_classes - 1),
        )
        # The stream of plain fine-tuning: with rho=0 and no smoothing the two are the same, bit for bit.
        model = view.fit(view.model, recipe, hooks=SharpnessAware(self.rho), stream="fine_tuning")
        return DefenseResult(model)


class SharpnessAware(Hooks):
    """The loss at the weights after a step uphill; its gradient is applied to the weights before it."""

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        here = super().loss(model, images, labels, smoothing)
        if self.rho == 0:
            return here
        weights = dict(model.named_parameters())
        slopes = torch.autograd.grad(here, list(weights.values()), materialize_grads=True)
        steps = ascent(list(weights.values()), slopes, self.rho)
        # The weights themselves never move, so that nothing is to be put back; and the second pass writes its running
        # statistics into copies, because they are those of other weights.
        above = {name: weight + step for (name, weight), step in zip(weights.items(), steps, strict=True)}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        logits = functional_call(model, above | buffers, (images,))
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)


@torch.no_grad()
def ascent(weights: Sequence[Tensor], slopes: Sequence[Tensor], rho: float) -> list[Tensor]:
    """The step of adaptive SAM, rho |w|^2 g / || |w| g ||: relative to the weights, its length is rho.

    The length is taken over all weights together; a weight of zero does not move.
    """
    scaled = [weight.abs() * slope for weight, slope in zip(weights, slopes, strict=True)]
    length = torch.stack([value.square().sum() for value in scaled]).sum().sqrt() + 1e-12
    return [rho / length * weight.abs() * value for weight, value in zip(weights, scaled, strict=True)]
