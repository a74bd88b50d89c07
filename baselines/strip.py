"""STRIP: a triggered image keeps its class whatever is laid over it, so its predictions have little entropy.

Paper: Gao et al., ACSAC 2019, arXiv:1902.06531.
Differs: the paper watches inputs at run time and holds clean images to lay over them and to set the threshold; here it
filters a training set of which no image is known to be clean, so both come from the training set itself: the overlays
are drawn from it, and the normal law of clean entropies has its median and its median absolute deviation, which a
minority of poisoned images moves little. Sums of images are clipped to [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.engine.data import ImageSet, generator, to_float
from bench.engine.settings import count, number
from defenses.base import Filter, TrainsetView, defense


@defense("strip")
@dataclass(frozen=True)
class Strip(Filter):
    """Flag images of low entropy under overlays, then train a fresh network on the rest. Suspicion is -entropy."""

    paper: ClassVar[str] = "arXiv:1902.06531"
    overlays: int = count(100, "images laid over each one; each costs a pass over the training set", at_least=1)
    false_rejection: float = number(0.01, "share of clean images that the threshold gives up", above=0, below=0.5)

    def inspect(self, view: TrainsetView) -> tuple[Tensor, Tensor]:
        source = generator(view.seed, "strip", device=view.device)
        entropy = overlaid_entropy(view.model, view.trainset, view.trainset, self.overlays, source)
        threshold = lower_quantile(entropy, self.false_rejection)
        view.log.record("strip/threshold", threshold, 0)
        return -entropy, entropy < threshold


@torch.no_grad()
def overlaid_entropy(
    model: nn.Module,
    data: ImageSet,
    pool: ImageSet,
    overlays: int,
    source: torch.Generator,
    batch_size: int = 1024,
) -> Tensor:
    """(N,) float64, bits: mean entropy of the predicted classes of each image plus random images of the pool.

    Args:
        overlays: how many are laid over each image, one at a time, drawn with replacement.
    """
    model.eval()
    entropies = []
    for images, _ in data.chunks(batch_size):
        total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        for _ in range(overlays):
            drawn = torch.randint(len(pool), (len(images),), generator=source, device=images.device)
            chances = model((images + to_float(pool.batch(drawn))).clamp_(max=1)).double().softmax(dim=1)
            total += torch.special.entr(chances).sum(dim=1)
        entropies.append(total / overlays / torch.log(torch.tensor(2.0, dtype=torch.float64)).item())
    return torch.cat(entropies)


def lower_quantile(values: Tensor, share: float) -> float:
    """The value below which this share of a normal law lies, with the median and spread of most of (N,) values."""
    middle = values.quantile(0.5)
    # The median absolute deviation of a normal law is 0.6745 standard deviations.
    spread = (values - middle).abs().quantile(0.5) / NormalDist().inv_cdf(0.75)
    return float(middle + NormalDist().inv_cdf(share) * spread)
