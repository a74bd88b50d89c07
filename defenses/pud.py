"""Progressive Unified Defense (PUD): PBE with SPECTRE beside its score, then unlearning, then a mean teacher.

Paper: Niu et al., Towards Unified Robustness Against Both Backdoor and Adversarial Attacks, arXiv:2405.17929.
Differs: `pud` is the unified defense of the paper's claim: its mean-teacher stage trains on adversarial images, at a
rate of 1e-2 with a cosine to zero. `pud_code` is the released schedule, whose last adversarial update comes long
before. Beyond that, what the released code leaves open or undone is done: the infected weights are loaded, the attack
runs in eval mode and in pixel units, adversarial images are clamped to [0, 1], training images are augmented as is
usual for the data set. The target label is not known: detectors name it (`elected`); without two that agree, or where
no class stands out for SPECTRE, it is left out. Its features are what the head reads (`last_stage`: all maps of the
last stage, where the released code takes its first block), its budgets follow the class (at most a third of it) instead
of fixed numbers. The anchor of unlearning is the weights on entering the stage, its ascent is bounded, and clean and
poisoned images pass in one batch, 30 passes over the clean ones. The teacher follows after each optimizer step, running
statistics of batch norm included. A step makes at least `min_updates` updates, as in PBE; on 50,000 images without
SPECTRE every count of the steps is the released code's. `guard` is ours, as in PBE. The released rates have a fifth,
0.9, whose set nothing trains on.
Limits: PBE's, which all steps share. SPECTRE needs poison to be the smaller part of its class (see its own file), and
in a small reserve its classes are too small to be asked.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.adversarial import pgd
from bench.engine.data import ImageSet, generator
from bench.engine.metrics import features, predict
from bench.engine.models import Classifier
from bench.engine.settings import choice, count, number, pixels, plain, share
from bench.engine.training import Hooks, Recipe, Tensors, make_optimizer
from defenses.aft import AdversarialStart
from defenses.base import DefenseResult, ReserveView, Step, TrainsetView, assumed_poison, defense, weights_of
from defenses.pbe import Progressive, drawn, highest, images_of, logits_of, similarity, updates_in
from defenses.spectre import class_strengths, oversized_class, quantum_scores, strongest_class

ENOUGH = 100  # images of a class with which SPECTRE is asked, as in the released code


@defense("pud")
@dataclass(frozen=True)
class ProgressiveUnifiedDefense(Progressive):
    """SPECTRE on the target class; PBE's steps on the rest; unlearning of the worst images; a mean teacher.

    The images are the training set, or a reserve that may be tainted: their poison takes part unmarked.
    """

    paper: ClassVar[str] = "arXiv:2405.17929"
    version: ClassVar[int] = 4  # attacks in the precision of the training
    rates: list[float] = share(
        [0.2, 0.4, 0.7, 0.8],
        "share of the images that SPECTRE leaves in E_1, E_2, ...: the best prediction-consistency scores",
        above=0,
    )
    epochs: list[int] = count([10, 10, 10, 10, 30], "passes of each step; one more than rates", at_least=1)
    adversarial_epochs: list[int] = count(
        [10, 2, 1, 0, 0],
        "adversarial passes of each step, from its first; a step whose epochs are all adversarial is so to its end",
    )
    epsilons: list[float] = share(
        [1.0, 1.0, 1.0, 1.0, 2 / 3],
        "radius of each step as a share of epsilon; the last of 4/255 beside 6/255",
        above=0,
    )
    step_sizes: list[float] = share(
        [1 / 5, 1 / 5, 1 / 5, 1 / 6, 1 / 6],
        "step of the attack in each step, as a share of its radius. `step_size` is that of the teacher stage",
        above=0,
    )
    lr_drops: list[float] = share(
        [3 / 7, 6 / 7],
        "where the rate falls tenfold, as a share of all steps' epochs: after 30 and 60 of 70",
        above=0,
    )
    disagreement: float = number(
        0.5,
        "subtracted from the score of an image whose predicted class changed; 0 is PBE's score",
        at_least=0,
    )
    spectre: bool = plain(True, "remove what SPECTRE flags in the target class before the first step")
    spectre_inner: bool = plain(
        True,
        "drop what it flags there in E_1, E_2, ... by the features of that moment, for one step each",
    )
    spectre_all: bool = plain(False, "filter every class in place of the target class, as all-to-all attacks need it")
    spectre_features: str = choice(
        "pooled",
        "`pooled`, what the head reads, or `last_stage`, the maps of the last stage",
        ("pooled", "last_stage"),
    )
    poison_rate: float = share(0.1, "assumed poisoned / all images, for the first call", above=0, below=1)
    spectre_share: float = number(
        0.12,
        "assumed share of poison in a class, for the other calls and the search",
        above=0,
        at_most=0.33,
    )
    search_epsilon: float = pixels(4 / 255, "radius of the adversarial examples that one of the votes looks at")
    target_label: int | None = count(None, "null is found by vote. A number is the attacker's knowledge, for ablations")
    unlearning: bool = plain(
        True,
        "do the stage of `unlearning_loss`, on the last E and the tail of the scores before it",
    )
    tail: float = share(0.01, "share of all images, the worst scores, to unlearn and to flag in the verdict", above=0)
    unlearning_epochs: int = count(30, "passes of that stage", at_least=1)
    unlearning_weight: float = number(0.003, "weight of the ascent", at_least=0)
    ascent_limit: float = number(10.0, "cross-entropy of the tail from which on the ascent ends", at_least=0)
    anchor_weight: float = number(1e-4, "weight of the L1 distance to the weights on entering the stage", at_least=0)
    teacher: bool = plain(True, "do the stage of `consistency_loss`, on the last E")
    teacher_epochs: int = count(30, "passes of that stage", at_least=1)
    consistency_weight: float = number(0.05, "weight of the consistency", at_least=0)
    teacher_momentum: float = share(0.99, "momentum of the moving average", below=1)
    teacher_adversarial: bool = plain(True, "train the stage on adversarial images of the student, of radius epsilon")
    teacher_lr: float | None = number(
        0.01,
        "first rate of a cosine to zero; null goes on at the rate where the steps ended",
        at_least=0,
    )
    shipped: str = choice(
        "student",
        "which one is returned, `student` or `teacher`; the steps have both",
        ("student", "teacher"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("epochs", "adversarial_epochs", "epsilons", "step_sizes"):
            if len(getattr(self, key)) != len(self.rates) + 1:
                raise ValueError(
                    f"defense.{self.name}.{key} has {len(getattr(self, key))} values; write "
                    f"{len(self.rates) + 1}, one for each step: one more than rates"
                )
        if self.batch_size < 2:
            raise ValueError(f"defense.{self.name}.batch_size is {self.batch_size}; unlearning needs 2 images or more")

    def schedule(self, step: int, images: int) -> tuple[int, int]:
        """Updates of a step on so many images, and how many of them, from the first, are adversarial."""
        updates = updates_in(images, self.batch_size, self.epochs[step], self.min_updates)
        if self.adversarial_epochs[step] >= self.epochs[step]:
            return updates, updates
        adversarial = updates_in(images, self.batch_size, self.adversarial_epochs[step], self.adversarial_batches)
        return updates, min(adversarial, updates)

    def step_recipe(self, step: int, updates: int) -> Recipe:
        """The updates of one step, at the rate of its place among all steps."""
        total = sum(self.epochs)
        begin = sum(self.epochs[:step]) / total
        return FallingRate(
            **vars(self.recipe(updates)),
            begin=begin,
            end=begin + self.epochs[step] / total,
            drops=tuple(self.lr_drops),
        )

    def defend(self, view: TrainsetView | ReserveView) -> DefenseResult:
        if self.target_label is not None and self.target_label >= view.num_classes:
            raise ValueError(
                f"defense.{self.name}.target_label is {self.target_label}; write 0 to {view.num_classes - 1}"
            )
        data, model = images_of(view), view.model
        infected = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = make_optimizer(self.recipe(0), model)
        reference = logits_of(model, data)
        done: list[Step] = []

        def rated() -> Tensor:
            """Each image's prediction consistency with the infected model, now."""
            return similarity(reference, logits_of(model, data), self.disagreement)

        def fine_tune(step: int, again: bool = False) -> tuple[Tensor, Tensor]:
            """Fine-tune on the chosen images; the logits of all images, and their scores."""
            updates, adversarial = self.schedule(step, int(chosen.sum()))
            radius = self.epsilons[step] * self.epsilon
            attack = AdversarialStart(self, adversarial, epsilon=radius, step_size=self.step_sizes[step])
            stream = f"step_{step}_again" if again else f"step_{step}"
            self.train(view, data[chosen], self.step_recipe(step, updates), attack, stream, optimizer)
            current = logits_of(model, data)
            score = similarity(reference, current, self.disagreement)
            done.append(Step(stream.replace("_", " "), chosen, -score, weights_of(model)))
            return current, score

        votes = self._votes(view, data)
        everything = torch.ones(len(data), dtype=torch.bool, device=view.device)
        trusted = self._filtered(view, data, everything, votes, inner=False) if self.spectre else everything
        if not trusted.all():
            done.append(Step("SPECTRE", trusted))
        chosen = drawn(len(data), self.initial_share, view, among=trusted)
        for step in range(len(self.epochs)):
            selected = chosen
            if step and self.spectre_inner:  # what it removes is left out of this step alone
                chosen = self._filtered(view, data, selected, votes, inner=True)
                if (selected != chosen).any():
                    done.append(Step(f"selection {step}", selected))
            current, score = fine_tune(step)
            if step == 0 or step < len(self.rates):
                tail = self._tail(score)
            if step == len(self.rates):
                break
            best = highest(score, self.rates[step], among=trusted)
            changed = reference.argmax(dim=1) != current.argmax(dim=1)
            suspect = self._watch(view, data.labels, best, changed, step)
            if step == 0:
                widest = widest_class(similarity(reference, current), data.labels, view.num_classes)
                named = widest if suspect is None else suspect
                view.log.record(f"{self.name}/target_scores", named, 0)
                votes["scores"] = named
            if suspect is not None and self.guard == "per_class":
                best = highest(score, self.rates[step], within=data.labels, among=trusted)
            elif suspect is not None and self.guard == "asc":
                best = highest(-score, self.rates[step], among=trusted)
            elif suspect is not None and self.guard == "drop_class" and step == 0:
                model.load_state_dict(infected)
                optimizer = make_optimizer(self.recipe(0), model)
                selected = drawn(len(data), self.initial_share, view, among=trusted & (data.labels != suspect))
                chosen = selected
                score = fine_tune(0, again=True)[1]
                best, tail = highest(score, self.rates[0], among=trusted), self._tail(score)
            chosen = best if self.selection else selected

        if self.unlearning:
            done.append(Step("tail", tail))
            self._unlearn(view, data[chosen], data[tail], optimizer)
            score = rated()
            done.append(Step("unlearning", chosen, -score, weights_of(model)))
        if self.teacher:
            teacher = self._teach(view, data[chosen], optimizer)
            score = rated()
            done.append(Step("student", chosen, -score, weights_of(model)))
            done.append(Step("teacher", chosen, None, weights_of(teacher)))
            if self.shipped == "teacher":
                model.load_state_dict(teacher.state_dict())
                score = rated()
        return DefenseResult(model, suspicion=-score, flagged=self._tail(score), steps=tuple(done))

    def _unlearn(
        self, view: TrainsetView | ReserveView, clean: ImageSet, poison: ImageSet, optimizer: torch.optim.Optimizer
    ) -> None:
        """The unlearning stage: no augmentation, the poison's share of each batch as of both sets, but never none."""
        in_batch = round(self.batch_size * len(poison) / (len(poison) + len(clean)))
        in_batch = min(max(1, in_batch), self.batch_size - 1)
        clean_in_batch = self.batch_size - in_batch
        updates = updates_in(len(clean), clean_in_batch, self.unlearning_epochs, self.min_updates)
        recipe = replace(self.recipe(updates), lr=self._last_lr, batch_size=clean_in_batch)
        hooks = Unlearning(self, view.model, poison, in_batch)
        self.train(view, clean, recipe, hooks, "unlearning", optimizer, augment=False)

    def _teach(self, view: TrainsetView | ReserveView, clean: ImageSet, optimizer: torch.optim.Optimizer) -> Classifier:
        """The mean-teacher stage: trains the view's model as the student, and returns the teacher."""
        updates = updates_in(len(clean), self.batch_size, self.teacher_epochs, self.min_updates)
        if self.teacher_lr is None:
            recipe = replace(self.recipe(updates), lr=self._last_lr)
        else:
            recipe = replace(self.recipe(updates, "cosine"), lr=self.teacher_lr)
        pair = MeanTeacher(self, view.model, updates)
        self.train(view, clean, recipe, pair, "teacher", optimizer)
        return pair.teacher

    @property
    def _last_lr(self) -> float:
        """The rate at which the steps end."""
        return self.lr * 0.1 ** len(self.lr_drops)

    def _tail(self, score: Tensor) -> Tensor:
        """(N,) bool: the worst scores, N - floor((1 - tail) N) of them as in the released code."""
        return ~highest(score, 1 - self.tail)

    def _votes(self, view: TrainsetView | ReserveView, data: ImageSet) -> dict[str, int | None]:
        """The target label as each detector names it, on the infected model; empty where SPECTRE needs none."""
        if self.target_label is not None or self.spectre_all or not (self.spectre or self.spectre_inner):
            return {}
        rows = self._features(view.model, data)
        strengths = class_strengths(rows, data.labels, seed=view.seed, share=self.spectre_share)
        for label, value in strengths.items():
            view.log.record(f"{self.name}/strength", value, label)
        votes: dict[str, int | None] = {
            "spectre": strongest_class(strengths),
            "adversarial": adversarial_target(
                view.model, data, view.num_classes, epsilon=self.search_epsilon, seed=view.seed
            ),
            "size": oversized_class(data.labels, view.num_classes),
        }
        for name, vote in votes.items():
            view.log.record(f"{self.name}/target_{name}", -1 if vote is None else vote, 0)
        return votes

    def _filtered(
        self,
        view: TrainsetView | ReserveView,
        data: ImageSet,
        selected: Tensor,
        votes: dict[str, int | None],
        inner: bool,
    ) -> Tensor:
        """(N,) bool: what SPECTRE leaves of the kept images, by the features of the model as it is now."""
        target = elected(votes) if self.target_label is None else self.target_label
        targets = range(view.num_classes) if self.spectre_all else () if target is None else (target,)
        left = selected.clone()
        for label in targets:
            members = (selected & (data.labels == label)).nonzero().flatten()
            if len(members) < ENOUGH:
                continue
            if inner or self.spectre_all:
                budget = assumed_poison(self.spectre_share, len(members), len(members))
            else:
                budget = assumed_poison(self.poison_rate, len(data), len(members))
            flagged = quantum_scores(self._features(view.model, data[members]), budget).flagged
            left[members[flagged]] = False
        return left

    @torch.no_grad()
    def _features(self, model: Classifier, data: ImageSet) -> Tensor:
        if self.spectre_features == "pooled":
            return features(model, data)
        model.eval()
        return torch.cat([model.stages(images)[-1].flatten(1) for images, _ in data.chunks(256)])


@defense("pud_code")
@dataclass(frozen=True)
class ReleasedPUD(ProgressiveUnifiedDefense):
    """PUD by the released schedule: no adversarial image in the mean-teacher stage, which goes on at 1e-4."""

    teacher_adversarial: bool = False
    teacher_lr: float | None = None


@dataclass(frozen=True)
class FallingRate(Recipe):
    """A constant rate that falls tenfold at given shares of the whole, of which this training is a part.

    Attributes:
        begin, end: where the training lies in the whole, in [0, 1].
        drops: shares of the whole in [0, 1].
    """

    begin: float = 0.0
    end: float = 1.0
    drops: tuple[float, ...] = ()

    def learning_rate(self, step: int, steps: int) -> float:
        progress = self.begin + (self.end - self.begin) * step / steps
        return self.lr * 0.1 ** sum(progress + 1e-9 >= drop for drop in self.drops)


class Unlearning(Hooks):
    """Adds images of the poison tail to each batch, and unlearns them near the weights on entering the stage."""

    def __init__(self, settings: ProgressiveUnifiedDefense, model: nn.Module, poison: ImageSet, in_batch: int) -> None:
        self.settings, self.poison, self.in_batch = settings, poison, in_batch
        self.anchor = [weight.detach().clone() for weight in model.parameters()]

    def batch(self, images: Tensor, labels: Tensor, step: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        picked = torch.randint(len(self.poison), (self.in_batch,), generator=source, device=images.device)
        return torch.cat([images, self.poison.batch(picked)]), torch.cat([labels, self.poison.labels[picked]])

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        pud = self.settings
        loss = unlearning_loss(
            model(images), labels, self.in_batch, weight=pud.unlearning_weight, limit=pud.ascent_limit
        )
        return loss + pud.anchor_weight * distance(list(model.parameters()), self.anchor)


class MeanTeacher(AdversarialStart):
    """A teacher that follows the student's weights, and draws its predictions towards its own."""

    def __init__(self, settings: ProgressiveUnifiedDefense, student: Classifier, updates: int) -> None:
        super().__init__(settings, updates if settings.teacher_adversarial else 0)
        self.weight, self.momentum = settings.consistency_weight, settings.teacher_momentum
        self.teacher = copy.deepcopy(student).eval().requires_grad_(False)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        with torch.no_grad():
            aim = self.teacher(images)
        logits = model(images)
        return F.cross_entropy(logits, labels, label_smoothing=smoothing) + self.weight * consistency_loss(logits, aim)

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        follow(self.teacher, model, min(1 - 1 / (step + 1), self.momentum))

    def tensors(self) -> Tensors:
        return self.teacher.state_dict()

    def restore(self, tensors: Tensors) -> None:
        self.teacher.load_state_dict(tensors)


def unlearning_loss(logits: Tensor, labels: Tensor, poisoned: int, *, weight: float, limit: float) -> Tensor:
    """Cross-entropy of the first images of a batch, less `weight` times that of the last `poisoned` ones.

    From `limit` on the second stays constant: without a bound, ascent alone would destroy the model. An empty part of
    the batch counts nothing.
    """
    clean = len(labels) - poisoned
    loss = logits.new_zeros(())
    if clean:
        loss = loss + F.cross_entropy(logits[:clean], labels[:clean])
    if poisoned:
        loss = loss - weight * F.cross_entropy(logits[clean:], labels[clean:]).clamp(max=limit)
    return loss


def distance(weights: list[nn.Parameter], anchor: list[Tensor]) -> Tensor:
    """The L1 distance of all weights to the anchor; buffers have no part in it."""
    return torch.stack([(weight - at).abs().sum() for weight, at in zip(weights, anchor, strict=True)]).sum()


def consistency_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the two softmax outputs, *summed* over batch and classes, from (B, classes) logits."""
    return (student.softmax(dim=1) - teacher.softmax(dim=1)).square().sum()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum teacher + (1 - momentum) student, running statistics of batch norm included."""
    now = student.state_dict()
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            value.lerp_(now[name], 1 - momentum)
        else:
            value.copy_(now[name])  # the number of batches seen is no quantity to average


@torch.no_grad()
def adversarial_target(
    model: Classifier, data: ImageSet, num_classes: int, *, epsilon: float, seed: int, most: int = 2000
) -> int | None:
    """The class that untargeted adversarial examples of the infected model gather in; None if none fools it.

    Of each class: the share of fooled images of other labels that end in it, on up to `most` images drawn at random
    that the model gives their label; ten steps of a fifth of epsilon.
    """
    picked = torch.randperm(len(data), generator=generator(seed, "target search"))[:most].to(data.labels.device)
    sample = data[picked]
    sample = sample[predict(model, sample) == sample.labels]
    if not len(sample):
        return None
    predictions = [
        model(pgd(model, images, labels, epsilon=epsilon, step_size=epsilon / 5, steps=10)).argmax(dim=1)
        for images, labels in sample.chunks(512)
    ]
    ends = torch.cat(predictions)
    fooled = ends != sample.labels
    if not fooled.any():
        return None
    ending = torch.bincount(ends[fooled], minlength=num_classes)
    others = fooled.sum() - torch.bincount(sample.labels[fooled], minlength=num_classes)
    return int((ending / others.clamp(min=1)).argmax())


def widest_class(score: Tensor, labels: Tensor, num_classes: int) -> int:
    """The class of given labels whose scores have the largest standard deviation: clean and poisoned images differ."""
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1)
    means = torch.bincount(labels, weights=score, minlength=num_classes) / counts
    return int(
        (torch.bincount(labels, weights=(score - means[labels]).square(), minlength=num_classes) / counts).argmax()
    )


def elected(votes: dict[str, int | None]) -> int | None:
    """The class that two detectors name; None if no two agree, or if no class stands out for SPECTRE's."""
    if votes.get("spectre") is None:
        return None
    top, count = Counter(label for label in votes.values() if label is not None).most_common(1)[0]
    return top if count >= 2 else None
