"""Neural Cleanse (NC): find for each class the smallest stamp that leads there, and unlearn the one that is too small.

Paper: Wang et al., IEEE Symposium on Security and Privacy 2019, doi:10.1109/SP.2019.00031.
Differs: all classes are optimised in one batch, each with its own weight of the norm and its own early stop, on the
same mini-batches of the reserve. The stamp that is kept is the last one judged in its step; the released code keeps
what the step's last update made of it. A model without a flagged class is returned as it came: the paper calls it
clean. The paper unlearns for one epoch over 10 % of the training data; here the same 156 updates (5,000 CIFAR-10 images
in batches of 32), since a reserve may be smaller. The paper's other mitigations, a filter of inputs and pruning by the
reversed trigger, are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.data import ImageSet, generator, to_float
from bench.engine.inference import under_attack
from bench.engine.settings import count, number, share
from bench.engine.training import Hooks, Recipe
from defenses.base import Defense, DefenseResult, NotApplicable, ReserveView, defense

AT_ONCE = 2048  # stamped images in one forward; more classes than fit take turns, which changes no figure


@defense("neural_cleanse")
@dataclass(frozen=True)
class NeuralCleanse(Defense):
    """Reverse a trigger for each class, flag classes whose mask is an outlier, fine-tune on stamped images."""

    paper: ClassVar[str] = "doi:10.1109/SP.2019.00031"
    steps: int = count(1000, "most steps of the reversal; the weight of the norm is judged after each", at_least=1)
    batches: int = count(31, "mini-batches a step; no more than one pass over the reserve", at_least=1)
    batch_size: int = count(32, "images in a mini-batch", at_least=1)
    reversal_lr: float = number(0.1, "learning rate of Adam with betas 0.5 and 0.9", above=0)
    success: float = share(0.99, "share of images, that a stamp must lead to its class")
    cost: float = number(1e-3, "first weight of the mask's L1 norm, set once stamps succeed without it", at_least=0)
    multiplier: float = number(
        2.0,
        "the weight is multiplied by it after `patience` successes, and divided by it to the power "
        "1.5 after as many failures",
        above=1,
    )
    patience: int = count(5, "steps in a row", at_least=1)
    early_stop_patience: int = count(
        25,
        "steps without a smaller mask that end a class whose weight has gone both ways",
        at_least=1,
    )
    threshold: float = number(2.0, "anomaly index above which a class is flagged", at_least=0)
    stamped: float = share(0.2, "share of each batch stamped while unlearning")
    updates: int = count(156, "optimizer steps of the unlearning; SGD with a cosine schedule to zero", at_least=1)
    lr: float = 0.01
    momentum: float = 0.9

    def defend(self, view: ReserveView) -> DefenseResult:
        if view.num_classes < 3:
            raise NotApplicable(f"neural_cleanse looks for an outlier among classes, and {view.num_classes} have none")
        masks, patterns = self.reverse(view)
        norms = masks.flatten(1).sum(1)
        index = anomaly_index(norms)
        for label in range(view.num_classes):
            view.log.record("neural_cleanse/norm", norms[label].item(), label)
            view.log.record("neural_cleanse/anomaly_index", index[label].item(), label)
        flagged = index > self.threshold
        if not flagged.any():
            return DefenseResult(view.model)
        recipe = Recipe(
            updates=self.updates,
            lr=self.lr,
            batch_size=self.batch_size,
            momentum=self.momentum,
            weight_decay=0.0,
            optimizer="momentum",
        )
        model = view.fit(
            view.model, recipe, hooks=Stamped(masks[flagged], patterns[flagged], self.stamped), stream="neural_cleanse"
        )
        return DefenseResult(model)

    def reverse(self, view: ReserveView) -> tuple[Tensor, Tensor]:
        """For each of K classes the smallest mask (K, 1, H, W) that succeeds, and its pattern (K, C, H, W)."""
        classes = torch.arange(view.num_classes, device=view.device)
        with under_attack(view.model) as model:
            reversed_triggers = [
                self._reverse(model, view.reserve, group, view.seed)
                for group in classes.split(max(1, AT_ONCE // self.batch_size))
            ]
        masks, patterns = zip(*reversed_triggers, strict=True)
        return torch.cat(masks), torch.cat(patterns)

    def _reverse(self, model: nn.Module, data: ImageSet, classes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        count, (_, channels, height, width) = len(classes), data.images.shape
        size = min(self.batch_size, len(data))
        batches = min(self.batches, len(data) // size)
        shapes = {"mask": (1, height, width), "pattern": (channels, height, width)}
        raw = {name: self._start(seed, name, classes, shape).requires_grad_(True) for name, shape in shapes.items()}
        optimizer = torch.optim.Adam(raw.values(), lr=self.reversal_lr, betas=(0.5, 0.9))
        schedule = CostSchedule(self, count)
        best = {name: bounded(value.detach()) for name, value in raw.items()}
        for step in range(self.steps):
            running = schedule.running.nonzero().flatten().to(classes.device)
            if not len(running):
                break
            cost = schedule.cost.to(classes.device)[running].float()
            # The same images for every class, whatever classes share its forward.
            source = generator(seed, "neural_cleanse", step)
            order = torch.randperm(len(data), generator=source)[: batches * size].view(batches, size).to(classes.device)
            hits = torch.zeros(len(running), device=classes.device)
            for chosen in order:
                mask, pattern = (bounded(raw[name][running]) for name in shapes)
                stamped = stamp(to_float(data.batch(chosen)), mask[:, None], pattern[:, None])  # (K, B, C, H, W)
                logits = model(stamped.flatten(0, 1))
                wanted = classes[running].repeat_interleave(size)
                # Summed over classes: each has the gradient that it would have alone.
                loss = F.cross_entropy(logits, wanted, reduction="sum") / size
                loss = loss + (cost * mask.flatten(1).sum(1)).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                hits += (logits.detach().argmax(1) == wanted).view(len(running), -1).float().mean(1)
            # Judged and kept is the stamp of the last mini-batch, not what its update made of it: with the few batches
            # of a small reserve, the smallest mask would be one that has just stopped working.
            success, norms = torch.zeros(count), torch.zeros(count)
            success[schedule.running] = (hits / batches).cpu()
            norms[schedule.running] = mask.detach().flatten(1).sum(1).cpu()
            better = schedule.update(success, norms)
            # A class that no stamp has reached yet keeps its last one.
            taken = (better | schedule.best.isinf()).to(classes.device)[running]
            best["mask"][running[taken]] = mask.detach()[taken]
            best["pattern"][running[taken]] = pattern.detach()[taken]
        return best["mask"], best["pattern"]

    @staticmethod
    def _start(seed: int, name: str, classes: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Uniform in [0, 1] behind `bounded`, from a source of each class's own."""
        drawn = [
            torch.rand(shape, generator=generator(seed, "neural_cleanse", name, label)) for label in classes.tolist()
        ]
        return torch.stack(drawn).sub_(0.5).mul_(2 - 1e-6).atanh_().to(classes.device)


class CostSchedule:
    """The weight of the mask's norm, and the early stop, of K classes that know nothing of each other.

    Attributes:
        cost: (K,) weight of the norm; 0 until stamps succeed without it.
        best: (K,) norm of the smallest mask that succeeded, infinity before.
        running: (K,) bool, which have not stopped.
    """

    def __init__(self, settings: NeuralCleanse, count: int) -> None:
        self.settings = settings
        self.cost = torch.zeros(count, dtype=torch.float64)
        self.best = torch.full((count,), math.inf)
        self.running = torch.ones(count, dtype=torch.bool)
        self._stalled, self._up, self._down = (torch.zeros(count, dtype=torch.int64) for _ in range(3))
        self._went_up, self._went_down = (torch.zeros(count, dtype=torch.bool) for _ in range(2))

    def update(self, success: Tensor, norms: Tensor) -> Tensor:
        """Take in one step; classes that have stopped are left alone.

        Args:
            success: (K,) share of the step's images that went to the class.
            norms: (K,) of the masks after the step.

        Returns:
            (K,) bool, whose mask is the best so far.
        """
        nc, active = self.settings, self.running.clone()
        works = active & (success >= nc.success)
        better = works & (norms < self.best)
        self.best = torch.where(better, norms, self.best)
        self._stalled = torch.where(better, 0, self._stalled + (self.best < math.inf).long())
        self.running &= ~(self._went_up & self._went_down & (self._stalled >= nc.early_stop_patience))
        active &= self.running
        self._up = torch.where(works, self._up + 1, 0)
        self._down = torch.where(works, 0, self._down + 1)
        starts = active & (self.cost == 0) & (self._up >= nc.patience)
        rises = active & ~starts & (self._up >= nc.patience)
        falls = active & (self._down >= nc.patience)
        self.cost = torch.where(starts, nc.cost, self.cost)
        self.cost = torch.where(rises, self.cost * nc.multiplier, self.cost)
        self.cost = torch.where(falls, self.cost / nc.multiplier**1.5, self.cost)
        self._went_up = (self._went_up | rises) & ~starts
        self._went_down = (self._went_down | falls) & ~starts
        # As in the released code, the step that sets the weight already counts as one success with it.
        self._up = torch.where(starts, 1, torch.where(rises, 0, self._up))
        self._down = torch.where(falls, 0, self._down)
        return better


class Stamped(Hooks):
    """Stamps the first images of each shuffled batch with a reversed trigger, and leaves them their labels."""

    def __init__(self, masks: Tensor, patterns: Tensor, share: float) -> None:
        self.masks, self.patterns, self.share = masks, patterns, share

    def augmented(
        self, model: nn.Module, images: Tensor, labels: Tensor, step: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        count = round(self.share * len(images))
        which = torch.randint(len(self.masks), (count,), generator=source, device=images.device)
        changed = stamp(images[:count], self.masks[which], self.patterns[which])
        return torch.cat([changed, images[count:]]), labels


def bounded(raw: Tensor) -> Tensor:
    """Any number -> (0, 1)."""
    return raw.tanh() / 2 + 0.5


def stamp(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Images in [0, 1] with the pattern where the mask is 1."""
    return (1 - mask) * images + mask * pattern


def anomaly_index(norms: Tensor) -> Tensor:
    """(K,) mask norms -> (K,): how many consistent median absolute deviations each lies below the median, 0 above.

    Equal norms have no deviation and no outlier: 0.
    """
    norms = norms.double()
    median = norms.quantile(0.5)  # torch.median would take the lower of two middle values
    deviation = 1.4826 * (norms - median).abs().quantile(0.5)
    return ((median - norms) / deviation).clamp(min=0) if deviation > 0 else torch.zeros_like(norms)
