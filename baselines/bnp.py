"""Batch-Normalisation-statistics Pruning (BNP): cut the channels where clean images contradict the stored statistics.

Paper: Zheng et al., Pre-activation Distributions Expose Backdoor Neurons, NeurIPS 2022 (not on arXiv).
Differs: moments are summed over all images rather than taken of one batch on the device, and both variances include
the layer's epsilon, so that a dead channel has a finite divergence. Statistics of a training on poisoned images are
compared with clean images, as in the paper; a widespread reimplementation compares them with poisoned ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.engine.data import ImageSet
from bench.engine.models import Classifier, Norm
from bench.engine.settings import count, number
from defenses.base import Defense, DefenseResult, NotApplicable, ReserveView, defense


@defense("bnp")
@dataclass(frozen=True)
class BatchNormStatisticsPruning(Defense):
    """Zero the scale of each channel whose divergence is an outlier in its layer; the shift stays."""

    paper: ClassVar[str] = "NeurIPS 2022, openreview wwW-1k1ljIg"
    u: float = number(
        3.0,
        "a channel goes when its divergence exceeds the layer's mean by more than u standard deviations",
        at_least=0,
    )
    images: int = count(500, "how many of the reserve are looked at, from the first", at_least=2)

    def defend(self, view: ReserveView) -> DefenseResult:
        norms = [norm for norm in view.model.norms() if norm.has_statistics]
        if not norms:
            raise NotApplicable("no norm layer stores running statistics to compare clean images with")
        shares = []
        for norm, (mean, variance) in zip(norms, moments(view.model, norms, view.reserve[: self.images]), strict=True):
            divergences = divergence(mean, variance, norm)
            cut = divergences > divergences.mean() + self.u * divergences.std()
            with torch.no_grad():
                norm.layer.weight[cut] = 0
            shares.append(cut)
        view.log.record("bnp/pruned", torch.cat(shares).double().mean().item(), 0)
        return DefenseResult(view.model)


@torch.no_grad()
def moments(model: Classifier, norms: list[Norm], data: ImageSet) -> list[tuple[Tensor, Tensor]]:
    """Mean and unbiased variance, (C,) float64 each, of what each layer reads, in eval mode."""
    model.eval()
    totals: dict[nn.Module, Tensor] = {}

    def add(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        # Around the stored mean the squares stay small: their difference loses no digits.
        values = inputs[0].transpose(0, 1).flatten(1).double() - layer.running_mean.double()[:, None]
        count = torch.full_like(values[:, 0], values.shape[1])
        sums = torch.stack([values.sum(1), values.square().sum(1), count])
        totals[layer] = totals[layer] + sums if layer in totals else sums

    handles = [norm.layer.register_forward_pre_hook(add) for norm in norms]
    try:
        for images, _ in data.chunks(128):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    moments_of_norms = []
    for norm in norms:
        first, second, count = totals[norm.layer]
        mean = first / count
        moments_of_norms.append(
            (mean + norm.layer.running_mean.double(), (second - count * mean.square()) / (count - 1))
        )
    return moments_of_norms


def divergence(mean: Tensor, variance: Tensor, norm: Norm) -> Tensor:
    """(C,): Kullback-Leibler divergence of the clean images' Gaussian from the stored one, in nats."""
    clean = variance.clamp(min=0) + norm.layer.eps
    stored = norm.layer.running_var.double() + norm.layer.eps
    gap = (mean - norm.layer.running_mean.double()).square()
    return 0.5 * (stored / clean).log() + (clean + gap) / (2 * stored) - 0.5
