"""The one PGD: used by adversarial fine-tuning and by the measure of robustness.

Paper: Madry et al., ICLR 2018, arXiv:1706.06083.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inference import under_attack
from .modes import autocast


def clamped(points: Tensor) -> Tensor:
    """Clamped to [0, 1], with a slope of 1 on both bounds.

    That of torch's own clamp is 0 there: through it a black or white pixel gets no gradient, and never moves.
    """
    return torch.where((points < 0) | (points > 1), points.detach().clamp(0, 1), points)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    random_start: torch.Generator | None = None,
    targeted: bool = False,
    eval_mode: bool = True,
    precision: str = "float32",
) -> Tensor:
    """Projected gradient descent on the cross-entropy in the L-infinity ball, clamped to [0, 1].

    Args:
        images: (B, C, H, W) float in [0, 1].
        labels: (B,) int64: the classes to leave, or to reach if `targeted`.
        epsilon, step_size: in pixel units; 8 / 255 is usual.
        steps: gradient steps; 0 returns the start.
        random_start: a source to start anywhere in the ball; None starts at the images.
        eval_mode: False attacks the model in the mode it is in: in train mode batch norm uses the batch's own
            statistics, and takes every iterate into the running ones.
        precision: `bfloat16` makes the passes in autocast; images and gradients of images stay float32.

    Returns:
        The adversarial images, detached. The model is left as it was, but for those statistics.
    """
    sign = -1.0 if targeted else 1.0
    lower, upper = (images - epsilon).clamp_(min=0), (images + epsilon).clamp_(max=1)
    current = images.detach().clone()
    if random_start is not None:
        noise = torch.rand(images.shape, generator=random_start, device=images.device, dtype=images.dtype)
        current = current.add_(noise.mul_(2).sub_(1).mul_(epsilon)).clamp_(0, 1)
    with under_attack(model, eval_mode) as attacked, torch.enable_grad(), autocast(precision, images.device):
        for _ in range(steps):
            current.requires_grad_(True)
            loss = F.cross_entropy(attacked(current), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, current)
            with torch.no_grad():
                # Not in place: the graph of this step may still hold the tensor.
                current = torch.clamp(current.detach() + sign * step_size * gradient.sign(), lower, upper)
    return current.detach()
