"""Mode Connectivity Repair (MCR): walk from the infected model along a path of low clean loss.

Paper: Zhao et al., ICLR 2020, arXiv:2005.00060.
Differs: the paper joins two infected models; this defender has one, and its other end is a copy fine-tuned on the
reserve, as in BackdoorBench. The place on the curve is fixed (the paper reports t = 0.1), because the reserve cannot
see the backdoor and its accuracy alone would choose an end. SGD with a cosine schedule to zero in place of the released
code's steps; its 100 epochs, rate and regulariser (on the point of the curve, not on the bend) are kept. Batch norm's
statistics are taken anew on the images of the reserve as they are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from bench.engine.data import ImageSet, to_float
from bench.engine.models import Classifier
from bench.engine.settings import count, number, share
from bench.engine.training import Hooks, Recipe, Tensors
from defenses.base import Defense, DefenseResult, ReserveView, defense


@defense("mcr")
@dataclass(frozen=True)
class ModeConnectivityRepair(Defense):
    """Train a quadratic Bezier curve from the infected model to its fine-tuned copy and take a point of it."""

    paper: ClassVar[str] = "arXiv:2005.00060"
    t: float = share(0.1, "position on the curve; 0 is the infected model, 1 its fine-tuned copy")
    tuning_epochs: int = count(100, "passes of the copy's fine-tuning, with weight decay 5e-4")
    tuning_lr: float = number(0.01, "learning rate of the copy's fine-tuning", at_least=0)
    epochs: int = count(100, "passes of the curve's training; both are SGD with a cosine schedule to zero")
    lr: float = number(0.01, "learning rate of the curve's training", at_least=0)
    weight_decay: float = number(1e-4, "weight decay on the point on the curve", at_least=0)
    batch_size: int = 128
    momentum: float = 0.9

    def defend(self, view: ReserveView) -> DefenseResult:
        common = Recipe(batch_size=self.batch_size, momentum=self.momentum, optimizer="momentum")
        tuned = view.fit(
            copy.deepcopy(view.model), _with(common, self.tuning_epochs, self.tuning_lr, 5e-4), stream="mcr_end"
        )
        curve = Curve(view.model, tuned)
        view.fit(
            curve, _with(common, self.epochs, self.lr, 0.0), hooks=AlongTheCurve(self.weight_decay), stream="mcr_curve"
        )
        view.model.load_state_dict(curve.point(self.t), strict=False)
        renew_statistics(view.model, view.reserve)
        return DefenseResult(view.model)


class Curve(nn.Module):
    """A quadratic Bezier curve through weights; only its bend learns.

    Attributes:
        start, end: the models at t = 0 and t = 1.
        bend: the middle point, which starts half-way between them.
        t: where the batch at hand is trained.
    """

    def __init__(self, start: Classifier, end: Classifier) -> None:
        super().__init__()
        self.bend = copy.deepcopy(start)
        self.start = copy.deepcopy(start).requires_grad_(False)
        self.end = copy.deepcopy(end).requires_grad_(False)
        self.t = 0.0
        with torch.no_grad():
            for bend, other in zip(self.bend.parameters(), self.end.parameters(), strict=True):
                bend.add_(other).div_(2)

    def point(self, t: float) -> Tensors:
        """The weights at t in [0, 1], by name; buffers are no part of the curve."""
        ends = zip(self.start.parameters(), self.end.parameters(), strict=True)
        return {
            name: (1 - t) ** 2 * first + 2 * t * (1 - t) * bend + t**2 * last
            for (name, bend), (first, last) in zip(self.bend.named_parameters(), ends, strict=True)
        }


class AlongTheCurve(Hooks):
    """Trains each batch at a place of its own, drawn from U(0, 1)."""

    def __init__(self, weight_decay: float) -> None:
        self.weight_decay = weight_decay

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(model, Curve)
        model.t = torch.rand((), generator=source, device=images.device).item()
        return images, labels

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        assert isinstance(model, Curve)
        point = model.point(model.t)
        logits = functional_call(model.bend, point, (images,))
        squares = torch.stack([weight.square().sum() for weight in point.values()]).sum()
        return F.cross_entropy(logits, labels, label_smoothing=smoothing) + self.weight_decay / 2 * squares


@torch.no_grad()
def renew_statistics(model: Classifier, data: ImageSet, batch_size: int = 128) -> None:
    """Replace each batch norm's running statistics by their mean over the images; without batch norm, do nothing.

    Only the batch norms are in train mode: dropout would draw from the global source.
    """
    norms = [layer for layer in model.eval().modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    if norms:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over batches
            norm.train()
        for chosen in torch.arange(len(data)).tensor_split(max(1, round(len(data) / batch_size))):
            model(to_float(data.batch(chosen)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _with(recipe: Recipe, epochs: int, lr: float, weight_decay: float) -> Recipe:
    return replace(recipe, epochs=epochs, lr=lr, weight_decay=weight_decay)
