"""LIRA: a U-Net learns a small change for each image together with the classifier, then stands still.

Paper: Doan, Lao, Zhao and Li, ICCV 2021, doi:10.1109/ICCV48922.2021.01175.
Differs: `poison_rate` is the share of each batch that is used poisoned, which is in expectation the paper's
1 - alpha, and a tenth as in other attacks; the paper uses each image clean and poisoned in every step, with
alpha at one half. Epsilon is in [0, 1] pixel space, and of four levels: the paper's 0.01 of normalised images
is 0.6 of a level, which rounding to 8 bits takes away. The generator's copy learns against the classifier in
eval mode and is taken over 50 times in equal parts of the first stage, which is half of the steps (the paper:
after each of the first 50 of 300 epochs). The U-Net has half of the widths of the authors' code, with which
it costs more than a ResNet-18.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.data import generator
from bench.engine.inference import under_attack
from bench.engine.modes import autocast
from bench.engine.settings import count, number, pixels, share
from bench.engine.training import Tensors, named, optimizer_tensors, part_of, restore_optimizer

from .base import Attack, AttackHooks, PerBatch, Setup, attack


@attack("lira")
@dataclass(frozen=True)
class LIRA(Attack):
    """clip(image + epsilon * tanh(U-Net(image))).

    A `poison_rate` of 0.5 is nearest to the paper.
    """

    paper: ClassVar[str] = "doi:10.1109/ICCV48922.2021.01175"
    label_modes: ClassVar[tuple[str, ...]] = ("all_to_one", "all_to_all")
    regimes: ClassVar[tuple[str, ...]] = ("per_batch",)
    regime: str = "per_batch"
    epsilon: float = pixels(4 / 255, "largest change of a pixel; 4 / 255 is four levels")
    stage_one: float = share(0.5, "share of the steps in which the generator learns", above=0)
    rounds: int = count(
        50,
        "how often the first stage takes over the copy of the generator that it improves",
        at_least=1,
    )
    learning_rate: float = number(1e-4, "learning rate of Adam, for the generator", above=0)
    width: int = count(
        32,
        "channels of the U-Net's first level; it has four, each twice as wide as the one before",
        at_least=1,
    )

    def prepare(self, setup: Setup) -> Tensors:
        return _stored("generator", _seeded(self, setup))

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        weights = part_of("generator", tensors)
        network = _shell(images.shape[1], len(weights["down.0.0.weight"]))
        # The widest maps have the full size: parts keep the memory of large images bounded.
        parts = images.split(max(1, 2**20 // (images.shape[-2] * images.shape[-1])))
        return torch.cat(
            [_moved(chunk, torch.func.functional_call(network, weights, (chunk,)), self.epsilon) for chunk in parts]
        )

    def hooks(self, setup: Setup, tensors: Tensors) -> AttackHooks:
        return TwoStages(self, setup, tensors)


class TwoStages(PerBatch):
    """While the first stage lasts, a copy of the generator learns; the classifier sees the one of the last round."""

    def __init__(self, attack: LIRA, setup: Setup, tensors: Tensors) -> None:
        # Own copies: the tensors of `prepare` stay what they were.
        super().__init__(attack, {name: value.clone() for name, value in tensors.items()}, setup)
        self.lira, self.precision = attack, setup.recipe.precision
        self.copy = _seeded(attack, setup).train()
        self.copy.load_state_dict(part_of("generator", tensors))
        self.adam = torch.optim.Adam(self.copy.parameters(), lr=attack.learning_rate)
        self.learning = True

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if self.learning:
            target_labels = self.attack.target_labels(labels, self.num_classes)
            # In train mode a batch of triggers alone would move the running statistics of batch norm.
            with under_attack(model) as fast:
                with autocast(self.precision, images.device):
                    moved = _moved(images, self.copy(images), self.lira.epsilon)
                    loss = F.cross_entropy(fast(moved), target_labels)
                loss.backward()
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)
        return super().augmented(model, images, labels, step, source)

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        if not self.learning:
            return
        first_stage = max(1, round(self.lira.stage_one * steps))
        done, rounds = step + 1, self.lira.rounds
        self.learning = done < first_stage
        if done * rounds // first_stage > step * rounds // first_stage:
            for name, value in _stored("generator", self.copy).items():
                self.stamps[name].copy_(value)

    def learned(self) -> Tensors:
        return {name: value.clone() for name, value in self.stamps.items()}

    def tensors(self) -> Tensors:
        state = named("adam", optimizer_tensors(self.adam)) | {"learning": torch.tensor(self.learning)}
        return self.learned() | _stored("copy", self.copy) | state

    def restore(self, tensors: Tensors) -> None:
        self.stamps = {name: value for name, value in tensors.items() if name.startswith("generator.")}
        self.copy.load_state_dict(part_of("copy", tensors))
        restore_optimizer(self.adam, part_of("adam", tensors))
        self.learning = bool(tensors["learning"])


class UNet(nn.Module):
    """(B, C, H, W) images in [0, 1] -> (B, C, H, W) in [-1, 1]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(
            _double(before, after) for before, after in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.up = nn.ModuleList(
            _double(below + level, level) for below, level in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.last = nn.Sequential(nn.Conv2d(width, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        more = (0, -width % 8, 0, -height % 8)
        # Three halvings must meet again on the way up: work on multiples of 8, and cut back.
        now = self.down[0](F.pad(images, more, mode="replicate") if any(more) else images)
        levels = [now]
        for block in self.down[1:]:
            now = block(F.avg_pool2d(now, 2))
            levels.append(now)
        for block, level in zip(self.up, levels[-2::-1], strict=True):
            now = F.interpolate(now, scale_factor=2, mode="bilinear", align_corners=True)
            now = block(torch.cat([now, level], dim=1))
        return self.last(now)[..., :height, :width].tanh()


def _double(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


def _moved(images: Tensor, change: Tensor, epsilon: float) -> Tensor:
    return (images + epsilon * change).clamp(0, 1)


def _seeded(attack: LIRA, setup: Setup) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(setup.seed, "lira").initial_seed())
        return UNet(setup.trainset.images.shape[1], attack.width).to(setup.device)


def _stored(name: str, network: nn.Module) -> Tensors:
    return {key: value.clone() for key, value in named(name, network.state_dict()).items()}


@lru_cache
def _shell(channels: int, width: int) -> UNet:
    """What stored weights are put into; it has none of its own."""
    with torch.device("meta"):
        return UNet(channels, width).eval().requires_grad_(False)
