"""Progressive Backdoor Erasing (PBE): purify the model with images it trusts, trust more images, again and again.

Paper: Mu et al., Progressive Backdoor Erasing, CVPR 2023, arXiv:2202.06312.
Differs: an epoch is a pass in random order; the released code keeps the order of the data set. A step makes at least
`min_updates` updates, those of the first step on 50,000 images, because what erases is the number of adversarial
updates and 5 % of a small set are one batch; on 50,000 images every count is the released code's. The rate is 1e-2;
`pbe_code` has the released 1e-3. Adversarial images are clamped to [0, 1]. The released script ends in an error when
it selects after its last step; nothing is selected there. Images are augmented as is usual for the data set. `guard`
is ours.
Limits: the method needs its first step, on images a share of which is poisoned, to lower the attack success rate.
Where it does not (small patches that epsilon cannot imitate), triggered images are those whose logits move least, the
score ranks them first, and the selection concentrates poison. The guard looks for this and often misses it; no
reaction to it is known to help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.data import ImageSet, equal_batches, generator
from bench.engine.settings import choice, count, plain, share
from bench.engine.training import make_optimizer
from defenses.aft import AdversarialRepair, AdversarialStart
from defenses.base import DefenderView, DefenseResult, ReserveView, Step, TrainsetView, defense, weights_of

LEAST = 2  # images to train on: batch norm has no variance from one
GUARDS = ("off", "warn", "per_class", "asc", "drop_class")


@dataclass(frozen=True)
class Progressive(AdversarialRepair):
    """Base of PBE and PUD: steps, each on the images that the scores after the step before chose."""

    initial_share: float = share(0.05, "share of the images, drawn at random, in E_0", above=0)
    adversarial_batches: int = count(
        31,
        "how many batches, from the first, are adversarial in a later step that has no whole "
        "adversarial epoch; 31 of 128 images are about 4,000",
    )
    min_updates: int = count(200, "least updates of each step (PUD: and stage), however small its set")
    guard: str = choice(
        "warn",
        "after each scoring, lift and flip (see `concentration`) are logged for the class of the "
        "largest lift. With `off` that is all; with `warn` the class that fires the guard is logged "
        "too (-1: none). The others react: E is chosen within each class (`per_class`) or from the "
        "worst scores (`asc`); or the first step is done again, from the infected weights, without "
        "images of that class (`drop_class`, later steps warn)",
        GUARDS,
    )
    selection: bool = plain(True, "choose E_1, E_2, ... by the scores; false keeps E_0 in all steps")

    def _watch(self, view: DefenderView, labels: Tensor, chosen: Tensor, changed: Tensor, step: int) -> int | None:
        """Log what the guard sees; the class that fires it, None if none does."""
        lift, flip = concentration(labels, chosen, changed, view.num_classes)
        suspect = suspect_class(lift, flip)
        top = int(lift.nan_to_num(nan=-1.0).argmax()) if suspect is None else suspect
        view.log.record(f"{self.name}/lift", float(lift[top]), step)
        view.log.record(f"{self.name}/flip", float(flip[top]), step)
        view.log.record(f"{self.name}/median_flip", float(flip.nanquantile(0.5)), step)
        if self.guard != "off":
            view.log.record(f"{self.name}/suspect_class", -1 if suspect is None else suspect, step)
        return suspect


@defense("pbe")
@dataclass(frozen=True)
class ProgressiveBackdoorErasing(Progressive):
    """Fine-tune on E_0, a random part of the images; score all images; fine-tune on E_1, the best; and so on.

    The images are the training set, or a reserve that may be tainted: their poison takes part unmarked. An image's
    score is the similarity of its logits before the defense and now. One optimizer serves the whole run.
    """

    paper: ClassVar[str] = "arXiv:2202.06312"
    version: ClassVar[int] = 2  # attacks in the precision of the training
    rates: list[float] = share(
        [0.2, 0.5, 0.7],
        "share of the images in E_1, E_2, ...; one step more than rates, the last of which is not "
        "followed by a selection",
        above=0,
    )
    epochs: int = count(10, "passes of each step; in the first step all are adversarial", at_least=1)
    disagreement: float = share(
        0.0,
        "subtracted from the score of an image whose predicted class changed; PUD takes 0.5",
    )
    order_step0: str = choice(
        "desc",
        "E_1 is the best of the scores (`desc`), or the worst (`asc`), a branch that the released "
        "code has switched off",
        ("desc", "asc"),
    )
    restart: bool = plain(
        False,
        "start each step from the infected weights with a new optimizer, instead of going on",
    )

    def schedule(self, step: int, images: int) -> tuple[int, int]:
        """Updates of a step on so many images, and how many of them, from the first, are adversarial."""
        updates = updates_in(images, self.batch_size, self.epochs, self.min_updates)
        return updates, updates if step == 0 else min(self.adversarial_batches, updates)

    def defend(self, view: TrainsetView | ReserveView) -> DefenseResult:
        data, model = images_of(view), view.model
        infected = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = make_optimizer(self.recipe(0), model)
        reference = logits_of(model, data)
        chosen = drawn(len(data), self.initial_share, view)
        done: list[Step] = []

        def fine_tune(step: int, again: bool = False) -> tuple[Tensor, Tensor]:
            """Fine-tune on the chosen images; then each image's score, and whether its predicted class changed."""
            updates, adversarial = self.schedule(step, int(chosen.sum()))
            stream = f"step_{step}_again" if again else f"step_{step}"
            self.train(
                view,
                data[chosen],
                self.recipe(updates),
                AdversarialStart(self, adversarial),
                stream,
                optimizer=optimizer,
            )
            current = logits_of(model, data)
            score = similarity(reference, current, self.disagreement)
            done.append(Step(stream.replace("_", " "), chosen, -score, weights_of(model)))
            return score, reference.argmax(dim=1) != current.argmax(dim=1)

        for step in range(len(self.rates) + 1):
            if step and self.restart:
                model.load_state_dict(infected)
                optimizer = make_optimizer(self.recipe(0), model)
            score, changed = fine_tune(step)
            if step == len(self.rates) or not self.selection:
                continue
            rate, worst = self.rates[step], step == 0 and self.order_step0 == "asc"
            best = highest(-score if worst else score, rate)
            suspect = self._watch(view, data.labels, best, changed, step)
            if suspect is not None and self.guard == "per_class":
                best = highest(score, rate, within=data.labels)
            elif suspect is not None and self.guard == "asc":
                best = highest(-score, rate)
            elif suspect is not None and self.guard == "drop_class" and step == 0:
                model.load_state_dict(infected)
                optimizer = make_optimizer(self.recipe(0), model)
                chosen = drawn(len(data), self.initial_share, view, among=data.labels != suspect)
                best = highest(fine_tune(0, again=True)[0], rate)
            chosen = best
        return DefenseResult(model, suspicion=done[-1].suspicion, steps=tuple(done))


@defense("pbe_code")
@dataclass(frozen=True)
class ReleasedPBE(ProgressiveBackdoorErasing):
    """PBE at the rate of the released code."""

    lr: float = 0.001


def images_of(view: TrainsetView | ReserveView) -> ImageSet:
    """The images that the defense works through: the training set, or the reserve in its place."""
    return view.trainset if isinstance(view, TrainsetView) else view.reserve


def updates_in(images: int, batch_size: int, epochs: int, least: int) -> int:
    """Updates of so many passes over so many images, but at least `least`."""
    return max(epochs * equal_batches(images, batch_size)[0], least)


@torch.no_grad()
def logits_of(model: nn.Module, data: ImageSet) -> Tensor:
    """(N, classes): logits of a whole set, in eval mode and without augmentation."""
    model.eval()
    return torch.cat([model(images) for images, _ in data.chunks()])


def similarity(reference: Tensor, current: Tensor, disagreement: float = 0.0) -> Tensor:
    """(N,) float64: 1/2 + 1/2 cos of two logit vectors of each image, in [0, 1]; high is clean.

    It is 0 where a vector is zero, as in the released code. `disagreement` is subtracted where the predicted class
    differs: with 1/2 this is PUD's prediction-consistency score, in [-1/2, 1].
    """
    before, now = reference.double(), current.double()
    score = (0.5 + 0.5 * F.cosine_similarity(before, now, dim=1, eps=0)).nan_to_num(nan=0.0).clamp(0, 1)
    return score - disagreement * (before.argmax(dim=1) != now.argmax(dim=1))


def drawn(count: int, share: float, view: DefenderView, among: Tensor | None = None) -> Tensor:
    """(N,) bool: that share of the images, rounded down, drawn at random, at least two; `among` (N,) bool limits it."""
    order = torch.randperm(count, generator=generator(view.seed, "initial set")).to(view.device)
    if among is not None:
        order = order[among[order]]
    chosen = torch.zeros(count, dtype=torch.bool, device=view.device)
    chosen[order[: max(LEAST, floor(share * len(order)))]] = True
    return chosen


def highest(score: Tensor, rate: float, within: Tensor | None = None, among: Tensor | None = None) -> Tensor:
    """(N,) bool: the floor(rate N) images of the highest scores, at least two; ties go to the lower index.

    `within` (N,) int64 takes that share of each of its classes; `among` (N,) bool limits it to these.
    """
    chosen = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    all_of_them = torch.arange(len(score), device=score.device) if among is None else among.nonzero().flatten()
    groups = [all_of_them]
    if within is not None:
        labels = within[all_of_them]
        groups = [all_of_them[labels == label] for label in labels.unique().tolist()]
    for group in groups:
        best = score[group].argsort(descending=True, stable=True)
        chosen[group[best[: max(LEAST, floor(rate * len(group)))]]] = True
    return chosen


def floor(value: float) -> int:
    """The floor of a product with a decimal share: 0.29 x 100 is 29, not 28."""
    return math.floor(value + 1e-9)


def concentration(labels: Tensor, chosen: Tensor, changed: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """What the guard sees of each class of given labels, without the truth.

    Args:
        labels: (N,) int64, as given.
        chosen: (N,) bool, the selected images.
        changed: (N,) bool, the images whose predicted class the defense has changed so far.

    Returns:
        lift: (num_classes,) float64, share of the class in the selection over its share in the whole.
        flip: (num_classes,) float64, share of the class that changed. Both are NaN for a class without images.
    """
    counts = torch.bincount(labels, minlength=num_classes).double()
    selected = torch.bincount(labels[chosen], minlength=num_classes) / chosen.sum()
    lift = selected / (counts / len(labels))
    return lift, torch.bincount(labels[changed], minlength=num_classes) / counts


def suspect_class(lift: Tensor, flip: Tensor) -> int | None:
    """The class that gathers in the selection and does not change: lift > 2, flip < half the median flip.

    Of several the one of the largest lift; None if there is none.
    """
    fires = (lift > 2) & (flip < 0.5 * flip.nanquantile(0.5))
    return int(torch.where(fires, lift, -1.0).argmax()) if fires.any() else None
