"""The contract of an attack: which images it poisons, what its trigger does, which label a victim gets.

An attack is a frozen dataclass of its settings. Everything that it draws or learns lives in a dictionary of tensors
(`prepare`), which is stored with the infected model: the trigger at test time is the trigger of training, and a
stored implant can be attacked, defended and measured anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from bench.engine.counts import images_of, least_share
from bench.engine.data import Augmentation, ImageSet, generator, to_float, to_uint8
from bench.engine.models import Classifier
from bench.engine.registry import Registry
from bench.engine.settings import check, choice, count, plain, share
from bench.engine.training import Hooks, Recipe, Tensors, TrainingLog, fit

attack = Registry("attack")

CLEAN, POISON, COVER = 0, 1, 2  # the roles of training images
EXAGGERATION = 4.0  # what a ramp begins with

LABEL_MODES = ("all_to_one", "all_to_all", "clean_label")
REGIMES = ("static", "per_batch")


@dataclass(frozen=True)
class Setup:
    """What the attacker owns while preparing: the clean training set, and how the victim will be trained.

    Attributes:
        trainset: clean, on the device that all work is done on.
        num_classes, seed: the seed is the source of every random number an attack draws.
        fresh_model: an untrained network of the victim's architecture; another seed, other weights.
        recipe, augmentation: the victim's.
        log: for curves and checkpoints.
        stored_surrogate: gives the surrogate that all attacks of this seed share; None trains one here.
    """

    trainset: ImageSet
    num_classes: int
    seed: int
    fresh_model: Callable[[int], Classifier]
    recipe: Recipe
    augmentation: Augmentation
    log: TrainingLog
    stored_surrogate: Callable[[], Classifier] | None = None

    @property
    def device(self) -> torch.device:
        return self.trainset.device

    def surrogate(self) -> Classifier:
        """A clean network trained by the victim's recipe from another seed, for attacks that optimise on one.

        It is the caller's own copy, in eval mode.
        """
        if self.stored_surrogate is not None:
            return self.stored_surrogate()
        model = self.fresh_model(self.seed + 1_000_003)
        return fit(
            model,
            self.trainset,
            self.recipe,
            seed=self.seed,
            augmentation=self.augmentation,
            log=self.log,
            stream="surrogate",
        )


class AttackHooks(Hooks):
    """Hooks of an attack that owns the training; `learned` gives the trigger's tensors as they are now."""

    def learned(self) -> Tensors:
        return {}


@dataclass(frozen=True)
class Attack:
    """Base of all attacks. A subclass writes `stamp`, and overrides what else its paper does differently."""

    name: ClassVar[str]
    paper: ClassVar[str] = "none"
    version: ClassVar[int] = 1  # goes up when a change of code can change a figure
    label_modes: ClassVar[tuple[str, ...]] = LABEL_MODES
    regimes: ClassVar[tuple[str, ...]] = REGIMES
    # Per batch: does the trigger come before augmentation? A crop can then cut it, as in a static set.
    before_augmentation: ClassVar[bool] = False
    # Does the paper promise that the cover stamp, a wrong trigger, leaves the class alone at test time too?
    has_wrong_trigger: ClassVar[bool] = False

    poison_rate: float = share(0.1, "poisoned / all training images, also for clean-label attacks")
    target_label: int = count(0, "the class that victims are sent to; all-to-all has none")
    label_mode: str = choice(
        "all_to_one",
        "`all_to_one`, `all_to_all` (each class to the next) or `clean_label` (only images of the "
        "target class are poisoned, and keep their label)",
        LABEL_MODES,
    )
    regime: str = choice(
        "static",
        "`static` (a fixed set of images is poisoned before augmentation: the attacker owns only "
        "data) or `per_batch` (a share of every batch is poisoned anew: the attacker owns the "
        "training)",
        REGIMES,
    )
    cover_rate: float = share(0.0, "share of the training images that get the cover stamp and keep their label")
    quantise: bool = plain(True, "round triggered images to 8 bits, as a file would; a static poisoned set always is")

    def __post_init__(self) -> None:
        check(type(self), vars(self), f"attack.{getattr(self, 'name', type(self).__name__)}.")
        if self.poison_rate + self.cover_rate > 1:
            raise ValueError(f"attack.{self.name}: poison_rate + cover_rate is more than all images; lower one")
        for key, allowed in (("label_mode", self.label_modes), ("regime", self.regimes)):
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"attack.{self.name}.{key} is {getattr(self, key)!r}; this attack takes {' or '.join(allowed)}"
                )

    def check(self, class_counts: list[int], shape: tuple[int, int, int]) -> None:
        """Refuse, before any compute, what cannot be done on this data set.

        Args:
            class_counts: training images of each class.
            shape: (C, H, W) of an image.

        Raises:
            ValueError: in one line, with the allowed range.
        """
        if not 0 <= self.target_label < len(class_counts):
            raise ValueError(
                f"attack.{self.name}.target_label is {self.target_label}; the classes are 0 to {len(class_counts) - 1}"
            )
        total, of_target = sum(class_counts), class_counts[self.target_label]
        for key in ("poison_rate", "cover_rate"):
            share = getattr(self, key)
            if share and not images_of(share, total):
                raise ValueError(
                    f"attack.{self.name}.{key} is {share:g}, less than one of {total} images; "
                    f"write at least {least_share(total):g}"
                )
        stamped = images_of(self.poison_rate, total) + images_of(self.cover_rate, total)
        if self.label_mode == "clean_label" and stamped > of_target:
            covers = f" and cover_rate {self.cover_rate:g}" if self.cover_rate else ""
            raise ValueError(
                f"attack.{self.name}.poison_rate is {self.poison_rate:g}{covers}, but a clean-label attack stamps only "
                f"class {self.target_label}, {of_target} of {total} images; write at most {of_target / total:.4f}"
                f"{' in all' if covers else ''}"
            )

    # What a subclass writes -----------------------------------------------------------------------------------

    def prepare(self, setup: Setup) -> Tensors:
        """Draw or learn what the trigger is made of. The result is stored, and handed to every method below."""
        return {}

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        """The trigger as at test time, on (B, C, H, W) float images in [0, 1]; the same shape and range comes back.

        Deterministic, and of each image by itself: batches are cut anywhere.
        """
        raise NotImplementedError(f"attack {self.name!r} has no stamp")

    def stamp_poison(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        """The trigger on poisoned training images, where it differs from the one at test time."""
        return self.stamp(images, tensors)

    def stamp_cover(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        """The trigger (a wrong one, in most papers) on training images that keep their label."""
        return self.stamp_poison(images, tensors, source)

    def hooks(self, setup: Setup, tensors: Tensors) -> AttackHooks:
        """What a per-batch attack does inside the training loop."""
        return PerBatch(self, tensors, setup)

    def recipe(self, recipe: Recipe) -> Recipe:
        """The victim's recipe, where a strong implant needs another."""
        return recipe

    def choose(self, labels: Tensor, source: torch.Generator, poison: int, cover: int) -> Tensor:
        """(N,) uint8: the role of each training image, CLEAN, POISON or COVER.

        Args:
            source: on the CPU, so that the same images are chosen on every device.
            poison, cover: how many there are to be.
        """
        roles = torch.zeros(len(labels), dtype=torch.uint8, device=labels.device)
        if self.label_mode == "clean_label":
            allowed = (labels == self.target_label).nonzero().flatten()
        else:
            allowed = torch.arange(len(labels), device=labels.device)
        order = allowed[torch.randperm(len(allowed), generator=source).to(labels.device)]
        roles[order[:poison]] = POISON
        roles[order[poison : poison + cover]] = COVER
        return roles

    # What the harness calls -----------------------------------------------------------------------------------

    @final
    def trigger(self, images: Tensor, tensors: Tensors) -> Tensor:
        """Test images with the trigger. Refuses a stamp that changes shape or leaves [0, 1]."""
        return self._kept(images, self.stamp(images, tensors))

    @final
    def wrong_trigger(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        """Test images with the cover stamp, for attacks that have a wrong trigger: these must keep their class."""
        return self._kept(images, self.stamp_cover(images, tensors, source))

    @final
    def target_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """(N,) int64: the class that the attacker wants for triggered images of these classes."""
        return (
            (labels + 1) % num_classes
            if self.label_mode == "all_to_all"
            else torch.full_like(labels, self.target_label)
        )

    @final
    def eligible(self, labels: Tensor) -> Tensor:
        """(N,) bool: the test images on which an attack can succeed. Target-class images cannot be sent there."""
        if self.poison_rate == 0:
            return torch.zeros_like(labels, dtype=torch.bool)
        return (
            torch.ones_like(labels, dtype=torch.bool)
            if self.label_mode == "all_to_all"
            else labels != self.target_label
        )

    @final
    def poisoned_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """The labels that poisoned training images are shipped with."""
        return labels if self.label_mode == "clean_label" else self.target_labels(labels, num_classes)

    def poison(
        self, clean: ImageSet, tensors: Tensors, num_classes: int, seed: int, rate: float | None = None
    ) -> tuple[ImageSet, Tensor]:
        """A poisoned copy of a set and the role of each image.

        Args:
            seed: that of `prepare` if the set is the training set.
            rate: None poisons the training set, at the attack's own rate and with its covers; a number is the
                poisoned share of another set (a tainted reserve).
        """
        device = clean.device
        count = images_of(self.poison_rate if rate is None else rate, len(clean))
        cover = images_of(self.cover_rate, len(clean)) if rate is None else 0
        roles = self.choose(clean.labels, generator(seed, "poison"), count, cover)
        possible = int((roles == POISON).sum())
        if possible < count:
            raise ValueError(
                f"attack.{self.name}: {count} images were to be poisoned and only {possible} can be; "
                "lower its poison_rate (or reserve.contamination)"
            )
        images, labels = clean.images.clone(), clean.labels.clone()
        source = generator(seed, "stamp", device=device)
        for role, stamp in ((POISON, self.stamp_poison), (COVER, self.stamp_cover)):
            for chunk in (roles == role).nonzero().flatten().split(1024):
                before = to_float(clean.batch(chunk))
                after = to_uint8(self._kept(before, stamp(before, tensors, source), quantise=False))
                images[chunk.to(images.device)] = after.to(images.device)
        victims = roles == POISON
        labels[victims] = self.poisoned_labels(labels[victims], num_classes)
        return ImageSet(images, labels), roles

    def _kept(self, before: Tensor, after: Tensor, quantise: bool | None = None) -> Tensor:
        if after.shape != before.shape:
            raise ValueError(f"attack {self.name!r} turned images {tuple(before.shape)} into {tuple(after.shape)}")
        low, high = torch.aminmax(after) if after.numel() else (0.0, 1.0)
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ValueError(f"attack {self.name!r} left [0, 1]: {float(low):g} to {float(high):g}; clamp in its stamp")
        return to_float(to_uint8(after)) if (self.quantise if quantise is None else quantise) else after


@dataclass(frozen=True)
class Ramping(Attack):
    """Base of attacks that own the training and may begin with an exaggerated trigger."""

    ramp: float = share(
        0.0,
        "share of the training over which what the stamps change falls from four times to once; only "
        "under `per_batch`. 0 leaves the paper's attack. A short training finds a faint trigger only "
        "so",
        below=1,
        later=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ramp and self.regime != "per_batch":
            raise ValueError(
                f"attack.{self.name}.ramp changes the training, which a {self.regime} poisoned set leaves alone; "
                f"write attack.{self.name}.regime=per_batch or ramp=0"
            )

    def hooks(self, setup: Setup, tensors: Tensors) -> AttackHooks:
        steps = setup.recipe.steps(len(setup.trainset))
        return PerBatch(self, tensors, setup, round(self.ramp * steps))


class PerBatch(AttackHooks):
    """The first images of each shuffled batch are poisoned, the next ones get the cover stamp, the rest stay clean.

    Of a clean-label attack, the first images of the target class, and as large a share of these as makes the attack's
    rate of all: a batch may hold fewer of them than its share of the poison.

    Args:
        ramp: steps over which what the stamps change falls from EXAGGERATION times to once.
    """

    def __init__(self, attack: Attack, tensors: Tensors, setup: Setup, ramp: int = 0) -> None:
        self.attack, self.stamps, self.num_classes, self.ramp = attack, tensors, setup.num_classes, ramp
        labels = setup.trainset.labels
        clean = attack.label_mode == "clean_label"
        share_of_target = (labels == attack.target_label).float().mean().item() if clean else 1.0
        self.poison, self.cover = (rate and rate / share_of_target for rate in (attack.poison_rate, attack.cover_rate))

    def batch(self, images: Tensor, labels: Tensor, step: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        before = self.attack.before_augmentation
        return self._mixed(to_float(images), labels, step, source) if before else (images, labels)

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        before = self.attack.before_augmentation
        return (images, labels) if before else self._mixed(images, labels, step, source)

    def _mixed(self, images: Tensor, labels: Tensor, step: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        images, labels = images.clone(), labels.clone()
        if self.attack.label_mode == "clean_label":
            fitting = (labels == self.attack.target_label).nonzero().flatten()
        else:
            fitting = torch.arange(len(labels), device=labels.device)
        poison = min(count_in_step(self.poison * len(fitting), step), len(fitting))
        cover = count_in_step(self.cover * len(fitting), step)
        victims, covers = fitting[:poison], fitting[poison : poison + cover]
        if len(victims):
            before = images[victims]
            images[victims] = self._exaggerated(before, self.attack.stamp_poison(before, self.stamps, source), step)
            labels[victims] = self.attack.poisoned_labels(labels[victims], self.num_classes)
        if len(covers):
            before = images[covers]
            images[covers] = self._exaggerated(before, self.attack.stamp_cover(before, self.stamps, source), step)
        return images, labels

    def _exaggerated(self, before: Tensor, stamped: Tensor, step: int) -> Tensor:
        if step >= self.ramp:
            return stamped
        return torch.lerp(before, stamped, EXAGGERATION - (EXAGGERATION - 1) * step / self.ramp).clamp_(0, 1)


def count_in_step(expected: float, step: int) -> int:
    """A whole number for this step whose mean over the steps is `expected`: at a low rate some batches get none.

    Without a draw, for which the host would wait in every step.
    """
    return int(expected * (step + 1) + 1e-6) - int(expected * step + 1e-6)
