"""The contract of a defense: what a defender may see is a type, and the only argument.

No view holds the attack, its trigger, its target label, the roles of training images or a test image.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Union

import torch
from torch import Tensor

from bench.engine.data import Augmentation, ImageSet
from bench.engine.models import Classifier
from bench.engine.registry import Registry
from bench.engine.settings import check, plain
from bench.engine.training import Hooks, Net, Recipe, Tensors, TrainingLog, fit

defense = Registry("defense")


class NotApplicable(Exception):
    """The method has no meaning for this model; the text says why, and the table shows it."""


@dataclass(frozen=True)
class DefenderView:
    """What any defender owns: the infected model, and no image at all.

    Attributes:
        model: your own copy, in eval mode; it normalises inside, change it freely.
        num_classes: of the data set.
        seed: the source of every random number you draw.
        device: where the model is, and the images.
        log: give it to `fit`, or record curves with `log.record(name, value, step)`.
    """

    model: Classifier
    num_classes: int
    seed: int
    device: torch.device
    log: TrainingLog


@dataclass(frozen=True)
class ImagesView(DefenderView):
    """Base of the views with images; a method asks for one of those below.

    Attributes:
        augmentation: what is usual for such images (no mirror images of traffic signs).
    """

    augmentation: Augmentation

    @property
    def images(self) -> ImageSet:
        """The labelled images that the defender owns."""
        raise NotImplementedError

    def fit(
        self,
        model: Net,
        recipe: Recipe,
        *,
        stream: str = "train",
        data: ImageSet | None = None,
        augment: bool = True,
        hooks: Hooks | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        after_epoch: Callable[[torch.nn.Module, int], None] | None = None,
    ) -> Net:
        """Train `model` in place with this view's seed, augmentation and log; see `bench.engine.training.fit`.

        Args:
            data: None trains on all images of the view.
            augment: False trains on the images as they are.
        """
        return fit(
            model,
            self.images if data is None else data,
            recipe,
            seed=self.seed,
            augmentation=self.augmentation if augment else None,
            hooks=hooks,
            log=self.log,
            stream=stream,
            optimizer=optimizer,
            after_epoch=after_epoch,
        )


@dataclass(frozen=True)
class ReserveView(ImagesView):
    """The same defender with a small labelled reserve that the model never saw.

    Attributes:
        reserve: a share of it may be poisoned; nothing here says which.
    """

    reserve: ImageSet

    @property
    def images(self) -> ImageSet:
        return self.reserve


@dataclass(frozen=True)
class TrainsetView(ImagesView):
    """The same defender with the training set as shipped, poison included and unmarked.

    Attributes:
        trainset: the images and the labels that the attacker gave them.
        fresh_model: the same architecture, untrained; another seed, other weights.
        recipe: how such a network is usually trained on such data, for a method that trains one anew.
    """

    trainset: ImageSet
    fresh_model: Callable[[int], Classifier]
    recipe: Recipe

    @property
    def images(self) -> ImageSet:
        return self.trainset


# A setting offers a view; the first one is offered to a method that needs no image.
THREAT_MODELS: dict[str, type[DefenderView]] = {"reserve": ReserveView, "trainset": TrainsetView}


@dataclass(frozen=True)
class Step:
    """One step of a progressive method, for the evaluator to score against the truth; a method never does.

    Attributes:
        name: what the step is called, e.g. `step 0`.
        selected: (N,) bool, which of the view's images the step trained on; None if it chose none.
        suspicion: (N,) scores after the step, higher = more suspicious; None if it gave none.
        weights: the model's state after the step; take it with `weights_of`.
    """

    name: str
    selected: Tensor | None = None
    suspicion: Tensor | None = None
    weights: Tensors | None = None


def weights_of(model: Classifier) -> Tensors:
    """A copy of the model's state, on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


@dataclass(frozen=True)
class DefenseResult:
    """What a defense returns. N counts the images of its view: the training set, or the reserve.

    Attributes:
        model: the repaired model: the architecture of the view, changed in its weights. Only these are kept.
        suspicion: (N,) one score for each image, higher = more suspicious, if the method has one.
        flagged: (N,) bool, the images that the method itself calls poisoned, by its own rule.
        steps: the steps of a progressive method, in order; their names differ.
    """

    model: Classifier
    suspicion: Tensor | None = None
    flagged: Tensor | None = None
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Defense:
    """Base of all defenses and baselines: a frozen dataclass of settings with one method.

    `defend` runs once in a trial. Annotate `view` with the least that you need: the harness offers exactly that, and
    shows the cells that cannot offer it as not applicable. It returns; it does not print, save or evaluate itself.
    It raises NotApplicable where the method has no meaning for the model.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "none"
    version: ClassVar[int] = 1  # goes up when a change of code can change a figure

    def __post_init__(self) -> None:
        check(type(self), vars(self), f"defense.{getattr(self, 'name', type(self).__name__)}.")

    def defend(self, view: Any) -> DefenseResult:
        raise NotImplementedError(f"defense {self.name!r} has no defend")


@dataclass(frozen=True)
class Filter(Defense):
    """Base of the methods that look for poisoned training images, and train a fresh network on the others.

    The subclass writes `inspect`. Where nothing is flagged the given model comes back: it is what training on all the
    images gives.
    """

    retrain: bool = plain(
        True, "train a fresh network on the images that are not flagged; false only detects and returns the given model"
    )

    def inspect(self, view: TrainsetView) -> tuple[Tensor, Tensor]:
        """(N,) suspicion, finite and higher = more suspicious, and (N,) bool flags by the method's own rule."""
        raise NotImplementedError(f"defense {self.name!r} has no inspect")

    def defend(self, view: TrainsetView) -> DefenseResult:
        suspicion, flagged = self.inspect(view)
        view.log.record(f"{self.name}/flagged", flagged.double().mean().item(), 0)
        model = view.model
        if self.retrain and flagged.any():
            model = view.fit(view.fresh_model(view.seed), view.recipe, data=view.trainset[~flagged], stream=self.name)
        return DefenseResult(model, suspicion=suspicion, flagged=flagged)


def assumed_poison(rate: float, images: int, in_class: int) -> int:
    """How many of a class's images a filter takes for poisoned, if it is the target: at least 1.

    Args:
        rate: assumed poisoned / all training images.
        images: in the training set.
        in_class: of them, those labelled with the class. No filter can tell poison from a clean class when it is the
            larger part, so at most a third counts as such, and a tenth of a class of less than 500.
    """
    return max(1, min(round(rate * images), int((0.33 if in_class >= 500 else 0.1) * in_class)))


def views_of(method: type[Defense]) -> tuple[type[DefenderView], ...]:
    """The views that a defense accepts, as its `defend` annotates them.

    Raises:
        TypeError: the annotation is missing, or is not a view.
    """
    hint = typing.get_type_hints(method.defend).get("view")
    views = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is Union else (hint,)
    if not all(isinstance(view, type) and issubclass(view, DefenderView) for view in views):
        raise TypeError(
            f"defense {method.name!r}: annotate the argument of defend, e.g. `def defend(self, view: ReserveView)`"
        )
    return views


def offered(method: type[Defense], threat_model: str) -> type[DefenderView] | None:
    """The least view that this setting offers and the method accepts; None is not applicable."""
    views = views_of(method)
    full = THREAT_MODELS[threat_model]
    return next((view for view in (DefenderView, full) if view in views), None)
