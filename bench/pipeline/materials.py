"""What the stages of a trial are made of: splits and fresh networks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.engine.counts import images_of
from bench.engine.data import generator
from bench.engine.models import Classifier, ModelSpec


@dataclass(frozen=True)
class FreshModel:
    """Builds the untrained architecture; an object of two fields, so that nothing else hangs on it."""

    spec: ModelSpec
    device: torch.device

    def __call__(self, seed: int) -> Classifier:
        return self.spec.build(generator(seed, "defender's weights").initial_seed()).to(self.device)


@functools.cache
def flops_of(spec: ModelSpec) -> int:
    return spec.flops()


def split_held_out(labels: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training images and of the held-out share, in random order, every class with its share.

    Every prefix of the held-out share has the classes in their proportions too, so that a smaller reserve is a part of
    a larger one.
    """
    source = generator(seed, "pool")
    shuffled = torch.randperm(len(labels), generator=source)
    by_class = labels.cpu()[shuffled]
    share = torch.empty(len(labels), dtype=torch.float64)  # where an image stands in its class, in (0, 1)
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for value in by_class.unique():
        members = (by_class == value).nonzero().flatten()
        share[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        taken[members[: images_of(held_out, len(members))]] = True
    first = shuffled[taken][share[taken].argsort(stable=True)]
    return shuffled[~taken].to(labels.device), first.to(labels.device)
