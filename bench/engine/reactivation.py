"""Is the backdoor gone, or asleep? Two ways to wake it; both are read beside a model that never had it.

Papers: Min et al., NeurIPS 2024, arXiv:2410.09838 (`relearn`); Zhu, Liang and Wu, NeurIPS 2024, arXiv:2405.16134
(`reactivate`, in its white-box form).
Differs: poisoned images of a clean-label attack carry the target label too, since the link from trigger to target is
what is probed; `reactivate` takes sign steps of falling length on the mean cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.training import Hooks, Recipe, TrainingLog, fit

from .data import Augmentation, ImageSet, generator
from .inference import under_attack

RELEARN = Recipe(
    epochs=5, batch_size=128, optimizer="momentum", lr=0.01, momentum=0.9, weight_decay=0.0, schedule="constant"
)
CLEAN_SHARE = 0.02  # of the training images
REACTIVATE_EPSILON = 4 / 255
REACTIVATE_STEPS = 100


@dataclass(frozen=True)
class Relearned:
    """How fast a model takes up a backdoor.

    Attributes:
        steps: optimizer steps until half of the probe's images went to the target, counted from 0 (before any
            step); None if they never did.
        course: (step, share of the probe's images that went to the target): at each step up to there, and after each
            epoch behind it.
    """

    model: nn.Module
    steps: int | None
    course: list[tuple[int, float]]


class _Watch(Hooks):
    def __init__(self, success: Callable[[nn.Module], float]) -> None:
        self.success = success
        self.reached: int | None = None
        self.course: list[tuple[int, float]] = []

    def look(self, model: nn.Module, step: int) -> None:
        self.course.append((step, self.success(model.eval())))
        if self.reached is None and self.course[-1][1] >= 0.5:
            self.reached = step

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        # Behind the half it costs a look for each epoch, not for each step.
        if self.reached is None or (step + 1) % (steps // RELEARN.epochs) == 0:
            self.look(model, step + 1)
            model.train()


def relearn(
    model: nn.Module,
    clean: ImageSet,
    poisoned: ImageSet,
    *,
    success: Callable[[nn.Module], float],
    augmentation: Augmentation,
    seed: int,
    precision: str = "auto",
) -> Relearned:
    """Fine-tune `model` in place for five epochs on clean images and a few poisoned ones.

    Args:
        clean, poisoned: as they are trained on, the attacker's labels included; none of them is a test image.
        success: the ASR of a model in eval mode, cheap enough to be asked for in each step.
        seed: the same for a model and its control: both see the same batches.
    """
    watch = _Watch(success)
    watch.look(model, 0)
    data = ImageSet(
        torch.cat([clean.batch(slice(None)), poisoned.batch(slice(None))]), torch.cat([clean.labels, poisoned.labels])
    )
    log = TrainingLog(precision=precision)
    fit(model, data, RELEARN, seed=seed, augmentation=augmentation, hooks=watch, log=log, stream="relearn")
    return Relearned(model, watch.reached, watch.course)


def reactivate(
    model: nn.Module,
    data: ImageSet,
    target_labels: Tensor,
    trigger: Callable[[Tensor], Tensor],
    *,
    seed: int,
    epsilon: float = REACTIVATE_EPSILON,
    steps: int = REACTIVATE_STEPS,
    batch_size: int = 128,
) -> Tensor:
    """The one perturbation that, added to triggered images, sends the most of them to the target.

    Args:
        data: clean images to optimise on, none of which is scored later.
        target_labels: (N,) int64, the class that the attacker wants for each.
        trigger: clean float images -> triggered ones.
        epsilon: bound on each pixel of the perturbation.

    Returns:
        (1, C, H, W) in [-epsilon, epsilon]. Add it after the trigger, and clamp to [0, 1].

    Raises:
        ValueError: there is no image.
    """
    if not len(data):
        raise ValueError("there is no image to find a perturbation on")
    device = data.device
    source = generator(seed, "reactivate", device=device)
    shift = torch.zeros(1, *data.images.shape[1:], device=device)
    size = min(batch_size, len(data))
    with under_attack(model) as fast, torch.enable_grad():
        for step in range(steps):
            chosen = torch.randperm(len(data), generator=source, device=device)[:size]
            # The slope at the clamped image: that of the clamp itself is 0 for black and white pixels.
            points = (trigger(data.batch(chosen).float() / 255) + shift).clamp(0, 1).requires_grad_(True)
            (slope,) = torch.autograd.grad(F.cross_entropy(fast(points), target_labels[chosen]), points)
            # The whole way is twelve radii, in steps that fall to nothing: any corner of the ball can be reached.
            length = 0.25 * epsilon * (1 - step / steps)
            shift = (shift - length * slope.sum(0, keepdim=True).sign()).clamp_(-epsilon, epsilon)
    return shift
