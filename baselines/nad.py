"""Neural Attention Distillation (NAD): where the network looks is drawn towards where a fine-tuned copy of it looks.

Paper: Li et al., ICLR 2021, arXiv:2101.05930.
Differs: the released code compares the three stages of one network, on maps of 32, 16 and 8 pixels a side. Here it is
up to three stages of any network (see `informative`); with fewer, the weights of the deepest. Maps of one position are
left out: their attention is 1 whatever the network does, and toolkits that compare them run a plain fine-tune by this
name. The rate starts at 0.01 with a cosine to zero; the released script has 0.1 for two epochs, then 0.01. No cutout.
As released, the mean over the positions of a map is weighed by 500, 1000 and 1000, whatever the size of the map. An
attention map has unit length, so that its mean shrinks with the number of positions: the same weights count 16 times as
much on maps of 8, 4 and 2 pixels a side. `weighting=rescaled` weighs the sum over positions by 0.49, 3.9 and 15.6: the
released loss on the released maps, and the same on maps of any size.
`beta=0` is the fine-tune alone, bit for bit: the control that this method needs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.models import Classifier
from bench.engine.settings import choice, count, number
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, NotApplicable, ReserveView, defense

# The paper's three maps: the share of beta, and the pixels a side on which the paper sets it.
PAPER_MAPS = ((0.5, 32), (1.0, 16), (1.0, 8))


@defense("nad")
@dataclass(frozen=True)
class NeuralAttentionDistillation(Defense):
    """Fine-tune a copy as the teacher, then fine-tune the model with its attention held to the teacher's."""

    paper: ClassVar[str] = "arXiv:2101.05930"
    version: ClassVar[int] = 2  # the released weights, weight decay and Nesterov momentum
    beta: float = number(
        1000.0,
        "weight of the distillation as the paper counts it: that of its last two maps, the first has half",
        at_least=0,
    )
    weighting: str = choice(
        "released",
        "`released` weighs the mean over the positions of each map, `rescaled` the sum over them by "
        "what the released weights come to on the maps of the released network",
        ("released", "rescaled"),
    )
    teacher_epochs: int = count(10, "passes of the fine-tuning that makes the teacher")
    epochs: int = count(20, "passes of the distillation")
    lr: float = number(
        0.01,
        "learning rate of both; SGD with Nesterov momentum and a cosine schedule to zero",
        at_least=0,
    )
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def defend(self, view: ReserveView) -> DefenseResult:
        if self.beta == 0:
            return DefenseResult(self._fit(view, view.model, self.epochs, "fine_tuning"))
        with torch.no_grad():
            maps = view.model.stages(torch.zeros(1, *view.reserve.images.shape[1:], device=view.device))
        sizes = [(stage.shape[-2], stage.shape[-1]) for stage in maps]
        compared = informative(sizes)
        if not compared:
            raise NotApplicable("no stage has a map of four positions; set a larger dataset.size or another model.stem")
        weights = self.weights([sizes[at] for at in compared])
        teacher = self._fit(view, copy.deepcopy(view.model), self.teacher_epochs, "teacher").requires_grad_(False)
        hooks = Distillation(teacher, dict(zip(compared, weights, strict=True)))

        def log(model: nn.Module, epoch: int) -> None:
            view.log.record("nad/attention_to_cross_entropy", hooks.ratio(), epoch)

        # Named as the plain fine-tune, so that without distillation the two are the same, bit for bit.
        return DefenseResult(self._fit(view, view.model, self.epochs, "fine_tuning", hooks, log))

    def weights(self, sizes: Sequence[tuple[int, int]]) -> list[float]:
        """What `distance`, a sum over positions, is multiplied by for each of up to three maps of (height, width)."""
        weights = []
        for (height, width), (share, side) in zip(sizes, PAPER_MAPS[-len(sizes) :], strict=True):
            positions = height * width if self.weighting == "released" else side**2
            weights.append(self.beta * share / positions)
        return weights

    def _fit(
        self,
        view: ReserveView,
        model: Classifier,
        epochs: int,
        stream: str,
        hooks: Hooks | None = None,
        after_epoch: Callable[[nn.Module, int], None] | None = None,
    ) -> Classifier:
        recipe = Recipe(
            epochs=epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            optimizer="sgd",
        )
        return view.fit(model, recipe, hooks=hooks, stream=stream, after_epoch=after_epoch)


class Distillation(Hooks):
    """Adds the distance to the teacher's attention to the cross-entropy.

    Args:
        teacher: frozen, in eval mode.
        weights: stage -> weight of its distance.
    """

    def __init__(self, teacher: Classifier, weights: dict[int, float]) -> None:
        self.teacher, self.weights = teacher, weights
        self.parts: list[Tensor] = []  # of this epoch: cross-entropy and distillation of each step

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        assert isinstance(model, Classifier)
        logits, maps = model.logits_and_stages(images)
        with torch.no_grad():
            wanted = self.teacher.stages(images)
        plain = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        distilled = torch.stack([weight * distance(maps[at], wanted[at]) for at, weight in self.weights.items()]).sum()
        self.parts.append(torch.stack([plain, distilled]).detach())
        return plain + distilled

    def ratio(self) -> float:
        """Distillation to cross-entropy, over the steps since the last call."""
        plain, distilled = torch.stack(self.parts).sum(0).tolist()
        self.parts.clear()
        return distilled / max(plain, 1e-12)


def attention(maps: Tensor) -> Tensor:
    """(B, C, H, W) maps -> (B, H * W): squares summed over the channels, of unit length for each image."""
    return F.normalize(maps.float().square().sum(dim=1).flatten(1), dim=1)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the attentions, summed over positions, mean over images: 0 to 2, whatever the map's size."""
    return (attention(student) - attention(teacher)).square().sum(dim=1).mean()


def informative(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Which stages are compared, given the height and width of each: up to three, from the first to the last.

    The last stage of each resolution, of the three smallest resolutions with at least four positions; where all stages
    have one resolution, those at one third, two thirds and all of the depth.
    """
    if len(set(sizes)) == 1:
        indices = sorted({math.ceil(third * len(sizes) / 3) - 1 for third in (1, 2, 3)})
    else:
        indices = sorted({size: index for index, size in enumerate(sizes)}.values())
    return [index for index in indices if math.prod(sizes[index]) >= 4][-3:]
