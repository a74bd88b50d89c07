"""Neural Polarizer (NPD): a linear map between two late layers, trained so that targeted attacks lose their hold.

Paper: Zhu, Wei, Zha and Wu, NeurIPS 2023, arXiv:2306.16697.
Differs: the polarizer is the 1x1 convolution alone, which the released code offers as `onlyconv`; its default has a
batch norm behind it. A map without a shift folds exactly into the weight of the layer that follows it, also where that
one pads with zeros, so the repaired model keeps its architecture. Without the batch norm there are no statistics to
warm up, and the warm-up is left out. The radius is 3 everywhere, where the released code has 5 on GTSRB and 6 on
Tiny-ImageNet (`defense.npd.epsilon`). The place is the last but one layer that mixes channels before the head: in a
ResNet-18 the first convolution of the last block, the place in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.engine.adversarial import clamped
from bench.engine.data import to_float
from bench.engine.models import Classifier
from bench.engine.settings import count, number, share
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, NotApplicable, ReserveView, defense


@defense("npd")
@dataclass(frozen=True)
class NeuralPolarizer(Defense):
    """Train one channel-mixing matrix on clean and adversarial images, all other weights frozen, and fold it in."""

    paper: ClassVar[str] = "arXiv:2306.16697"
    version: ClassVar[int] = 2  # black and white pixels take part in the attack
    epsilon: float = number(
        3.0,
        "radius of the attack, L2 in pixel units over a whole image; 3 for 3x32x32",
        at_least=0,
    )
    step_size: float = number(0.1, "size of the attack's sign steps, in pixel units", at_least=0)
    attack_steps: int = count(2, "most of them")
    enough: float = share(0.6, "share of a batch, that the attack need not exceed")
    label_weight: float = number(
        0.4,
        "weight of the cross-entropy of attacked images with the labels that the model gives the clean ones",
        at_least=0,
    )
    wrong_weight: float = number(
        0.4, "weight of the penalty on the likeliest wrong class of attacked images", at_least=0
    )
    target_weight: float = number(0.4, "weight of the penalty on the class that the attack aimed at", at_least=0)
    epochs: int = count(50, "passes over the reserve; SGD at a constant rate, without augmentation")
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def defend(self, view: ReserveView) -> DefenseResult:
        polarized = Polarized(view.model, place(view.model, to_float(view.reserve.batch(slice(2)))))
        recipe = Recipe(
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            optimizer="momentum",
            schedule="constant",
        )
        view.fit(polarized, recipe, augment=False, hooks=Polarizing(self), stream="npd")
        view.model.load_state_dict(polarized.folded(), strict=False)
        return DefenseResult(view.model.requires_grad_(True).eval())


class Polarized(nn.Module):
    """A frozen classifier, always in eval mode, with a learnt channel-mixing matrix in front of one of its layers.

    Attributes:
        matrix: (C, C) over the layer's C input channels, the identity at first.
    """

    def __init__(self, model: Classifier, layer: str) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.weight = f"{layer}.weight"
        inputs = model.get_parameter(self.weight).shape[1]
        self.matrix = nn.Parameter(torch.eye(inputs, device=model.get_parameter(self.weight).device))

    def train(self, mode: bool = True) -> Polarized:
        super().train(mode)
        self.model.eval()
        return self

    def folded(self) -> dict[str, Tensor]:
        """The layer's weight with the matrix in it, by name: W(Px) = (WP)x at every position, zeros around included."""
        weight = self.model.get_parameter(self.weight)
        return {self.weight: torch.einsum("oi...,ij->oj...", weight, self.matrix)}


class Polarizing(Hooks):
    """Clean cross-entropy, and three terms on images that a targeted attack has moved to the runner-up class."""

    def __init__(self, settings: NeuralPolarizer) -> None:
        self.settings = settings

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        assert isinstance(model, Polarized)
        npd, weight = self.settings, model.folded()
        logits = functional_call(model.model, weight, (images,))
        said = logits.detach().argmax(1)
        aim = runner_up(logits.detach(), labels)
        attacked = self.attack(model.model, {name: value.detach() for name, value in weight.items()}, images, aim)
        moved = functional_call(model.model, weight, (attacked,)).float()
        probabilities = moved.softmax(1)
        loss = F.cross_entropy(logits, labels) + npd.label_weight * F.cross_entropy(moved, said)
        loss = loss + npd.wrong_weight * unlikely(probabilities, runner_up(moved.detach(), labels))
        return loss + npd.target_weight * unlikely(probabilities, aim)

    def attack(self, model: nn.Module, weight: dict[str, Tensor], images: Tensor, aim: Tensor) -> Tensor:
        """(B, C, H, W) images moved towards `aim`; no further once more than `enough` of the batch are there."""
        npd = self.settings
        change = torch.zeros_like(images)
        reached = torch.zeros((), dtype=torch.bool, device=images.device)
        for step in range(npd.attack_steps):
            change.requires_grad_(True)
            logits = functional_call(model, weight, (clamped(images + change),))
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, aim), change)
            with torch.no_grad():
                if step:
                    reached = reached | ((logits.argmax(1) == aim).float().mean() > npd.enough)
                further = change - npd.step_size * gradient.sign()
                norm = further.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                further = further * (npd.epsilon / norm.clamp(min=1e-12)).clamp(max=1)
                change = torch.where(reached, change, further).detach()
        return (images + change).clamp(0, 1)


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,): the likeliest class other than the label."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def unlikely(probabilities: Tensor, classes: Tensor) -> Tensor:
    """The mean of -log(1 - p) of these classes; 1.0001 keeps it finite."""
    return -(1.0001 - probabilities.gather(1, classes[:, None])).log().mean()


def place(model: Classifier, images: Tensor) -> str:
    """The name of the last but one layer before the head that mixes channels, in the order of execution.

    A convolution of pooled features is a gate (squeeze-and-excitation) that scales the map and carries none of it; it
    does not count while the last stage is still a map.

    Raises:
        NotApplicable: there are not two such layers. A subclass may standardise its weight, and would undo the fold.
    """
    ran: list[tuple[str, torch.Size]] = []
    handles = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: ran.append((name, inputs[0].shape[2:])))
        for name, layer in model.named_modules()
        if layer is not model.head and (type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1))
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    point = torch.Size((1, 1))
    if point in {size for _, size in ran}:
        with torch.no_grad():
            mapped = model.stages(images)[-1].shape[2:] != point
        ran = [(name, size) for name, size in ran if size != point or not mapped]
    order = [name for name, _ in ran]
    if len(order) < 2:
        raise NotApplicable(
            f"npd folds its map into a plain convolution or linear layer before the last one; there are {len(order)}"
        )
    return order[-2]
