"""I-BAU: find the universal perturbation that fools the model most, and unlearn it by the implicit hypergradient.

Paper: Zeng et al., ICLR 2022, arXiv:2110.03735.
Differs: each round goes through the reserve in a new order (released: always the same), so that the patched images,
which are the first of their batch, change. At least one image of a batch is patched: the released floor(0.01 * batch)
is none for batches below 100, which turns the method into a fine-tune. The penalty is a sum of squares: the square of a
norm has no second derivative at 0. As released, the hypergradient is taken on the first batch of the round
(`phi_batch=random` draws another), the inner step of the fixed point uses the true labels, the perturbation is added
without clamping, and the network stays in eval mode. After its pass the perturbation is projected to an L2 length of
10, as in both released notebooks; `defense.py` of the same repository has the line but leaves it out, which is
`radius=0`: there the length can reach thousands, and images under the perturbation are noise. The 10 belongs to images
of 3x32x32 pixels and is not scaled for others. Rounds are those of `defense.py`; the notebooks have one.
What K = 5 at a rate of 0.1 leaves out, as released: with a curvature c the fixed point's error falls as |1 - 0.1 c|^K;
at c = 1 it is 0.59 after 5 steps, and where 0.1 c is far below 1 the correction is 0.1 K times a mixed derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.engine.data import ImageSet, equal_batches, to_float
from bench.engine.inference import under_attack
from bench.engine.settings import choice, count, number, share
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, NotApplicable, ReserveView, defense

PENALTY = 0.001  # on the squared length of the perturbation, in pixel units


@defense("i_bau")
@dataclass(frozen=True)
class ImplicitBackdoorAdversarialUnlearning(Defense):
    """In each round find one perturbation for all images, then unlearn it batch by batch."""

    paper: ClassVar[str] = "arXiv:2110.03735"
    version: ClassVar[int] = 2  # projects to the released ball; the patched share is rounded down
    rounds: int = count(5, "number of rounds; each is one pass for the perturbation and one for the weights")
    inner_lr: float = number(
        10.0,
        "rate of the gradient steps on the perturbation, one for each batch, from zero",
        at_least=0,
    )
    radius: float = number(
        10.0,
        "largest L2 length of the perturbation after the pass, in pixel units; 0 projects nothing",
        at_least=0,
    )
    patched: float = share(
        0.01,
        "share of a batch that carries the perturbation, rounded down, but at least one image",
        above=0,
    )
    fixed_point_steps: int = count(5, "K of the hypergradient; 0 leaves only the direct gradient")
    fixed_point_rate: float = number(0.1, "the step size of the inner problem that the fixed point unrolls", at_least=0)
    phi_batch: str = choice(
        "first",
        "on which images the inner problem is differentiated: the `first` batch of the round, or a "
        "`random` one for each step",
        ("first", "random"),
    )
    lr: float = number(1e-3, "learning rate of Adam; images go in without augmentation", at_least=0)
    batch_size: int = 100

    def defend(self, view: ReserveView) -> DefenseResult:
        recipe = Recipe(
            epochs=self.rounds,
            optimizer="adam",
            lr=self.lr,
            batch_size=self.batch_size,
            weight_decay=0.0,
            schedule="constant",
            precision="float32",  # second derivatives of a bfloat16 network are noise
        )
        hooks = Unlearning(self, view.reserve)
        with twice_differentiable(view.model):
            model = view.fit(view.model, recipe, augment=False, hooks=hooks, stream="i_bau")
        return DefenseResult(model)


class Unlearning(Hooks):
    """The perturbation at the start of each round, the hypergradient in each step."""

    def __init__(self, settings: ImplicitBackdoorAdversarialUnlearning, reserve: ImageSet) -> None:
        self.settings, self.reserve = settings, reserve
        self.round_steps, _ = equal_batches(len(reserve), settings.batch_size)
        self.delta: Tensor
        self.inner: tuple[Tensor, Tensor]  # the images and labels on which the inner problem is differentiated

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if step % self.round_steps == 0:
            model.eval()
            self.delta = universal_perturbation(model, self.reserve, self.settings, source)
            self.inner = images, labels
        if self.settings.phi_batch == "random":
            chosen = torch.randperm(len(self.reserve), generator=source, device=images.device)[: len(images)]
            self.inner = to_float(self.reserve.batch(chosen)), self.reserve.labels[chosen]
        return images, labels

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        settings = self.settings
        delta = self.delta.clone().requires_grad_(True)
        # By a hair more: 0.29 * 100 is 28.999... in floating point.
        count = max(1, int(settings.patched * len(images) + 1e-6))
        # The order of the batch is random already: its first images are as good as any.
        outer = F.cross_entropy(model(torch.cat([images[:count] + delta, images[count:]])), labels)
        if settings.fixed_point_steps == 0:
            return outer
        inner = inner_objective(model, *self.inner, delta)
        try:
            return hypergradient_loss(outer, inner, delta, settings.fixed_point_steps, settings.fixed_point_rate)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise NotApplicable(f"a layer has no second derivative: {str(error).splitlines()[0]}") from error


def inner_objective(model: nn.Module, images: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
    """What the perturbation (1, C, H, W) minimises: minus the cross-entropy, and its squared length."""
    return PENALTY * delta.square().sum() - F.cross_entropy(model(images + delta), labels)


def universal_perturbation(
    model: nn.Module, reserve: ImageSet, settings: ImplicitBackdoorAdversarialUnlearning, source: torch.Generator
) -> Tensor:
    """(1, C, H, W): one pass of gradient steps away from what the model predicts now, from zero."""
    device = reserve.device
    delta = torch.zeros(1, *reserve.images.shape[1:], device=device)
    batches, size = equal_batches(len(reserve), settings.batch_size)
    order = torch.randperm(len(reserve), generator=source, device=device)
    with under_attack(model) as fast:
        for index in range(batches):
            images = to_float(reserve.batch(order[index * size : (index + 1) * size]))
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                predicted = fast(images).argmax(1)
            delta.requires_grad_(True)
            (slope,) = torch.autograd.grad(inner_objective(fast, images, predicted, delta), delta)
            delta = delta.detach() - settings.inner_lr * slope
    if settings.radius:
        delta *= (settings.radius / delta.norm().clamp_min(1e-12)).clamp_max(1)
    return delta


def hypergradient_loss(outer: Tensor, inner: Tensor, delta: Tensor, steps: int, rate: float) -> Tensor:
    """A scalar with the value of `outer` whose gradient in the weights is the implicit hypergradient.

    With the inner step Phi = delta - rate * d inner / d delta, the fixed point is v = (dPhi/d delta)^T v +
    d outer / d delta from v = 0, and the gradient d outer / d weights + (dPhi / d weights)^T v.

    Args:
        outer, inner: scalars of the weights and of `delta`.
        delta: a leaf that requires a gradient.
        steps: of the fixed point, at least 1; each beyond the first is one Hessian-vector product.
    """
    (slope,) = torch.autograd.grad(outer, delta, retain_graph=True, materialize_grads=True)
    (inner_slope,) = torch.autograd.grad(inner, delta, create_graph=True)
    v = slope  # the first step from 0 gives the slope itself
    for _ in range(steps - 1):
        (product,) = torch.autograd.grad(inner_slope, delta, v, retain_graph=True)
        v = v - rate * product + slope
    implicit = -rate * (inner_slope * v).sum()
    return outer + implicit - implicit.detach()


class TwiceHardsigmoid(nn.Module):
    """Hardsigmoid by an operation that torch can differentiate twice."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Give the model, inside, only operations that have second derivatives; its outputs stay the same.

    Fused attention and hardsigmoid have none. Outside, every layer is the one that was there.
    """
    swapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Hardsigmoid)
    ]
    for parent, name, _ in swapped:
        setattr(parent, name, TwiceHardsigmoid())
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child)
