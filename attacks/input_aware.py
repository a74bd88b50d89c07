"""Input-aware: a generator draws another pattern for each image; the pattern of another image must not work.

Paper: Nguyen and Tran, NeurIPS 2020, arXiv:2010.08138.
Differs: the gradients of the pattern generator are cleared after every step (the authors' code lets them pile
up over the whole run). The second images are those of the same batch, moved by one, not a second draw. Poisoned
and cross images go through the pattern generator together, so that batch norm sees both. The generators read
images in [0, 1]; distances are taken behind the data set's normalisation, as in the paper. The mask generator
gets the paper's 25 epochs of CIFAR-10, or the victim's number of steps if that is smaller; the steps of both
rates keep their shares of the run. Images are padded to what the poolings need, and those under 32 pixels get
two levels (the paper's net for MNIST). At rates below one image in a batch, some batches have no trigger. Images are
augmented as is usual for the data set, without the authors' rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.data import generator
from bench.engine.settings import count, number, share
from bench.engine.training import Tensors, named, optimizer_tensors, part_of, restore_optimizer

from .base import Attack, AttackHooks, Setup, attack, count_in_step

USUAL_MASK_UPDATES = 9_775  # 25 epochs of CIFAR-10 at batch size 128
BETAS = (0.5, 0.9)
WIDTHS = {2: [16, 32], 3: [32, 64, 128]}  # channels of each level, by the number of levels
MASK_MILESTONES = (10 / 25, 20 / 25)  # the rate falls to a tenth here, in shares of the updates
MILESTONES = (1 / 3, 1 / 2, 2 / 3, 5 / 6)  # 200, 300, 400 and 500 of 600 epochs


@attack("input_aware")
@dataclass(frozen=True)
class InputAware(Attack):
    """image + mask(image) * (pattern(image) - image), with a nearly binary mask that channels share."""

    paper: ClassVar[str] = "arXiv:2010.08138"
    has_wrong_trigger: ClassVar[bool] = True
    label_modes: ClassVar[tuple[str, ...]] = ("all_to_one", "all_to_all")
    regimes: ClassVar[tuple[str, ...]] = ("per_batch",)
    regime: str = "per_batch"
    cover_rate: float = share(
        0.1, "share of cross samples: they carry the trigger of another image and keep their label"
    )
    mask_updates: int = count(
        0,
        "optimizer steps of the mask generator; 0 takes 9,775 (the paper's 25 epochs), or the "
        "victim's number if that is smaller",
    )
    mask_density: float = share(0.032, "value of a mask's pixel, above which it costs", above=0, below=1)
    density_weight: float = number(100.0, "weight of that cost, against the diversity of masks", at_least=0)
    diversity_weight: float = number(
        1.0, "weight of the diversity of patterns, against the classifier's loss", at_least=0
    )
    learning_rate: float = number(0.01, "learning rate of Adam, for both generators", above=0)

    def check(self, class_counts: list[int], shape: tuple[int, int, int]) -> None:
        super().check(class_counts, shape)
        if min(shape[1:]) < 8:
            raise ValueError(
                f"attack.input_aware needs images of at least 8x8 pixels, not {shape[1]}x{shape[2]}; "
                "set a larger dataset.size"
            )

    def prepare(self, setup: Setup) -> Tensors:
        channels, height, width = setup.trainset.images.shape[1:]
        levels = 3 if min(height, width) >= 32 else 2
        spread = setup.fresh_model(setup.seed).std.clone()
        mask = _seeded(setup, "mask", channels, 1, levels)
        self._learn_mask(setup, mask, spread)
        pattern = _seeded(setup, "pattern", channels, channels, levels)
        return {"spread": spread} | _stored("mask", mask) | _stored("pattern", pattern)

    def _learn_mask(self, setup: Setup, network: nn.Module, spread: Tensor) -> None:
        """First stage: sparse masks that differ as much as their images do."""
        updates = self.mask_updates or self._affordable(setup)
        adam = torch.optim.Adam(network.parameters(), lr=self.learning_rate, betas=BETAS)
        steps = [round(share * updates) for share in MASK_MILESTONES]
        schedule = torch.optim.lr_scheduler.MultiStepLR(adam, steps, gamma=0.1)
        source = generator(setup.seed, "input_aware mask", device=setup.device)
        data, size = setup.trainset, setup.recipe.batch_size
        for update in range(updates):
            chosen = torch.randint(len(data), (size,), generator=source, device=setup.device)
            batch = setup.augmentation(data.batch(chosen), source)
            loss = self.mask_loss(batch / spread, sharpened(network(batch)))
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
            schedule.step()
            if update % 100 == 0 or update == updates - 1:  # seldom: reading a number waits for the device
                setup.log.record("input_aware/mask_loss", loss.item(), update)
        setup.log.images += updates * size

    def mask_loss(self, images: Tensor, masks: Tensor) -> Tensor:
        """Of normalised images and their masks: the cost of pixels and the lack of diversity."""
        # Neighbours are two independent draws, and each mask is computed once.
        diversity = distance(images, images.roll(1, 0)) / (distance(masks, masks.roll(1, 0)) + 1e-7)
        return self.density_weight * F.relu(masks - self.mask_density).mean() + diversity.mean()

    def _affordable(self, setup: Setup) -> int:
        return max(1, min(USUAL_MASK_UPDATES, setup.recipe.steps(len(setup.trainset))))

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        return self._exchanged(images, images, tensors)

    def stamp_cover(self, images: Tensor, tensors: Tensors, source: torch.Generator) -> Tensor:
        if len(images) < 2:
            # There is no other image; turned by half it is another one to the generators.
            return self._exchanged(images, images.flip(-1, -2), tensors)
        # One random cycle through all: no image gets its own trigger.
        order = torch.randperm(len(images), generator=source, device=images.device)
        other = torch.empty_like(images)
        other[order] = images[order.roll(1)]
        return self._exchanged(images, other, tensors)

    def _exchanged(self, images: Tensor, other: Tensor, tensors: Tensors) -> Tensor:
        """The images with the triggers that the generators draw for others."""
        height, width = images.shape[-2:]
        size = max(1, 2**20 // (height * width))  # bounds the memory of the generators' maps
        done = []
        for chunk, drawn_for in zip(images.split(size), other.split(size), strict=True):
            pattern = _applied("pattern", tensors, drawn_for)
            mask = sharpened(_applied("mask", tensors, drawn_for))
            done.append(torch.lerp(chunk, pattern, mask))
        return torch.cat(done).clamp_(0, 1)

    def hooks(self, setup: Setup, tensors: Tensors) -> AttackHooks:
        return PatternHooks(self, setup, tensors)


class PatternHooks(AttackHooks):
    """Second stage: the classifier and the pattern generator learn from the same loss; the mask is frozen.

    Behind augmentation the first images of a batch get their own trigger and the attacker's label, the next
    ones the trigger of their neighbour and keep their label.
    """

    def __init__(self, attack: InputAware, setup: Setup, tensors: Tensors) -> None:
        self.attack, self.num_classes = attack, setup.num_classes
        self.frozen = {name: value for name, value in tensors.items() if not name.startswith("pattern.")}
        weights = part_of("pattern", tensors)
        channels = setup.trainset.images.shape[1]
        self.pattern = _seeded(setup, "pattern", channels, channels, _levels(weights)).train()
        self.pattern.load_state_dict(weights)
        self.adam = torch.optim.Adam(self.pattern.parameters(), lr=attack.learning_rate, betas=BETAS)
        self.diversity: Tensor | None = None

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        attack, size = self.attack, len(images)
        poison = count_in_step(attack.poison_rate * size, step)
        cover = min(count_in_step(attack.cover_rate * size, step), size - poison)
        stop = poison + cover
        if not stop:
            return images, labels
        drawn_for = torch.cat([images[:poison], images.roll(-1, 0)[poison:stop]])
        pattern = self.pattern(drawn_for)
        with torch.no_grad():
            mask = sharpened(_applied("mask", self.frozen, drawn_for))
        pairs = min(poison, cover)
        if pairs:
            generated, other = slice(0, pairs), slice(poison, poison + pairs)
            images_apart, patterns_apart = (
                distance(both[generated] / self.frozen["spread"], both[other] / self.frozen["spread"])
                for both in (drawn_for, pattern)
            )
            self.diversity = (images_apart / (patterns_apart + 1e-7)).mean()
        images = torch.cat([torch.lerp(images[:stop], pattern, mask).clamp(0, 1), images[stop:]])
        return images, torch.cat([attack.target_labels(labels[:poison], self.num_classes), labels[poison:]])

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        loss = super().loss(model, images, labels, smoothing)
        if self.diversity is not None:
            loss = loss + self.attack.diversity_weight * self.diversity
            self.diversity = None
        return loss

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        passed = sum(step >= share * steps for share in MILESTONES)
        for group in self.adam.param_groups:
            group["lr"] = self.attack.learning_rate * 0.1**passed
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def learned(self) -> Tensors:
        return _stored("pattern", self.pattern) | {
            name: value for name, value in self.frozen.items() if name.startswith("mask.")
        }

    def tensors(self) -> Tensors:
        return _stored("pattern", self.pattern) | named("adam", optimizer_tensors(self.adam))

    def restore(self, tensors: Tensors) -> None:
        self.pattern.load_state_dict(part_of("pattern", tensors))
        restore_optimizer(self.adam, part_of("adam", tensors))


class Generator(nn.Module):
    """(B, C, H, W) images -> (B, outputs, H, W) in [0, 1]: the layout of both generators."""

    def __init__(self, channels: int, outputs: int, levels: int) -> None:
        super().__init__()
        widths = WIDTHS[levels]
        self.multiple = 2**levels
        layers: list[nn.Module] = []
        for before, after in zip([channels, *widths], widths, strict=False):
            layers += [*_block(before, after), *_block(after, after), nn.MaxPool2d(2)]
        layers += _block(widths[-1], widths[-1])
        for before, after in zip(widths[::-1], [*widths[-2::-1], outputs], strict=True):
            up = nn.Upsample(scale_factor=2, mode="bilinear")
            layers += [up, *_block(before, before), *_block(before, after)]
        self.layers = nn.Sequential(*layers[:-1])  # the last block has no ReLU

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        more = (0, -width % self.multiple, 0, -height % self.multiple)
        if any(more):
            images = F.pad(images, more, mode="replicate")
        return self.layers(images)[..., :height, :width].tanh() / 2 + 0.5


def _block(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after, momentum=0.05), nn.ReLU()]


def sharpened(soft: Tensor) -> Tensor:
    """What the mask generator gives, pushed towards 0 and 1."""
    return (20 * soft - 10).tanh() / 2 + 0.5


def distance(one: Tensor, other: Tensor) -> Tensor:
    """(B,): root mean square of the difference of each pair of images."""
    # The root has no gradient at 0, which two equal images would reach.
    return (one - other).square().mean(dim=(1, 2, 3)).clamp_min(1e-12).sqrt()


def _seeded(setup: Setup, name: str, channels: int, outputs: int, levels: int) -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(setup.seed, "input_aware", name).initial_seed())
        return Generator(channels, outputs, levels).to(setup.device)


def _stored(name: str, network: nn.Module) -> Tensors:
    return {key: value.clone() for key, value in named(name, network.state_dict()).items()}


def _applied(name: str, tensors: Tensors, images: Tensor) -> Tensor:
    """The generator `pattern` or `mask` with its stored weights, in eval mode."""
    weights, channels = part_of(name, tensors), images.shape[1]
    shell = _shell(channels, 1 if name == "mask" else channels, _levels(weights))
    return torch.func.functional_call(shell, weights, (images,))


def _levels(weights: Tensors) -> int:
    """Of a stored generator: the width of its first convolution tells."""
    return 3 if len(weights["layers.0.weight"]) == WIDTHS[3][0] else 2


@lru_cache
def _shell(channels: int, outputs: int, levels: int) -> Generator:
    """What stored weights are put into; it has none of its own."""
    with torch.device("meta"):
        return Generator(channels, outputs, levels).eval().requires_grad_(False)
