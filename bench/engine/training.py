"""The one training loop: attacks implant with it, defenses repair with it."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from . import stopping
from .data import Augmentation, ImageSet, equal_batches, generator
from .files import digest_of, save_tensors
from .models import Classifier
from .modes import autocast
from .settings import check, choice, count, number, share

Tensors = dict[str, Tensor]
Net = TypeVar("Net", bound=nn.Module)


class Diverged(ArithmeticError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""

    epochs: int = count(100, "passes over the data")
    updates: int = count(
        0,
        "optimizer steps in place of epochs, if above 0: for data sets so small that an epoch is one step",
    )
    batch_size: int = count(128, "images a step; the last batch is as large as the others", at_least=1)
    optimizer: str = choice(
        "sgd",
        "`sgd` (Nesterov momentum), `momentum` (classical momentum), `adam` or `adamw`",
        ("sgd", "momentum", "adam", "adamw"),
    )
    lr: float = number(0.1, "the highest learning rate", at_least=0)
    momentum: float = number(0.9, "momentum of SGD; the first beta of Adam", at_least=0, below=1)
    weight_decay: float = number(5e-4, "weight decay, on all weights", at_least=0)
    schedule: str = choice(
        "cosine",
        "course of the learning rate; `cosine` goes to zero",
        ("cosine", "one_cycle", "constant"),
    )
    warmup: float = share(0.0, "share of the steps over which the rate rises linearly from zero", below=1)
    label_smoothing: float = share(0.0, "label smoothing of the cross-entropy", below=1)
    precision: str = choice(
        "auto",
        "`auto` (bfloat16 autocast on a GPU, float32 elsewhere), `float32` or `bfloat16`",
        ("auto", "float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        check(type(self), vars(self))

    def steps(self, count: int) -> int:
        """Optimizer steps of a training on so many images."""
        return self.updates or self.epochs * equal_batches(count, self.batch_size)[0]

    def learning_rate(self, step: int, steps: int) -> float:
        """The rate of step `step` of `steps`, counted from 0."""
        done = (step + 0.5) / steps  # the middle of the step: neither the first nor the last rate is zero
        warmup = 0.3 if self.schedule == "one_cycle" else self.warmup
        if done < warmup:
            return self.lr * done / warmup
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@dataclass
class TrainingLog:
    """Where training leaves its curves and its checkpoints.

    Attributes:
        curves: name -> [(step, value), ...].
        folder: for checkpoints; None keeps none.
        every_s: seconds between checkpoints; it cannot change a figure.
        images: training images seen so far, adversarial passes not counted.
        updates: optimizer steps so far.
        precision: what a recipe's `auto` means here.
        earlier_s, earlier_passes: what was spent before an interruption.
    """

    folder: Path | None = None
    every_s: float = 60.0
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    images: int = 0
    updates: int = 0
    precision: str = "auto"
    earlier_s: float = 0.0
    earlier_passes: float = 0.0
    _started: float = field(default_factory=time.perf_counter)
    _passes: float = field(default_factory=lambda: Classifier.passes)
    _parts: set[str] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        """Spent so far, also before an interruption."""
        return self.earlier_s + time.perf_counter() - self._started

    @property
    def passes(self) -> float:
        """Images that went through networks so far, in forward passes, as `Classifier.passes` counts them."""
        return self.earlier_passes + Classifier.passes - self._passes

    def begin(self, stream: str) -> None:
        """Note that a part of the work starts.

        Raises:
            ValueError: a part of this name was there: its checkpoint would pass for this one's.
        """
        if self.folder and stream in self._parts:
            raise ValueError(f"two trainings of one log are named {stream!r}; give each `fit` another stream")
        self._parts.add(stream)

    def record(self, name: str, value: float, step: int) -> None:
        self.curves[name].append((step, float(value)))


class Hooks:
    """What a method may change about training; the default changes nothing.

    Override what you need. The loop calls, for each step: `batch` before augmentation, `augmented` behind it,
    `loss`, and `after_step` after the optimizer step.
    """

    def batch(self, images: Tensor, labels: Tensor, step: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Change a batch before augmentation: images (B, C, H, W) uint8 (or float, if you return that)."""
        return images, labels

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Change a batch behind augmentation: images (B, C, H, W) float in [0, 1]."""
        return images, labels

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """The scalar to minimise."""
        return F.cross_entropy(model(images), labels, label_smoothing=smoothing)

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Called after each optimizer step."""

    def tensors(self) -> Tensors:
        """What a checkpoint must hold beside model and optimizer, for `restore`."""
        return {}

    def restore(self, tensors: Tensors) -> None:
        """Take back what `tensors` gave."""


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if recipe.optimizer in ("adam", "adamw"):
        kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
        return kind(weights, lr=recipe.lr, betas=(recipe.momentum, 0.999), weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        weights,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.optimizer == "sgd" and recipe.momentum > 0,
        foreach=True,
    )


def named(name: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors under one name, `name.key`: how several networks share one file."""
    return {f"{name}.{key}": value for key, value in tensors.items()}


def part_of(name: str, tensors: Tensors) -> Tensors:
    """What `named` put under this name, with its own keys again."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The state of an optimizer as flat tensors, for a checkpoint."""
    states = optimizer.state_dict()["state"].items()
    return {f"{index}.{key}": value for index, state in states for key, value in state.items() if value is not None}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Take back what `optimizer_tensors` gave."""
    state: dict[int, Tensors] = defaultdict(dict)
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        # Adam counts its steps in a tensor that must stay on the CPU.
        state[int(index)][key] = value.cpu() if key == "step" else value
    optimizer.load_state_dict({"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]})


def fit(
    model: Net,
    data: ImageSet,
    recipe: Recipe,
    *,
    seed: int,
    augmentation: Augmentation | None = None,
    hooks: Hooks | None = None,
    log: TrainingLog | None = None,
    stream: str = "train",
    optimizer: torch.optim.Optimizer | None = None,
    after_epoch: Callable[[nn.Module, int], None] | None = None,
) -> Net:
    """Train `model` in place on `data` and return it in eval mode.

    On a CPU the same arguments give bit-identical weights, also when the process is killed and the call repeated
    with a log whose folder kept the checkpoint: every random number depends on the seed and the epoch alone.

    Args:
        augmentation: applied to each batch; None trains on the images as they are.
        hooks: what a method changes about a step.
        log: takes the curve of the loss, and the checkpoints.
        stream: the name of this training: its random numbers, its checkpoint and its curve in the log go by it.
        optimizer: one that goes on from an earlier training with its momentum, made by `make_optimizer` on this model;
            of the recipe only the rate and the length apply to it. None starts a new one.
        after_epoch: called with the model and the number of finished epochs.

    Raises:
        ValueError: there is no image.
        Diverged: the loss is no longer a number.
        Stopped: the process is to stop, and the checkpoint is written.
    """
    if not len(data):
        raise ValueError("there is no image to train on")
    augmentation, hooks, log = augmentation or Augmentation(), hooks or Hooks(), log or TrainingLog()
    log.begin(stream)
    device = data.device
    precision = log.precision if recipe.precision == "auto" else recipe.precision
    optimizer = optimizer or make_optimizer(recipe, model)
    per_epoch, size = equal_batches(len(data), recipe.batch_size)
    steps = recipe.steps(len(data))
    epochs = -(-steps // per_epoch)
    checkpoint = log.folder / f"{stream}.safetensors" if log.folder else None
    epoch = _restore(checkpoint, model, optimizer, hooks, log)
    started = saved = time.monotonic()
    while epoch < epochs:
        source = generator(seed, stream, epoch, device=device)
        order = torch.randperm(len(data), generator=source, device=device)
        total = torch.zeros((), device=device)
        this_epoch = min(per_epoch, steps - epoch * per_epoch)
        # Dropout and stochastic depth draw from the global source: seeded here, and put back after the epoch.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(generator(seed, stream, epoch, "model").initial_seed()))
            model.train()
            for index in range(this_epoch):
                step = epoch * per_epoch + index
                chosen = order[index * size : (index + 1) * size]
                images, labels = hooks.batch(data.batch(chosen), data.labels[chosen], step, source)
                images, labels = hooks.augmented(model, augmentation(images, source), labels, step, source)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate(step, steps)
                optimizer.zero_grad(set_to_none=True)
                with autocast(precision, device):
                    loss = hooks.loss(model, images, labels, recipe.label_smoothing)
                loss.backward()
                optimizer.step()
                hooks.after_step(model, step, steps)
                total += loss.detach()
        epoch += 1
        mean = total.item() / this_epoch  # the one wait for the device in an epoch
        if not math.isfinite(mean):
            raise Diverged(f"the loss became {mean} in epoch {epoch} of {stream}; try a lower lr than {recipe.lr}")
        log.record(f"{stream}/loss", mean, min(epoch * per_epoch, steps))
        log.images += this_epoch * size
        log.updates += this_epoch
        if after_epoch:
            after_epoch(model, epoch)
        now = time.monotonic()
        # The last checkpoint of a long part stays, so that a method of several parts need not repeat it.
        is_due = now - saved >= log.every_s or (epoch == epochs and now - started >= log.every_s)
        if checkpoint and (is_due or stopping.asked()):
            _save(checkpoint, model, optimizer, hooks, log, epoch)
            saved = now
            stopping.check()
    return model.eval()


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, hooks: Hooks, log: TrainingLog, epoch: int
) -> None:
    """Write a checkpoint; a disk that has no room for one costs the checkpoint, not the training."""
    tensors = {name: value.contiguous() for name, value in _state(model, optimizer, hooks).items()}
    metadata = {"epoch": str(epoch), "curves": json.dumps(log.curves), "images": str(log.images)}
    metadata["updates"] = str(log.updates)
    metadata |= {"seconds": str(log.seconds), "passes": str(log.passes), "of": _owner(path)}
    metadata["sha256"] = digest_of(tensors, metadata)
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")  # two containers may share a process id
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, temporary, metadata)
        os.replace(temporary, path)
    except OSError as error:
        print(f"warning: no checkpoint after epoch {epoch} of {_owner(path)}: {error}", file=sys.stderr)
        with suppress(OSError):
            temporary.unlink()


def _restore(
    path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, hooks: Hooks, log: TrainingLog
) -> int:
    """The number of epochs that the checkpoint holds; 0 without one, and for one that cannot be used: it is removed."""
    if path is None or not path.exists():
        return 0
    before = {name: value.clone() for name, value in _state(model, optimizer, hooks).items()}
    try:
        tensors, metadata = _read(path, next(model.parameters()).device)
        curves = {
            name: [(step, value) for step, value in curve] for name, curve in json.loads(metadata["curves"]).items()
        }
        epoch, images, seconds, passes = (
            int(metadata["epoch"]),
            int(metadata["images"]),
            metadata["seconds"],
            metadata["passes"],
        )
        updates = int(metadata["updates"])
        _load(tensors, model, optimizer, hooks)
    except (MemoryError, torch.OutOfMemoryError):  # says nothing about the checkpoint
        raise
    except Exception as error:  # whatever a method's hooks raise at tensors that are not theirs
        reason = " ".join(f"{error}".split()) or type(error).__name__
        print(f"warning: {path} is not a usable checkpoint ({reason}); training starts afresh", file=sys.stderr)
        _load(before, model, optimizer, hooks)
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return 0
    log.curves.update(curves)
    log.images, log.earlier_s, log.earlier_passes = images, float(seconds), float(passes)
    log.updates = updates
    return epoch


def _read(path: Path, device: torch.device) -> tuple[Tensors, dict[str, str]]:
    """Tensors and notes of a checkpoint.

    Raises:
        Exception: it is not one of this training, or not as it was written.
    """
    with safe_open(path, "pt", device=str(device)) as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    if metadata.pop("sha256", None) != digest_of(tensors, metadata):
        raise ValueError("its checksum does not match")
    if metadata["of"] != _owner(path):
        raise ValueError(f"it belongs to {metadata['of']}")
    return tensors, metadata


def _owner(path: Path) -> str:
    """Whose checkpoint lies here: the stage with its key, which names the folder, and the part of its training."""
    return f"{path.parent.name}/{path.stem}"


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, hooks: Hooks) -> Tensors:
    """All that a training needs to go on, for `_load`."""
    tensors = named("model", model.state_dict())
    return tensors | named("optimizer", optimizer_tensors(optimizer)) | named("hooks", hooks.tensors())


def _load(tensors: Tensors, model: nn.Module, optimizer: torch.optim.Optimizer, hooks: Hooks) -> None:
    """Take back what `_state` gave."""
    model.load_state_dict(part_of("model", tensors))
    restore_optimizer(optimizer, part_of("optimizer", tensors))
    hooks.restore(part_of("hooks", tensors))
