"""Low-frequency attack: a smooth picture, optimised on a clean network, is added to the whole image.

Paper: Zeng, Park, Mao and Jia, 2021, arXiv:2104.03413.
Differs: DeepFool runs on groups of images whose changes are added up, in fewer steps (50, not 200) and passes
(10, not 50); it leaves the class that is predicted now, not the one predicted first. The target is the
attack's (as in BackdoorBench); the paper's code changes to the class that most images fall into. The blur has
31 taps, not 30, so that it moves nothing, and follows the image's width. Where DeepFool moves no image, which
the curve `low_frequency/noise` tells, blurred noise is the picture.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.engine.data import generator, to_float
from bench.engine.inference import under_attack
from bench.engine.settings import choice, count, pixels, share
from bench.engine.training import Tensors

from .base import Attack, Setup, attack

log = logging.getLogger(__name__)

GROUP = 20  # images that share one update of the pattern
OVERSHOOT = 1.02  # of DeepFool


@attack("low_frequency")
@dataclass(frozen=True)
class LowFrequency(Attack):
    """image + pattern, clipped; the pattern lies in [0, strength], so it only brightens."""

    paper: ClassVar[str] = "arXiv:2104.03413"
    pattern: str = choice(
        "optimised",
        "`optimised` on a network trained for it, or `noise` (blurred noise: as smooth, and free)",
        ("optimised", "noise"),
    )
    strength: float = pixels(0.2, "the pattern's highest value; 0.2 is 51 levels of 255", above=0)
    images: int = count(100, "training images to optimise on", at_least=1)
    passes: int = count(10, "over these images, at most", at_least=1)
    deepfool_steps: int = count(50, "gradient steps for one image in one pass, at most", at_least=1)
    fooling_rate: float = share(0.2, "the passes end when the pattern changes this share of the predictions", above=0)

    def prepare(self, setup: Setup) -> Tensors:
        learned = self._optimised(setup) if self.pattern == "optimised" else None
        return {"pattern": (self._noise(setup) if learned is None else learned).contiguous()}

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        return (images + tensors["pattern"]).clamp_(0, 1)

    def _noise(self, setup: Setup) -> Tensor:
        shape = setup.trainset.images.shape[1:]
        noise = torch.randn(shape, generator=generator(setup.seed, "low_frequency noise")).to(setup.device)
        return stretched(blurred(blurred(noise)), self.strength)

    def _optimised(self, setup: Setup) -> Tensor | None:
        """(C, H, W), or None where no image could be moved to its target."""
        model, data = setup.surrogate(), setup.trainset
        others = (data.labels != self.target_labels(data.labels, setup.num_classes)).nonzero().flatten()
        order = torch.randperm(len(others), generator=generator(setup.seed, "low_frequency images"))[: self.images]
        chosen = to_float(data.batch(others[order.to(others.device)]))
        before = predicted(model, chosen) if len(chosen) else data.labels[:0]
        targets = self.target_labels(before, setup.num_classes)
        away = before != targets  # what is at its target already has nothing to say
        chosen, before, targets = chosen[away], before[away], targets[away]

        pattern: Tensor | None = None
        rates: list[float] = []
        while len(chosen) and len(rates) < self.passes:
            for images, now, goal in zip(*(tensor.split(GROUP) for tensor in (chosen, before, targets)), strict=True):
                moved = images if pattern is None else (images + pattern).clamp_(0, 1)
                unchanged = predicted(model, moved) == now
                if not unchanged.any():
                    continue
                change, reached = deepfool(model, moved[unchanged], goal[unchanged], self.deepfool_steps)
                if reached.any():
                    step = blurred(change[reached].sum(dim=0))
                    pattern = stretched(blurred(step if pattern is None else pattern + step), self.strength)
            if pattern is None:
                break
            fooled = predicted(model, (chosen + pattern).clamp_(0, 1)) != before
            rates.append(fooled.float().mean().item())
            setup.log.record("low_frequency/fooling_rate", rates[-1], len(rates))
            if rates[-1] >= self.fooling_rate or (len(rates) >= 5 and max(rates[-5:]) - min(rates[-5:]) <= 0.01):
                break
        if pattern is None:
            setup.log.record("low_frequency/noise", 1, 0)
            log.warning("low_frequency: the surrogate sends no image to its target; blurred noise is taken")
        return pattern


def predicted(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(dim=1)


def deepfool(model: nn.Module, images: Tensor, targets: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Targeted DeepFool (arXiv:1511.04599): the change of each image, and whether it reaches its target.

    Each step goes to where the linearised network would see the target and the class predicted now as equal.
    """
    change = torch.zeros_like(images)
    reached = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    with under_attack(model) as fast:
        for step in range(steps + 1):  # the last round only looks
            left = (~reached).nonzero().flatten()
            if not len(left):
                break
            current = (images[left] + OVERSHOOT * change[left]).requires_grad_(True)
            logits = fast(current)
            highest, label = logits.max(dim=1)
            gap = highest - logits.gather(1, targets[left, None])[:, 0]
            arrived = label == targets[left]
            reached[left[arrived]] = True
            if step < steps:
                (gradient,) = torch.autograd.grad(gap.sum(), current)
                length = gradient.flatten(1).norm(dim=1).clamp_min_(1e-12)
                # 1e-4 more than the distance: on the boundary itself steps would shrink to nothing.
                scale = torch.where(arrived, 0, (gap.detach() / length + 1e-4) / length)
                change[left] -= scale[:, None, None, None] * gradient
    return OVERSHOOT * change, reached


def blurred(picture: Tensor) -> Tensor:
    """Gaussian blur of (C, H, W), zeros around it; sigma is 6 and the reach 15 pixels of a width of 32."""
    height, width = picture.shape[-2:]
    return blur_matrix(height, width).to(picture) @ picture @ blur_matrix(width, width).to(picture).T


def blur_matrix(size: int, width: int) -> Tensor:
    sigma, reach = 6 * width / 32, round(15 * width / 32)
    kernel = torch.exp(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    distance = torch.arange(size)[:, None] - torch.arange(size)
    weights = kernel[(distance + reach).clamp(0, 2 * reach)] / kernel.sum()
    return weights * (distance.abs() <= reach)


def stretched(picture: Tensor, strength: float) -> Tensor:
    """Shift and scale all channels together to [0, strength]."""
    low, high = torch.aminmax(picture)
    return (picture - low) / (high - low).clamp_min(1e-12) * strength
