"""Reconstructive Neuron Pruning (RNP): unlearn the clean images, recover them by channel masks, cut what stays off.

Paper: Li et al., ICML 2023, arXiv:2305.14876.
Differs: unlearning ends at a training accuracy of two over the number of classes (0.2, as in the paper, for ten), and
goes on with what it has when it never gets there; the gradient is clipped when it is there, where the released code
clips in front of the backward pass. The threshold is the largest that a held-out part of the reserve allows; the
released code sweeps it on the test set (`prune_by=threshold` is a fixed rule, at BackdoorBench's 0.7).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.data import Augmentation, ImageSet, equal_batches, generator
from bench.engine.models import Classifier
from bench.engine.pruning import Masked, MaskPruning, split_off
from bench.engine.settings import count, number, share
from bench.engine.training import Diverged, Hooks, Recipe
from defenses.base import Defense, DefenseResult, NotApplicable, ReserveView, defense


@defense("rnp")
@dataclass(frozen=True)
class ReconstructiveNeuronPruning(MaskPruning, Defense):
    """Gradient ascent on a few clean images, then masks of the norm channels that undo it; the lowest are pruned."""

    paper: ClassVar[str] = "arXiv:2305.14876"
    images: int = count(500, "how many of the reserve are unlearned and recovered; the paper's 500. 0 takes all")
    unlearn_epochs: int = count(20, "the most; the rate falls to a tenth after every ten")
    unlearn_lr: float = number(0.01, "learning rate of the ascent, SGD on all weights", at_least=0)
    weight_decay: float = number(5e-4, "weight decay of the ascent", at_least=0)
    clip: float = number(20.0, "largest norm of the ascent's gradient", above=0)
    stop_accuracy: float = share(0.0, "unlearning ends at this training accuracy; 0 is two over the number of classes")
    recover_epochs: int = count(20, "passes of SGD on the masks")
    recover_lr: float = number(0.2, "its constant learning rate", at_least=0)
    alpha: float = number(0.2, "factor of the recovery's loss", at_least=0)
    batch_size: int = count(128, "images in a step, of ascent and recovery", at_least=1)
    momentum: float = 0.9
    threshold: float = 0.7

    def defend(self, view: ReserveView) -> DefenseResult:
        norms = view.model.norms()
        if not norms:
            raise NotApplicable("the network has no norm layer with a scale and a shift")
        judges, training = split_off(view.reserve, self.held_out, view.seed)
        training = training[: self.images] if self.images else training
        unlearned = self.unlearn(copy.deepcopy(view.model), training, view)
        masked = Masked(unlearned, unlearned.norms())
        recipe = Recipe(
            epochs=self.recover_epochs,
            batch_size=self.batch_size,
            optimizer="momentum",
            lr=self.recover_lr,
            momentum=self.momentum,
            weight_decay=0.0,
            schedule="constant",
        )
        view.fit(masked, recipe, data=training, hooks=Recover(self.alpha), stream="rnp_recover")
        self.prune_lowest(view.model, norms, masked.mask.detach(), judges, seed=view.seed, log=view.log, name="rnp")
        return DefenseResult(view.model)

    def unlearn(self, model: Classifier, data: ImageSet, view: ReserveView) -> Classifier:
        """Ascend the cross-entropy in place until the accuracy of an epoch is down; returns the model in eval mode.

        Raises:
            Diverged: the loss is no longer a number.
        """
        # Twice chance, or, of two classes, halfway to it: they are below 100 % from the start.
        enough = self.stop_accuracy or min(2 / view.num_classes, (1 + 1 / view.num_classes) / 2)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.unlearn_lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        batches, size = equal_batches(len(data), self.batch_size)
        augmentation: Augmentation = view.augmentation
        for epoch in range(self.unlearn_epochs):
            source = generator(view.seed, "rnp unlearn", epoch, device=view.device)
            order = torch.randperm(len(data), generator=source, device=view.device)
            right = torch.zeros((), device=view.device)
            total = torch.zeros((), device=view.device)
            # Dropout draws from the global source, which is put back.
            with torch.random.fork_rng(devices=[view.device] if view.device.type == "cuda" else []):
                torch.manual_seed(generator(view.seed, "rnp model", epoch).initial_seed())
                model.train()
                for group in optimizer.param_groups:
                    group["lr"] = self.unlearn_lr * 0.1 ** (epoch // 10)
                for chosen in order[: batches * size].split(size):
                    logits = model(augmentation(data.batch(chosen), source))
                    loss = F.cross_entropy(logits, data.labels[chosen])
                    optimizer.zero_grad(set_to_none=True)
                    (-loss).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                    optimizer.step()
                    right += (logits.detach().argmax(1) == data.labels[chosen]).sum()
                    total += loss.detach()
            if not math.isfinite(total.item()):
                raise Diverged(f"the unlearned loss became {total.item()}; try a lower defense.rnp.unlearn_lr or clip")
            reached = right.item() / (batches * size)
            view.log.images += batches * size
            view.log.updates += batches
            view.log.record("rnp/unlearned_accuracy", reached, epoch + 1)
            if reached <= enough:
                break
        return model.eval()


class Recover(Hooks):
    """Masks learn to give the unlearned network its accuracy back."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        return self.alpha * F.cross_entropy(model(images), labels)

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        assert isinstance(model, Masked)
        model.clamp()
