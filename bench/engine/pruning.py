"""Channels of norm layers as units: masked while a method looks for the bad ones, then pruned.

A unit is one channel's scale: of a feature map behind batch or group norm, of every token behind layer norm. In a
pre-activation network it feeds a convolution, elsewhere it ends one; behind layer norm it is one coordinate of the
residual stream on its way into one branch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.engine.training import Tensors, TrainingLog

from .data import ImageSet, generator
from .metrics import accuracy
from .models import Classifier, Norm
from .settings import choice, count, share

PRUNE_BY = ("held_out", "threshold", "count", "random")
THRESHOLDS = [step / 20 for step in range(19)]  # 0, 0.05, ..., 0.9


class Channels:
    """The scales and shifts of norm layers, each as one flat vector of all units.

    Attributes:
        scale, shift: (U,) copies of the weights as they are now, layer by layer.
    """

    def __init__(self, norms: Sequence[Norm]) -> None:
        self._names = [norm.name for norm in norms]
        self._sizes = [len(norm.layer.weight) for norm in norms]
        self.scale = torch.cat([norm.layer.weight.detach() for norm in norms])
        self.shift = torch.cat([norm.layer.bias.detach() for norm in norms])

    def weights(self, scale: Tensor, shift: Tensor | None = None) -> Tensors:
        """The parameters by their names, for `functional_call` or to be copied, from (U,) scales and shifts."""
        tensors = {f"{name}.weight": values for name, values in zip(self._names, scale.split(self._sizes), strict=True)}
        if shift is not None:
            parts = shift.split(self._sizes)
            tensors |= {f"{name}.bias": values for name, values in zip(self._names, parts, strict=True)}
        return tensors


class Masked(nn.Module):
    """A frozen copy of a network with a mask on the scale of each norm channel; `fit` trains the mask alone.

    Attributes:
        mask: (U,) starts at 1, where the logits are the network's own, bit for bit.
        channels: what the mask multiplies.
    """

    def __init__(self, model: Classifier, norms: Sequence[Norm]) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).requires_grad_(False)  # its running statistics move in train mode
        self.channels = Channels(norms)
        self.mask = nn.Parameter(torch.ones_like(self.channels.scale))

    def forward(self, images: Tensor, scale_noise: Tensor | None = None, shift_noise: Tensor | None = None) -> Tensor:
        """Logits with scales times (mask + noise) and shifts times (1 + noise), both noises (U,)."""
        factor = self.mask if scale_noise is None else self.mask + scale_noise
        shift = None if shift_noise is None else self.channels.shift * (1 + shift_noise)
        weights = self.channels.weights(self.channels.scale * factor, shift)
        return functional_call(self.network, weights, (images,))

    @torch.no_grad()
    def clamp(self) -> None:
        """Put the mask back into [0, 1]."""
        self.mask.clamp_(0, 1)


@torch.no_grad()
def prune(model: Classifier, norms: Sequence[Norm], units: Tensor) -> None:
    """Zero the scales of the (U,) bool units in place; the shifts stay, so that a pruned channel is constant."""
    channels = Channels(norms)
    for name, weight in channels.weights(channels.scale.masked_fill(units, 0)).items():
        model.get_parameter(name).copy_(weight)


def split_off(data: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """A random part that judges, and the rest to learn from; one seed gives every method the same judges.

    Raises:
        ValueError: there are not two images, one for each.
    """
    if len(data) < 2:
        raise ValueError(f"the reserve holds {len(data)} image; two are needed: one to learn from, one to judge by")
    order = torch.randperm(len(data), generator=generator(seed, "held out")).to(data.labels.device)
    judges = min(max(1, round(share * len(data))), len(data) - 1)
    return data[order[:judges]], data[order[judges:]]


@torch.no_grad()
def units_to_prune(
    model: Classifier,
    norms: Sequence[Norm],
    mask: Tensor,
    held_out: ImageSet,
    *,
    prune_by: str,
    threshold: float,
    count: int,
    tolerance: float,
    seed: int,
    log: TrainingLog,
    name: str,
) -> Tensor:
    """Which units a learned mask condemns, and the curves of the choice.

    The curves `name/pruned` (share of the units at or below a threshold: the masks' cumulative histogram) and
    `name/held_out_accuracy` have 100 x threshold as their step, whatever rule decides.

    Args:
        model: the network to be pruned, left as it is.
        mask: (U,) in [0, 1].
        prune_by: `held_out` takes the largest threshold of 0, 0.05, ..., 0.9 that costs at most `tolerance` of the
            held-out accuracy (none if there is no such), `threshold` the one given, `count` the lowest masks.
            `random` is the control: as many units as `held_out` takes, drawn without a look at the mask.
    """
    channels, chosen = Channels(norms), -1.0

    def accuracy_without(units: Tensor) -> float:
        weights = channels.weights(channels.scale.masked_fill(units, 0))
        predicted = [functional_call(model, weights, (images,)).argmax(1) for images, _ in held_out.chunks()]
        return accuracy(torch.cat(predicted), held_out.labels)

    model.eval()
    whole = accuracy_without(torch.zeros_like(mask, dtype=torch.bool))
    # Whole images are counted: as a share, a loss of exactly the tolerance would exceed it by rounding.
    allowed = int(tolerance * len(held_out) + 1e-6)
    reached, before = whole, 0
    for limit in THRESHOLDS:
        units = mask <= limit
        if int(units.sum()) > before:
            before = int(units.sum())
            reached = accuracy_without(units)
        if round((whole - reached) * len(held_out)) <= allowed:
            chosen = limit
        log.record(f"{name}/pruned", before / len(mask), round(100 * limit))
        log.record(f"{name}/held_out_accuracy", reached, round(100 * limit))
    if prune_by == "count":
        units = torch.zeros_like(mask, dtype=torch.bool)
        units[mask.argsort(stable=True)[:count]] = True
        return units
    chosen = threshold if prune_by == "threshold" else chosen
    log.record(f"{name}/threshold", chosen, 0)
    units = mask <= chosen
    return units[random_order(len(units), seed, units.device)] if prune_by == "random" else units


@dataclass(frozen=True)
class MaskPruning:
    """Base of the methods that learn a mask of the channels and prune the lowest."""

    prune_by: str = choice(
        "held_out",
        "how many channels go: as many as the held-out accuracy allows, those at or below "
        "`threshold`, or `count`; `random` is a control: as many as `held_out` takes, at random",
        PRUNE_BY,
    )
    tolerance: float = share(0.02, "largest loss of held-out accuracy through pruning", below=1)
    held_out: float = share(
        0.1, "share of the reserve that judges the pruning and is not learned from", above=0, below=1
    )
    threshold: float = share(0.2, "channels with a mask at or below it go, for `prune_by=threshold`")
    count: int = count(0, "this many channels go, for `prune_by=count`")

    def prune_lowest(
        self,
        model: Classifier,
        norms: Sequence[Norm],
        mask: Tensor,
        judges: ImageSet,
        *,
        seed: int,
        log: TrainingLog,
        name: str,
    ) -> None:
        """Prune in place what the mask (U,) condemns; `judges` are the held-out images. See `units_to_prune`."""
        units = units_to_prune(
            model,
            norms,
            mask,
            judges,
            prune_by=self.prune_by,
            threshold=self.threshold,
            count=self.count,
            tolerance=self.tolerance,
            seed=seed,
            log=log,
            name=name,
        )
        prune(model, norms, units)


def random_order(units: int, seed: int, device: torch.device) -> Tensor:
    """(U,) int64: all units in a random order, for the controls that do not look at them."""
    return torch.randperm(units, generator=generator(seed, "random units")).to(device)
